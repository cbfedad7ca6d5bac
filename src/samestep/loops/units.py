"""What a mean loss of the user's is a mean over, counted in a micro-batch."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from samestep.engine.targets import IGNORE
from samestep.errors import ConfigError, StepError

LABELS, SHIFTED_LABELS, ROWS = "labels", "shifted-labels", "rows"
Unit = str | Callable[[Any], Any]


def check_unit(unit: Unit) -> None:
    """Refuse a unit that there is not.

    Raises:
        ConfigError: It is neither a known name nor a function.
    """
    if not callable(unit) and unit not in (LABELS, SHIFTED_LABELS, ROWS):
        raise ConfigError(
            f"unit={unit!r}: {LABELS!r}, {SHIFTED_LABELS!r}, {ROWS!r}, or a function that counts "
            "in a micro-batch what its loss is a mean over"
        )


def count_units(micro: Any, unit: Unit) -> float:
    """The number of units of a micro-batch.

    Args:
        micro: The micro-batch; a mapping with ``labels`` unless the unit is a function.
        unit: ``labels`` that are not -100, those after the shift, ``rows``, or a function.

    Raises:
        StepError: It cannot be counted.
    """
    if callable(unit):
        count = float(unit(micro))
    elif unit == ROWS:
        count = float(len(first_tensor(micro)))
    else:
        labels = micro.get("labels") if isinstance(micro, Mapping) else None
        if not isinstance(labels, Tensor):
            raise StepError(
                f"unit={unit!r} counts the labels of a micro-batch, but this one is a "
                f"{type(micro).__name__} without a tensor 'labels': give a function that counts"
            )
        counted = labels[..., 1:] if unit == SHIFTED_LABELS else labels
        count = float((counted != IGNORE).sum())
    if not 0 <= count < float("inf"):
        raise StepError(f"unit={unit!r} counted {count} in a micro-batch: from 0 on, and finite")
    return count


def first_tensor(micro: Any) -> Tensor:
    """The first tensor with rows of a micro-batch.

    Raises:
        StepError: There is none.
    """
    values = micro.values() if isinstance(micro, Mapping) else micro
    held = [values] if isinstance(values, Tensor) else list(values)
    for value in held:
        if isinstance(value, Tensor) and value.dim():
            return value
    raise StepError("no tensor with rows was found in a micro-batch: give unit= a function")


def first_rows(micro: Any, keep: int, rows: int) -> Any:
    """A micro-batch of the first of its rows: every tensor that has a row for each is cut."""
    if isinstance(micro, Tensor):
        return micro[:keep] if micro.dim() and len(micro) == rows else micro
    if isinstance(micro, Mapping):
        return {name: first_rows(value, keep, rows) for name, value in micro.items()}
    if isinstance(micro, list | tuple):
        return type(micro)(first_rows(value, keep, rows) for value in micro)
    return micro
