"""A model as `samestep train` sets it up, and the micro-batches of a work's first step."""

from typing import Any

from works import Work


def prepared(
    work: Work, *, budget: int, compiled: bool = False
) -> tuple[Any, Any, list[list[int]], list[dict[str, Any]]]:
    """The model, and one step's rows, cut under a budget.

    Args:
        work: Which model and rows.
        budget: Tokens a micro-batch.
        compiled: Whether its layers will be compiled: they stay as transformers has them.

    Returns:
        The model, the examples of the step, the cut (indices of examples for each micro-batch),
        and the micro-batches.
    """
    from contender import _examples
    from samestep.data.batching import pack_micro_batches
    from samestep.data.collate import collate_examples
    from samestep.kernels.gemm import speed_up_linear
    from samestep.models.load import load_model
    from samestep.models.probes import choose_padding, cut_last_layer

    examples = _examples(work, work.write_rows(1))
    model = load_model(str(work.model()))
    if not compiled:
        speed_up_linear(model)
    padding = choose_padding(model, "auto")
    cut_last_layer(model, padding)
    cut = pack_micro_batches(list(examples.lengths), micro_tokens=budget)
    micros = [
        collate_examples([examples[at] for at in positions], padding=padding) for positions in cut
    ]
    return model, examples, cut, micros
