"""Which positions of a batch are targets: decided once, for counting and for the loss.

The denominators (counted from the data before any forward) and the losses (summed
over the same positions) must agree to the last token, so both call this module.

How many targets and sequences there are decides the shapes of what follows. `samestep.data.collate`
writes them down on the CPU (``target_positions``, ``spans``), so that no loss has to wait for a GPU
to tell; where a micro-batch does not say, it is asked.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from samestep.errors import ConfigError, StepError

IGNORE = -100
"""The label of a position that is not a target (the convention of PyTorch and transformers)."""


def shifted_targets(micro: Mapping[str, Any]) -> Tensor:
    """The next token to predict at every position, or ``IGNORE``.

    Position i predicts token i + 1 of the same sequence. A label is therefore no
    target when it is ``IGNORE``, the first token of a sequence, the first token of a
    pack, or predicted from padding.

    Args:
        micro: A micro-batch with ``labels`` [rows, length] (label i is token i itself,
            not shifted); optionally ``position_ids`` [rows, length], in which a 0 starts
            a new sequence (so that packs are cut), and ``attention_mask`` [rows, length],
            in which a 0 is padding.

    Returns:
        Targets [rows, length], int64.
    """
    labels: Tensor = micro["labels"]
    following = labels[:, 1:]
    is_target = following != IGNORE
    if micro.get("position_ids") is not None:
        is_target = is_target & (micro["position_ids"][:, 1:] != 0)
    if micro.get("attention_mask") is not None:
        mask = micro["attention_mask"].bool()
        is_target = is_target & mask[:, :-1] & mask[:, 1:]
    targets = torch.full_like(labels, IGNORE)
    targets[:, :-1] = torch.where(is_target, following, IGNORE)
    return targets


def shifted_weights(micro: Mapping[str, Any]) -> Tensor:
    """How much the next token counts as a target at every position.

    Args:
        micro: As for `shifted_targets`; optionally ``token_weights`` [rows, length], in which
            number i is that of token i as a target.

    Returns:
        [rows, length], float64; 0 where there is no target.
    """
    is_target = (shifted_targets(micro) != IGNORE).double()
    weights = micro.get("token_weights")
    if weights is None:
        return is_target
    if weights.shape != is_target.shape:
        raise ConfigError(
            f"token_weights has shape {tuple(weights.shape)}, but labels {tuple(is_target.shape)}"
        )
    is_target[:, :-1] *= weights[:, 1:]
    return is_target


def positions_of(targets: Tensor) -> Tensor:
    """Where the targets stand in the flattened ``targets`` [...]: [targets] int64, ascending.

    Its length depends on the values: a GPU is waited for.
    """
    return (targets.flatten() != IGNORE).nonzero().squeeze(1)


def at_targets(
    rows: Tensor, targets: Tensor, positions: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What belongs to the targets, and nothing else.

    Args:
        rows: A vector for each position [..., width].
        targets: As `shifted_targets` gives them, [...].
        positions: As `positions_of` gives them, where they are known; None: they are looked for.

    Returns:
        The rows [targets, width], the classes [targets], and the positions [targets].
    """
    positions = positions_of(targets) if positions is None else positions
    chosen = rows.flatten(0, -2).index_select(0, positions)
    return chosen, targets.flatten()[positions], positions


def target_positions(micro: Mapping[str, Any]) -> Tensor:
    """Where the targets of a micro-batch stand in its flattened rows.

    Args:
        micro: As for `shifted_targets`; optionally ``target_positions``, which are taken as they
            are (`check_known` compares them with the labels).

    Returns:
        [targets], int64, ascending.
    """
    known: Tensor | None = micro.get("target_positions")
    return positions_of(shifted_targets(micro)) if known is None else known


def number_of_sequences(micro: Mapping[str, Any]) -> int:
    """How many sequences a micro-batch holds: from its layout, else from its positions."""
    if "spans" in micro:
        return len(micro["spans"])
    if micro["labels"].numel() == 0:
        return 0
    if micro.get("position_ids") is None or micro.get("attention_mask") is not None:
        return len(micro["labels"])
    return int(sequence_ids(micro).max()) + 1


def check_known(micro: Mapping[str, Any]) -> None:
    """Compare what a micro-batch says of its layout with its labels.

    Raises:
        StepError: It says otherwise: a loss would sum over other targets than are counted.
    """
    known = micro.get("target_positions")
    if known is not None and not torch.equal(known, positions_of(shifted_targets(micro))):
        raise StepError(
            f"target_positions names {len(known)} positions, which are not those of the targets: "
            "labels, position_ids or attention_mask were changed after collating. Leave "
            "target_positions out of the micro-batch, or collate again"
        )
    if "spans" in micro and len(micro["spans"]) != int(sequence_ids(micro).max()) + 1:
        raise StepError(
            f"spans names {len(micro['spans'])} sequences, but the micro-batch holds another "
            "number: leave spans out of it, or collate again"
        )


def sequence_ids(micro: Mapping[str, Any]) -> Tensor:
    """The number of the sequence that each position belongs to, counted over the micro-batch.

    Args:
        micro: As for `shifted_targets`. Without ``position_ids`` each row is one sequence.
            With them, a row is a pack where a 0 starts a sequence; rows that also have an
            ``attention_mask`` are padded, one sequence each.

    Returns:
        Sequence numbers [rows, length], int64, from 0, in reading order.
    """
    labels: Tensor = micro["labels"]
    rows = torch.arange(labels.shape[0], device=labels.device)[:, None].expand_as(labels)
    if micro.get("position_ids") is None or micro.get("attention_mask") is not None:
        return rows
    starts = micro["position_ids"] == 0
    # A row always starts a sequence, even one that continues elsewhere at position > 0.
    starts = starts.clone()
    starts[:, 0] = True
    ids: Tensor = starts.flatten().cumsum(0) - 1
    return ids.view_as(labels)


def spans(micro: Mapping[str, Any]) -> list[tuple[int, slice]]:
    """Where each sequence stands: its row, and its positions there.

    Args:
        micro: A micro-batch of `samestep.data.collate.collate`, which says so itself
            (``spans``); with ``input_ids`` alone each row is one sequence.

    Returns:
        A place for each sequence, in reading order.
    """
    if "spans" in micro:
        known: list[tuple[int, slice]] = micro["spans"]
        return known
    if "cu_seq_lens_q" in micro:
        borders = micro["cu_seq_lens_q"].tolist()
        return [(0, slice(a, b)) for a, b in itertools.pairwise(borders)]
    mask = micro.get("attention_mask")
    if mask is None:
        rows, length = micro["input_ids"].shape
        return [(row, slice(0, length)) for row in range(rows)]
    starts, lengths = mask.argmax(dim=1).tolist(), mask.sum(dim=1).tolist()
    return [(i, slice(a, a + n)) for i, (a, n) in enumerate(zip(starts, lengths, strict=True))]
