"""Rollouts: completions that a policy wrote, with their rewards or advantages."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from samestep.data.alignment import align_to_targets, check_target_count
from samestep.data.examples import Examples
from samestep.data.records import Records
from samestep.data.rows import Row, RowError, map_rows, read_number
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
    dropped: Counter[str] = Counter()
    kept = list(range(len(rows)))
    if baseline != "given":
        groups = [_group_key(row.values) for row in rows]
        sizes = Counter(groups)
        kept = [at for at, group in enumerate(groups) if sizes[group] > 1]
        if len(kept) < len(rows):
            dropped["alone in its group"] = len(rows) - len(kept)
        values = advantages_of(values, groups, baseline=baseline)
    if not kept:
        raise DataError("every row is alone in its group, so that no reward compares with another")
    examples = tokenize_rows(
        [rows[at] for at in kept],
        tokenizer,
        max_length=max_length,
        append_eos=append_eos,
        cache=cache,
    )
    dropped.update(examples.dropped)
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
    return json.dumps(values.get("prompt") if group is None else group, sort_keys=True)


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
    if not all(math.isfinite(number) for number in value):
        raise RowError(f"{column} has a number that is not finite")
    return value
