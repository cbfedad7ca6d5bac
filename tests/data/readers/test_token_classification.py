from typing import Any

import pytest
from tiny import tiny_tokenizer

from samestep.data.readers.classification import tag_records
from samestep.data.rows import Row
from samestep.errors import DataError


def rows(*values: dict[str, Any]) -> list[Row]:
    return [Row(value, f"rows.jsonl:{number}") for number, value in enumerate(values, 1)]


def test_the_first_token_of_a_word_carries_its_tag() -> None:
    words = ["475", "treats", "the"]
    tagged = tag_records(rows({"tokens": words, "tags": ["n", "w", None]}), tiny_tokenizer())
    labels = tagged.token_fields["classes"].tolist()
    assert [label for label in labels if label != -100] == [0, 1]
    assert len(labels) == len(tagged[0].sequences[0].input_ids) > 2
    assert tagged[0].token_fields["classes"][0].tolist() == labels


def test_rows_without_tags_are_dropped_and_malformed_ones_named() -> None:
    good = {"tokens": ["a", "b"], "tags": [0, 1]}
    none = {"tokens": ["a"], "tags": [-100]}
    assert tag_records(rows(good, none), tiny_tokenizer()).dropped == {"no tag left": 1}
    with pytest.raises(DataError, match=r"rows\.jsonl:2: 2 tokens but 1 tags"):
        tag_records(rows(good, {**good, "tags": [1]}), tiny_tokenizer())
    with pytest.raises(DataError, match=r"rows\.jsonl:1: tag '1' is none of the classes 0"):
        tag_records(rows(good), tiny_tokenizer(), classes=["0"])
