"""Which positions of a batch are targets: decided once, for counting and for the loss.

The denominators (counted from the data before any forward) and the losses (summed
over the same positions) must agree to the last token, so both call this module.

How many targets and sequences there are decides the shapes of what follows. `samestep.data.collate`
writes both down on the CPU, as ``target_positions`` and ``spans``, so that no loss waits for a GPU
to find out; for a micro-batch without these fields they are computed here.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from samestep.engine.device_copy import data_of
from samestep.errors import ConfigError, StepError

IGNORE = -100
"""The label of a position that is not a target (the convention of PyTorch and transformers)."""


def shifted_targets(micro_batch: Mapping[str, Any]) -> Tensor:
    """The next token to predict at every position, or ``IGNORE``.

    Position i predicts token i + 1 of the same sequence. A label is therefore no
    target when it is ``IGNORE``, the first token of a sequence, the first token of a
    pack, or predicted from padding.

    Args:
        micro_batch: A micro-batch with ``labels`` [rows, length] (label i is token i itself,
            not shifted); optionally ``position_ids`` [rows, length], in which a 0 starts
            a new sequence (so that packs are cut), and ``attention_mask`` [rows, length],
            in which a 0 is padding.

    Returns:
        Targets [rows, length], int64.
    """
    labels: Tensor = micro_batch["labels"]
    following = labels[:, 1:]
    is_target = following != IGNORE
    if micro_batch.get("position_ids") is not None:
        is_target = is_target & (micro_batch["position_ids"][:, 1:] != 0)
    if micro_batch.get("attention_mask") is not None:
        mask = micro_batch["attention_mask"].bool()
        is_target = is_target & mask[:, :-1] & mask[:, 1:]
    targets = torch.full_like(labels, IGNORE)
    targets[:, :-1] = torch.where(is_target, following, IGNORE)
    return targets


def shifted_weights(micro_batch: Mapping[str, Any]) -> Tensor:
    """How much the next token counts as a target at every position.

    Args:
        micro_batch: As for `shifted_targets`; optionally ``token_weights`` [rows, length], in which
            number i is the weight of token i as a target.

    Returns:
        [rows, length], float64; 0 where there is no target.

    Raises:
        ConfigError: ``token_weights`` has another shape than the labels.
    """
    counts = (shifted_targets(micro_batch) != IGNORE).double()
    weights = micro_batch.get("token_weights")
    if weights is None:
        return counts
    if weights.shape != counts.shape:
        raise ConfigError(
            f"token_weights has shape {tuple(weights.shape)}, but labels {tuple(counts.shape)}"
        )
    counts[:, :-1] *= weights[:, 1:]
    return counts


def target_positions(micro_batch: Mapping[str, Any]) -> Tensor:
    """Where the targets of a micro-batch stand in its flattened rows.

    Args:
        micro_batch: As for `shifted_targets`; optionally ``target_positions``, which are returned
            as they are (`check_collated_positions` compares them with the labels).

    Returns:
        [targets], int64, ascending.
    """
    collated: Tensor | None = micro_batch.get("target_positions")
    return _nonignored_positions(shifted_targets(micro_batch)) if collated is None else collated


def class_positions(micro_batch: Mapping[str, Any], name: str) -> Tensor:
    """Where a field of classes says one, in its flattened rows.

    Args:
        micro_batch: With the field [rows, length], int64; ``IGNORE`` where there is no class.
        name: Of the field.

    Returns:
        [classes], int64, ascending. A GPU is not waited for where the data are known on the CPU.
    """
    classes, data = micro_batch["fields"][name], data_of(micro_batch)
    if data is micro_batch:
        return _nonignored_positions(classes)
    return positions_where(classes != IGNORE, int((data["fields"][name] != IGNORE).sum()))


def positions_where(mask: Tensor, number: int) -> Tensor:
    """Where a mask is true, for which a GPU is not waited for.

    Args:
        mask: Any shape.
        number: How often it is true.

    Returns:
        [number], int64, ascending.
    """
    return torch.nonzero_static(mask.flatten(), size=number).squeeze(1)


def select_targets(
    rows: Tensor, targets: Tensor, *, positions: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows at the targets, without all others.

    Args:
        rows: A vector for each position [..., width].
        targets: Of `shifted_targets`, [...].
        positions: Of `target_positions`, [targets]; None: they are looked up, which waits for a
            GPU.

    Returns:
        The rows [targets, width], their classes [targets], and the positions [targets].
    """
    positions = _nonignored_positions(targets) if positions is None else positions
    selected = rows.flatten(0, -2).index_select(0, positions)
    return selected, targets.flatten()[positions], positions


def _nonignored_positions(targets: Tensor) -> Tensor:
    """Where targets [...] stand when flattened: [targets], int64, ascending.

    Its length depends on the values: a GPU is waited for.
    """
    return (targets.flatten() != IGNORE).nonzero().squeeze(1)


def sequence_ids(micro_batch: Mapping[str, Any]) -> Tensor:
    """The number of the sequence that each position belongs to, counted over the micro-batch.

    Args:
        micro_batch: As for `shifted_targets`. Without ``position_ids`` each row is one sequence.
            With them, a row is a pack where a 0 starts a sequence; rows that also have an
            ``attention_mask`` are padded, one sequence each.

    Returns:
        Sequence numbers [rows, length], int64, from 0, in reading order.
    """
    labels: Tensor = micro_batch["labels"]
    if not _is_packed(micro_batch):
        rows = torch.arange(labels.shape[0], device=labels.device)
        return rows[:, None].expand_as(labels)
    starts = micro_batch["position_ids"] == 0
    # A row always starts a sequence, even one that continues elsewhere at position > 0.
    starts = starts.clone()
    starts[:, 0] = True
    ids: Tensor = starts.flatten().cumsum(0) - 1
    return ids.view_as(labels)


def num_sequences(micro_batch: Mapping[str, Any]) -> int:
    """How many sequences a micro-batch holds.

    Args:
        micro_batch: As for `sequence_ids`; optionally ``spans``, which are counted without
            looking at the positions.

    Returns:
        Their number, those without targets included.
    """
    if "spans" in micro_batch:
        return len(micro_batch["spans"])
    if micro_batch["labels"].numel() == 0:
        return 0
    if not _is_packed(micro_batch):
        return len(micro_batch["labels"])
    return int(sequence_ids(micro_batch).max()) + 1


def _is_packed(micro_batch: Mapping[str, Any]) -> bool:
    """Whether a row may hold several sequences, told apart by ``position_ids``."""
    return micro_batch.get("position_ids") is not None and micro_batch.get("attention_mask") is None


def sequence_spans(micro_batch: Mapping[str, Any]) -> list[tuple[int, slice]]:
    """Where each sequence stands: its row, and its positions there.

    Args:
        micro_batch: Optionally with ``spans``, which are returned as they are; or with
            ``cu_seq_lens_q``, the borders of one pack; or with ``attention_mask``; with
            ``input_ids`` alone each row is one sequence.

    Returns:
        (row, positions) of each sequence, in reading order.
    """
    if "spans" in micro_batch:
        collated: list[tuple[int, slice]] = micro_batch["spans"]
        return collated
    if "cu_seq_lens_q" in micro_batch:
        borders = micro_batch["cu_seq_lens_q"].tolist()
        return [(0, slice(start, stop)) for start, stop in itertools.pairwise(borders)]
    mask = micro_batch.get("attention_mask")
    if mask is None:
        rows, length = micro_batch["input_ids"].shape
        return [(row, slice(0, length)) for row in range(rows)]
    starts, lengths = mask.argmax(dim=1).tolist(), mask.sum(dim=1).tolist()
    return [
        (row, slice(start, start + length))
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]


def check_collated_positions(micro_batch: Mapping[str, Any]) -> None:
    """Compare ``target_positions`` and ``spans``, where a micro-batch has them, with its labels.

    Args:
        micro_batch: As for `target_positions` and `sequence_spans`.

    Raises:
        StepError: They differ: a loss would sum over other targets than are counted.
    """
    positions = micro_batch.get("target_positions")
    if positions is not None and not torch.equal(
        positions, _nonignored_positions(shifted_targets(micro_batch))
    ):
        raise StepError(
            f"target_positions names {len(positions)} positions, which are not those of the "
            "targets: labels, position_ids or attention_mask were changed after collating. Leave "
            "target_positions out of the micro-batch, or collate again"
        )
    spans = micro_batch.get("spans")
    if spans is not None and len(spans) != int(sequence_ids(micro_batch).max()) + 1:
        raise StepError(
            f"spans names {len(spans)} sequences, but the micro-batch holds another number: leave "
            "spans out of it, or collate again"
        )
