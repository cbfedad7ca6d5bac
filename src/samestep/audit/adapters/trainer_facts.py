"""What a trainer's own batches say: which axes have a meaning, targets, how ranks are dealt."""

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate.data_loader import BatchSamplerShard
from torch import Tensor
from torch.utils.data import BatchSampler, SequentialSampler

from samestep.audit.adapters.altered import has_class_labels, rows_of
from samestep.audit.subject import Facts
from samestep.engine.targets import IGNORE
from samestep.errors import CheckError


def skipped(batch: Any, rows_an_example: int, *, stream: bool) -> dict[str, str]:
    """The axes that these data cannot be run on, and why.

    Args:
        batch: The trainer's own, of two examples.
        rows_an_example: Rows of its data that make an example.
        stream: Whether the data have no length.

    Raises:
        CheckError: The batch is no mapping.
    """
    if not isinstance(batch, Mapping):
        raise CheckError(f"batches of this trainer are a {type(batch).__name__}, not a mapping")
    reasons = {}
    rows = rows_of(batch)
    if rows is None or rows % (2 * rows_an_example):
        reasons["padding"] = reasons["zero-target"] = (
            "the collator does not give each example a row of its own"
        )
    if not isinstance(batch.get("input_ids"), Tensor):
        reasons["padding"] = "batches have no 'input_ids' [rows, length]"
    if not has_class_labels(batch):
        reasons["zero-target"] = "batches have no integer 'labels' to mask"
    if stream:
        reasons["short-window"] = "the training data are a stream, which has no last window"
        reasons["ranks"] = "the training data are a stream, which each rank cuts in its own way"
    return reasons


def facts_of_labels(batches: Sequence[Any], *, shifts: bool) -> list[Facts] | None:
    """What each example's own batch says; None unless all are mappings with tensor ``labels``.

    Args:
        batches: One for each example.
        shifts: Whether the model predicts the next token.
    """
    found = []
    for batch in batches:
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(labels, Tensor):
            return None
        valid = labels != IGNORE
        shifted = valid[..., 1:] if shifts and labels.dim() > 1 else valid
        ids = batch.get("input_ids")
        tokens = ids.numel() if isinstance(ids, Tensor) else labels.numel()
        found.append(Facts(int(shifted.sum()), int(valid.sum()), tokens))
    return found


def dealt_by_loader(examples: int, world: int, *, even: bool) -> list[tuple[int, ...]]:
    """How accelerate's data loader deals one micro-batch to each rank.

    Args:
        examples: Of the effective batch.
        world: Number of ranks.
        even: Whether it repeats examples to give each rank as many.
    """
    size = -(-examples // world)
    batches = BatchSampler(SequentialSampler(range(examples)), size, drop_last=False)
    return [
        tuple(next(iter(BatchSamplerShard(batches, world, rank, even_batches=even))))
        for rank in range(world)
    ]
