"""What the ranks of the tests of exact trainers do: importable, so that a process finds it."""

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from exact_cases import gradients, plain

from samestep.engine import collectives
from samestep.hf.exact_trainer import exact


def trained(
    name: str,
    labels: str,
    cut: tuple[int, int],
    folder: str,
    *,
    apply: bool = True,
    rows: int = 8,
    config: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[dict[str, torch.Tensor], float, float]:
    """The gradient of the last update, the logged loss and the evaluation's, on this rank.

    Args:
        name: Of the model's class.
        labels: As for `exact_cases.plain`.
        cut: Micro-batch size and accumulation.
        folder: Each rank writes below it.
        apply: Whether the trainer is made exact.
        rows: Rows of data.
        config: Of the model.
        options: Of `exact`.
    """
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29611"}
    own = Path(folder) / str(collectives.rank())
    fields = {"num_labels": 3 if labels == "row" else 2, **(config or {})}
    make: Any = plain(name, labels, number=rows, **fields)
    with contextlib.redirect_stdout(None):
        trainer = make(*cut, own, per_device_eval_batch_size=3, ddp_find_unused_parameters=False)
        if hasattr(trainer.model, "set_experts_implementation"):
            trainer.model.set_experts_implementation("eager")
        if apply:
            exact(trainer, **options)
        gradient = gradients(trainer)[-1]
        evaluation = trainer.evaluate()["eval_loss"]
    named = {name.removeprefix("module."): one for name, one in gradient.items()}
    return named, trainer.state.log_history[0]["loss"], evaluation
