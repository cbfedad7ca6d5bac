"""Rows with what a teacher said of them before: its likeliest tokens at every target."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samestep.data.alignment import align_to_targets, check_number
from samestep.data.examples import Examples
from samestep.data.records import Records
from samestep.data.rows import Row, RowError

NAMES = ("top_ids", "top_logps")
"""The columns: for each target the k tokens, and their log probabilities."""


def teacher_topk_records(
    rows: Sequence[Row], examples: Examples, *, max_length: int | None = None
) -> Records:
    """Put a teacher's predictions at the places of the tokens that they predict.

    Args:
        rows: With the columns ``NAMES``: a list for each target (each token of the completion, the
            end-of-sequence token too), in which as many tokens for all targets of all rows.
        examples: What `samestep.data.tokenize.tokenize_rows` made of the rows.
        max_length: As for `tokenize_rows`.

    Returns:
        Records with the token fields ``NAMES`` [tokens, k], int32 and float32.

    Raises:
        DataError: A row's lists are missing or malformed; lists every one.
    """
    kept = [rows[at] for at in examples.rows.tolist()]
    width = _width(kept)
    tops = torch.zeros(len(examples.ids), width, dtype=torch.int32)
    logps = torch.zeros(len(examples.ids), width, dtype=torch.float32)

    def read(row: Row, targets: int, cut: bool) -> tuple[Tensor, Tensor]:
        return _tops(row, width, targets, cut=cut)

    align_to_targets(kept, examples, read, [tops, logps], max_length=max_length)
    return Records(examples, token_fields={"top_ids": tops, "top_logps": logps})


def _width(rows: Sequence[Row]) -> int:
    """How many tokens the first list that is one holds."""
    for row in rows:
        given = row.values.get("top_ids")
        if isinstance(given, list) and given and isinstance(given[0], list) and given[0]:
            return len(given[0])
    return 1


def _tops(row: Row, width: int, targets: int, *, cut: bool) -> tuple[Tensor, Tensor]:
    ids, logps = (_table(row, name, width) for name in NAMES)
    if len(ids) != len(logps):
        raise RowError(f"top_ids has {len(ids)} lists, top_logps {len(logps)}")
    check_number(f"top_ids has {len(ids)} lists", len(ids), targets, cut=cut)
    wrong = np.flatnonzero((ids != np.round(ids)).any(1) | (ids < 0).any(1))
    wrong = wrong if len(wrong) else np.flatnonzero((np.diff(np.sort(ids, 1), axis=1) == 0).any(1))
    if len(wrong):
        raise RowError(f"top_ids[{wrong[0]}] must hold different token ids")
    mass = np.exp(logps).sum(1)
    wrong = np.flatnonzero((logps > 1e-3).any(1) | (mass > 1 + 1e-3))
    if len(wrong):
        raise RowError(
            f"top_logps[{wrong[0]}] adds up to a probability of {mass[wrong[0]]:.4g}: give log "
            "probabilities over the whole vocabulary, not logits"
        )
    chosen = slice(0, targets)
    return torch.from_numpy(ids[chosen]).int(), torch.from_numpy(logps[chosen]).float()


def _table(row: Row, name: str, width: int) -> NDArray[np.float64]:
    try:
        table = np.asarray(row.values.get(name), dtype=np.float64)
    except (TypeError, ValueError):
        table = np.asarray(np.nan)
    if table.ndim != 2 or table.shape[1] != width or not np.isfinite(table).all():
        raise RowError(f"{name} must be a list for each target of {width} finite numbers")
    return table
