"""Batches of a trainer under a setting: padded, masked, altered, in another type."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from samestep.audit.batches import Place, add_padding, alter, cast, mask_targets
from samestep.audit.subject import Setting
from samestep.errors import CheckError


def changed(batch: Any, rows: Sequence[int], setting: Setting, *, group: int, filler: int) -> Any:
    """A trainer's batch under a setting.

    Args:
        batch: What the collator gave.
        rows: The rows of the trainer's data that it holds.
        setting: The setting.
        group: Rows that are an example.
        filler: Token id of padding, where the setting names none.
    """
    altered = [at for at, row in enumerate(rows) if row // group in setting.altered]
    if setting.twins:
        altered += [at for at, row in enumerate(rows) if row in rows[:at]]
    masked = [at for at, row in enumerate(rows) if row // group in setting.masked]
    if altered:
        batch = alter(batch, _where(batch, altered, len(rows)))
    if masked:
        batch = mask_targets(batch, _where(batch, masked, len(rows)))
    if setting.padding:
        token = setting.filler or filler
        batch = add_padding(batch, setting.padding, side=setting.side, filler=token)
    return batch if setting.dtype is None else cast(batch, setting.dtype)


def _where(batch: Any, chosen: Sequence[int], number: int) -> list[Place]:
    """The places of some of a batch's examples: a row each, or a row in each of several parts."""
    rows = rows_of(batch)
    if rows is None or rows % number:
        raise CheckError("the collator does not give each example rows of its own")
    return [(part + at,) for at in chosen for part in range(0, rows, number)]


def rows_of(batch: Any) -> int | None:
    """Rows of a batch, if all of its tensors have as many."""
    if not isinstance(batch, Mapping):
        return None
    sizes = {
        value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.dim()
    }
    return sizes.pop() if len(sizes) == 1 else None


def has_class_labels(batch: Any) -> bool:
    """Whether a batch has labels that can be masked."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return isinstance(labels, Tensor) and not labels.is_floating_point()
