"""Rollouts: completions that a policy wrote, with what they were worth."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from samestep.data.alignment import align_to_targets, check_number
from samestep.data.examples import Examples
from samestep.data.records import Records
from samestep.data.rows import Row, RowError, raise_all
from samestep.data.tokenize import tokenize_rows
from samestep.errors import DataError

COLUMNS = (
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
        rows: At least one, with the columns of ``COLUMNS``.
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
    worth = _numbers(rows, column)
    dropped: Counter[str] = Counter()
    kept = list(range(len(rows)))
    if baseline != "given":
        groups = [_group(row.values) for row in rows]
        sizes = Counter(groups)
        kept = [at for at, group in enumerate(groups) if sizes[group] > 1]
        if len(kept) < len(rows):
            dropped["alone in its group"] = len(rows) - len(kept)
        worth = advantages_of(worth, groups, baseline)
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
    given = [rows[at].values.get("old_log_p") for at in chosen]
    token_fields = {}
    if any(one is not None for one in given):
        token_fields["old_log_p"] = _placed([rows[at] for at in chosen], examples, max_length)
    return Records(
        examples,
        fields={"advantage": torch.tensor([worth[at] for at in chosen], dtype=torch.float64)},
        token_fields=token_fields,
        dropped=dropped,
    )


def advantages_of(
    rewards: Sequence[float], groups: Sequence[str], baseline: Baseline
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
    found = []
    for reward, group in zip(rewards, groups, strict=True):
        values, size = members[group], len(members[group])
        mean = math.fsum(values) / size
        scale = 1.0
        if size > 1 and baseline == "grpo":
            variance = math.fsum((value - mean) ** 2 for value in values) / (size - 1)
            scale = 1 / (math.sqrt(variance) + 1e-4)
        if size > 1 and baseline == "rloo":
            scale = size / (size - 1)
        found.append((reward - mean) * scale)
    return found


def _numbers(rows: Sequence[Row], column: str) -> list[float]:
    problems, numbers = [], []
    for row in rows:
        try:
            number = float(row.values.get(column, math.nan))
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            found = row.values.get(column)
            problems.append(f"{row.origin}: {column} must be a finite number, found {found!r}")
        numbers.append(number)
    raise_all(problems, hint=f"accepted columns: {COLUMNS}")
    return numbers


def _group(values: Mapping[str, Any]) -> str:
    group = values.get("group")
    return json.dumps(values.get("prompt") if group is None else group, sort_keys=True)


def _placed(rows: Sequence[Row], examples: Examples, max_length: int | None) -> Tensor:
    """The old log likelihoods at the places of their tokens [tokens]."""

    def read(row: Row, targets: int, cut: bool) -> list[Tensor]:
        old = _floats(row.values.get("old_log_p"))
        check_number(f"old_log_p has {len(old)} numbers", len(old), targets, cut=cut)
        return [torch.tensor(old[:targets], dtype=torch.float64)]

    values = torch.zeros(len(examples.ids), dtype=torch.float64)
    align_to_targets(rows, examples, read, [values], max_length=max_length)
    return values


def _floats(given: Any) -> list[float]:
    if not isinstance(given, list) or not all(isinstance(one, int | float) for one in given):
        raise RowError(f"old_log_p must be a list of numbers, found {given!r}")
    if not all(math.isfinite(one) for one in given):
        raise RowError("old_log_p has a number that is not finite")
    return given
