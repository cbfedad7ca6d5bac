"""`samestep train` as a command: arguments in, a result line out."""

from collections.abc import Sequence

from samestep.train.arguments import read_config
from samestep.train.group import launch, process_group, to_launch


def run(arguments: Sequence[str]) -> int:
    """Train as the arguments say.

    Args:
        arguments: ``[run.yaml] [--flag value ...]``.

    Returns:
        The exit code: 0, or that of the ranks that were started.

    Raises:
        SamestepError: As `samestep.train.trainer.train`.
    """
    config = read_config(arguments)
    ranks = to_launch(config.ranks)
    if ranks is not None:
        return launch(ranks, ["train", *arguments])
    # After the arguments are known to be good: this import loads PyTorch.
    from transformers.utils import logging as transformers_logging

    from samestep.engine.collectives import rank
    from samestep.train.trainer import train

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with process_group():
        summary = train(config)
        if rank() > 0:
            return 0
    print(f"{summary['steps']} steps, {summary['tokens']:,} tokens, {summary['seconds']:.1f} s")
    if summary["evaluation_after"] is not None:
        before, after = summary["evaluation_before"], summary["evaluation_after"]
        change = "" if before is None else f"{before:.4f} -> "
        print(f"evaluation loss {change}{after:.4f}")
    print(f"model in {summary['model']}")
    return 0
