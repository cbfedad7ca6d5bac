from typing import Any

import pytest
from tiny import tiny_tokenizer

from samestep.data.readers.rollouts import advantages_of, rollout_records
from samestep.data.rows import Row
from samestep.errors import DataError

A = {"prompt": "How many? ", "completion": "Nine.", "reward": 1.0}
B = {"prompt": "How many? ", "completion": "Ten!", "reward": 0}
C = {"prompt": "Why? ", "completion": "Because.", "reward": 5}


def rows(*values: dict[str, Any]) -> list[Row]:
    return [Row(value, f"rows.jsonl:{number}") for number, value in enumerate(values, 1)]


def test_rewards_are_compared_within_their_group() -> None:
    rewards, groups = [1.0, 0.0, 2.0, 7.0], ["a", "a", "a", "b"]
    assert advantages_of(rewards, groups, baseline="dr_grpo") == [0.0, -1.0, 1.0, 0.0]
    assert advantages_of(rewards, groups, baseline="rloo") == [0.0, -1.5, 1.5, 0.0]
    assert advantages_of(rewards, groups, baseline="grpo") == pytest.approx([0, -1, 1, 0], abs=2e-4)


def test_a_row_alone_in_its_group_is_dropped_and_counted() -> None:
    records = rollout_records(rows(A, C, B), tiny_tokenizer(), baseline="dr_grpo")
    assert records.fields["advantage"].tolist() == [0.5, -0.5]
    assert records.dropped == {"alone in its group": 1}
    together = [{**row, "group": 1} for row in (A, C, B)]
    assert len(rollout_records(rows(*together), tiny_tokenizer())) == 3


def test_old_log_likelihoods_stand_at_their_tokens() -> None:
    ids, labels = [5, 6, 7, 8], [-100, -100, 7, 8]
    row = {"input_ids": ids, "labels": labels, "reward": 1, "group": "g", "old_log_p": [-1.5, -2]}
    records = rollout_records(rows(row, {**row, "reward": 2}), tiny_tokenizer())
    assert records[0].token_fields["old_log_p"][0].tolist() == [0, 0, -1.5, -2]
    cut = rollout_records(rows(row, row), tiny_tokenizer(), max_length=3)
    assert cut[0].token_fields["old_log_p"][0].tolist() == [0, 0, -1.5]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([A, {**B, "reward": None}], r"rows\.jsonl:2: reward must be a finite number, found None"),
        ([A, C], "every row is alone in its group"),
        ([A, {**B, "old_log_p": [-1.0]}], r"rows\.jsonl:1: old_log_p must be a list"),
        ([{**A, "old_log_p": [-1.0]}] * 2, r"rows\.jsonl:1: old_log_p has 1 numbers for \d+ targ"),
        ([{**A, "old_log_p": [float("nan")]}] * 2, "not finite"),
    ],
)
def test_unusable_rollouts_are_refused(values: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        rollout_records(rows(*values), tiny_tokenizer())


def test_given_advantages_need_no_group() -> None:
    records = rollout_records(rows({**C, "advantage": -2}), tiny_tokenizer(), baseline="given")
    assert records.fields["advantage"].tolist() == [-2.0]
