"""Rows with what a teacher said: where it is put, and what is refused."""

from typing import Any

import pytest
from tiny import tiny_tokenizer

from samestep.data.collate import collate_records
from samestep.data.load import load_rows
from samestep.data.readers.rollouts import teacher_topk_records
from samestep.data.records import Records
from samestep.data.tokenize import tokenize_rows
from samestep.errors import DataError

GOOD: dict[str, Any] = {
    "input_ids": [5, 6, 7, 8],
    "labels": [-100, -100, 7, 8],
    "top_ids": [[7, 9], [8, 10]],
    "top_logps": [[-0.5, -2.0], [-0.25, -3.0]],
}


def read(*rows: dict[str, Any], max_length: int | None = None) -> Records:
    loaded = load_rows(list(rows))
    examples = tokenize_rows(loaded, tiny_tokenizer(), max_length=max_length)
    return teacher_topk_records(loaded, examples, max_length=max_length)


def test_it_stands_at_the_tokens_that_it_predicts() -> None:
    second = {
        **GOOD,
        "labels": [-100, 6, 7, 8],
        "top_ids": [[1, 2]] * 3,
        "top_logps": [[-1, -2]] * 3,
    }
    micro = collate_records(list(read(GOOD, second)), padding="right")
    assert micro["fields"]["top_ids"][0].tolist() == [[0, 0], [0, 0], [7, 9], [8, 10]]
    assert micro["fields"]["top_ids"][1, 1:].tolist() == [[1, 2]] * 3
    assert micro["fields"]["top_logps"][0, 3].tolist() == [-0.25, -3.0]


def test_what_is_cut_off_is_left_out() -> None:
    assert read(GOOD, max_length=3).token_fields["top_ids"].tolist()[-1] == [7, 9]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_ids": None}, "top_ids must be a list for each target of 2 finite numbers"),
        ({"top_logps": [[-0.5, -2.0], [-0.5]]}, "top_logps must be a list for each target"),
        ({"top_logps": [[-0.5, float("nan")]] * 2}, "of 2 finite numbers"),
        ({"top_ids": [[7, 9]]}, "top_ids has 1 lists, top_logps 2"),
        ({"top_ids": [[7, 9]], "top_logps": [[-1, -2]]}, "top_ids has 1 lists for 2 targets"),
        ({"top_ids": [[7, 9], [8, 8]]}, r"top_ids\[1\] must hold different token ids"),
        ({"top_ids": [[7, 9], [8, -1]]}, r"top_ids\[1\] must hold different token ids"),
        ({"top_logps": [[-0.5, -2.0], [3.0, 1.0]]}, "log probabilities over the whole vocabulary"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match="row 2: .*" + message):
        read(GOOD, {**GOOD, **changes})
