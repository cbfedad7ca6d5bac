"""Calling the user's factory of trainers, and what a trainer says of its padding."""

import inspect
import traceback
from collections.abc import Callable
from typing import Any, Literal

from accelerate.state import AcceleratorState, GradientState
from torch.utils._python_dispatch import _disable_current_modes
from transformers import Trainer

from samestep.errors import CheckError

SIZES = ("per_device_train_batch_size", "gradient_accumulation_steps")
"""What a factory is called with."""


def check_signature(factory: Callable[..., Any], *, name: str) -> None:
    """Refuse a factory that does not take the sizes.

    Raises:
        CheckError: Names the keywords that are missing.
    """
    parameters = inspect.signature(factory).parameters
    open_ended = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    missing = [one for one in SIZES if one not in parameters and not open_ended]
    if missing:
        raise CheckError(f"{name}: make_trainer must take the keyword {' and '.join(missing)}")


def make(factory: Callable[..., Any], batch_size: int, accumulation: int) -> Any:
    """A new trainer of the user's.

    Raises:
        CheckError: The factory raises, returns something else, or ignores the sizes.
    """
    # Both are shared by all trainers of a process, and outlive one that failed.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    sizes = dict(zip(SIZES, (batch_size, accumulation), strict=True))
    try:
        # Who watches the types of a run is not to see those of the untouched model.
        with _disable_current_modes():
            trainer = factory(**sizes)
    except Exception as error:
        raise CheckError(f"make_trainer failed: {located(error)}") from error
    if not isinstance(trainer, Trainer):
        raise CheckError(
            f"make_trainer returned a {type(trainer).__name__}, not a transformers.Trainer or "
            "a trainer derived from it; audit other loops by model, examples, collate and step"
        )
    ignored = [name for name, size in sizes.items() if getattr(trainer.args, name) != size]
    if ignored:
        raise CheckError(
            f"make_trainer must pass its arguments on to the trainer: {', '.join(ignored)} was not"
        )
    return trainer


def located(error: BaseException) -> str:
    """An error with its type, its text, and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def padding_side(trainer: Any) -> Literal["right", "left"]:
    """The side that the trainer's own tokenizer pads."""
    side = getattr(trainer.processing_class, "padding_side", "right")
    return "left" if side == "left" else "right"


def pad_id(trainer: Any) -> int:
    """The token that the trainer's own batches are padded with, as far as it says."""
    config = getattr(trainer.model, "config", None)
    for owner in (trainer.processing_class, config):
        found = getattr(owner, "pad_token_id", None)
        if isinstance(found, int):
            return found
    return 0
