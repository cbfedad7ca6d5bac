"""Rows with teacher top-k log-probabilities: the teacher's likeliest tokens at every target."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samestep.data.alignment import align_to_targets, check_target_count
from samestep.data.examples import Examples
from samestep.data.records import Records
from samestep.data.rows import Row, RowError

_COLUMNS = ("top_ids", "top_logps")
"""For each target the ids of k tokens, and their log-probabilities (natural logarithm)."""


def teacher_topk_records(
    rows: Sequence[Row], examples: Examples, *, max_length: int | None = None
) -> Records:
    """Put a teacher's top-k log-probabilities where the tokens stand that they predict.

    Args:
        rows: With ``top_ids`` and ``top_logps``: a list for each target (each token of the
            completion, the end-of-sequence token too), of k entries, as many in all rows.
        examples: What `samestep.data.tokenize.tokenize_rows` made of the rows.
        max_length: As for `tokenize_rows`.

    Returns:
        Records with the token fields ``top_ids`` and ``top_logps`` [tokens, k], int32 and float32.

    Raises:
        DataError: A row's lists are missing or malformed; lists every one.
    """
    kept = [rows[at] for at in examples.rows.tolist()]
    k = _read_k(kept)
    ids = torch.zeros(len(examples.ids), k, dtype=torch.int32)
    logps = torch.zeros(len(examples.ids), k, dtype=torch.float32)

    def read(row: Row, targets: int, truncated: bool) -> tuple[Tensor, Tensor]:
        return _top_k(row, k, targets=targets, truncated=truncated)

    align_to_targets(kept, examples, read=read, into=[ids, logps], max_length=max_length)
    return Records(examples, token_fields={"top_ids": ids, "top_logps": logps})


def _read_k(rows: Sequence[Row]) -> int:
    """How many tokens the first list that is one holds."""
    for row in rows:
        lists = row.values.get("top_ids")
        if isinstance(lists, list) and lists and isinstance(lists[0], list) and lists[0]:
            return len(lists[0])
    return 1


def _top_k(row: Row, k: int, *, targets: int, truncated: bool) -> tuple[Tensor, Tensor]:
    ids, logps = (_table(row, name, k=k) for name in _COLUMNS)
    if len(ids) != len(logps):
        raise RowError(f"top_ids has {len(ids)} lists, top_logps {len(logps)}")
    check_target_count(
        f"top_ids has {len(ids)} lists", len(ids), targets=targets, truncated=truncated
    )
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
    return torch.from_numpy(ids[:targets]).int(), torch.from_numpy(logps[:targets]).float()


def _table(row: Row, name: str, *, k: int) -> NDArray[np.float64]:
    try:
        table = np.asarray(row.values.get(name), dtype=np.float64)
    except (TypeError, ValueError):
        table = np.asarray(np.nan)
    if table.ndim != 2 or table.shape[1] != k or not np.isfinite(table).all():
        raise RowError(f"{name} must be a list for each target of {k} finite numbers")
    return table
