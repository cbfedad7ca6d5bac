"""Completions with numbers beside them: rollouts with rewards, and a teacher's top k."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samestep.data.examples import Examples
from samestep.data.records import Records
from samestep.data.rows import Row, RowError, RowTally, map_rows, read_number, tally_missing
from samestep.data.token_fields import align_to_targets, check_target_count
from samestep.data.tokenize import tokenize_rows
from samestep.errors import DataError

_COLUMNS = (
    "prompt and completion (both text or both lists of messages), or input_ids and labels; and "
    "reward, a number (with group, what compares with what: by default the prompt), or advantage; "
    "each row may add old_log_p, a number for each target, and weight"
)

Baseline = Literal["grpo", "dr_grpo", "rloo", "given"]


def rollout_records(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    baseline: Baseline = "grpo",
    max_length: int | None = None,
    append_eos: bool = True,
    cache: Path | None = None,
) -> Records:
    """Tokenise rollouts, and compare each reward with its group.

    The groups are those of the whole data set, so that an advantage depends neither on the batch
    nor on the micro-batch that a member runs in.

    Args:
        rows: At least one, with ``prompt`` and ``completion``, or ``input_ids`` and ``labels``;
            and ``reward`` (with ``group``: by default the prompt) or ``advantage``. Each may add
            ``old_log_p``, the old policy's log-likelihood of each target in nats, and ``weight``.
        tokenizer: As for `samestep.data.tokenize.tokenize_rows`.
        baseline: How rewards become advantages, see `advantages_of`; "given" reads ``advantage``.
        max_length: As for `tokenize_rows`.
        append_eos: As for `tokenize_rows`.
        cache: As for `tokenize_rows`.

    Returns:
        Records with the field ``advantage`` [records], float64, and the token field ``old_log_p``
        [tokens] if the rows have it. Members of groups of one are dropped and counted.

    Raises:
        DataError: Rows are malformed (lists every one), or none is left.
    """
    column = "advantage" if baseline == "given" else "reward"
    values = map_rows(
        rows,
        lambda row: read_number(row.values, column),
        hint=f"accepted columns: {_COLUMNS}",
    )
    dropped = RowTally()
    kept = list(range(len(rows)))
    if baseline != "given":
        groups = map_rows(rows, lambda row: _group_key(row.values))
        sizes = Counter(groups)
        kept = [at for at, group in enumerate(groups) if sizes[group] > 1]
        dropped = tally_missing("alone in its group", kept, total=len(rows))
        try:
            values = advantages_of(values, groups, baseline=baseline)
        except OverflowError:
            largest = max(range(len(rows)), key=lambda at: abs(values[at]))
            raise DataError(
                f"{rows[largest].origin}: reward {values[largest]:g} is too large: its square, "
                "or a sum over its group, is no finite number"
            ) from None
    if not kept:
        raise DataError("every row is alone in its group, so that no reward compares with another")
    examples = tokenize_rows(
        [rows[at] for at in kept],
        tokenizer,
        max_length=max_length,
        append_eos=append_eos,
        cache=cache,
    )
    dropped.add_all(examples.dropped, kept)
    cut = RowTally()
    if examples.cut is not None:
        cut.add_all(examples.cut, kept)
    chosen = [kept[row] for row in examples.rows.tolist()]
    token_fields = {}
    if any(rows[at].values.get("old_log_p") is not None for at in chosen):
        token_fields["old_log_p"] = _old_log_p(
            [rows[at] for at in chosen], examples, max_length=max_length
        )
    return Records(
        examples,
        fields={"advantage": torch.tensor([values[at] for at in chosen], dtype=torch.float64)},
        token_fields=token_fields,
        dropped=dropped,
        cut=cut,
    )


def advantages_of(
    rewards: Sequence[float], groups: Sequence[str], *, baseline: Baseline
) -> list[float]:
    """Rewards compared with their groups.

    Args:
        rewards: One a row.
        groups: Which group each row belongs to.
        baseline: "grpo": (r - mean) / (standard deviation + 1e-4), arXiv:2402.03300; "dr_grpo":
            r - mean, arXiv:2503.20783; "rloo": r - mean of the others, arXiv:2402.14740.

    Returns:
        One a row; of a group of one, 0.
    """
    members: dict[str, list[float]] = {}
    for reward, group in zip(rewards, groups, strict=True):
        members.setdefault(group, []).append(reward)
    advantages = []
    for reward, group in zip(rewards, groups, strict=True):
        values, size = members[group], len(members[group])
        mean = math.fsum(values) / size
        scale = 1.0
        if size > 1 and baseline == "grpo":
            variance = math.fsum((value - mean) ** 2 for value in values) / (size - 1)
            scale = 1 / (math.sqrt(variance) + 1e-4)
        if size > 1 and baseline == "rloo":
            scale = size / (size - 1)
        advantages.append((reward - mean) * scale)
    return advantages


def _group_key(values: Mapping[str, Any]) -> str:
    group = values.get("group")
    return json.dumps(values.get("prompt") if group is None else group, default=repr)


def _old_log_p(rows: Sequence[Row], examples: Examples, *, max_length: int | None) -> Tensor:
    """The old log-likelihoods where their tokens stand [tokens], float64."""

    def read(row: Row, targets: int, truncated: bool) -> list[Tensor]:
        old = _finite_numbers(row.values.get("old_log_p"), "old_log_p")
        description = f"old_log_p has {len(old)} numbers"
        check_target_count(description, len(old), targets=targets, truncated=truncated)
        return [torch.tensor(old[:targets], dtype=torch.float64)]

    values = torch.zeros(len(examples.ids), dtype=torch.float64)
    align_to_targets(rows, examples, read=read, into=[values], max_length=max_length)
    return values


def _finite_numbers(value: Any, column: str) -> list[float]:
    if not isinstance(value, list) or not all(isinstance(each, int | float) for each in value):
        raise RowError(f"{column} must be a list of numbers, found {value!r}")
    try:
        numbers = [float(number) for number in value]
    except OverflowError:
        numbers = [math.inf]
    if not all(map(math.isfinite, numbers)):
        raise RowError(f"{column} has a number that is not finite")
    return numbers


_TOPK_HINT = ("top_ids", "top_logps")
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
    ids, logps = (_table(row, name, k=k) for name in _TOPK_HINT)
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
    except (TypeError, ValueError, OverflowError):
        table = np.asarray(np.nan)
    if table.ndim != 2 or table.shape[1] != k or not np.isfinite(table).all():
        raise RowError(f"{name} must be a list for each target of {k} finite numbers")
    return table
