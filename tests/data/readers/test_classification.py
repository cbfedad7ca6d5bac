from typing import Any

import pytest
from tiny import tiny_tokenizer

from samestep.data.readers.classification import class_records, value_records
from samestep.data.rows import Row
from samestep.errors import DataError


def rows(*values: dict[str, Any]) -> list[Row]:
    return [Row(value, f"rows.jsonl:{number}") for number, value in enumerate(values, 1)]


def test_classes_by_name_and_by_number() -> None:
    named = class_records(
        rows({"text": "a", "label": "no"}, {"text": "b", "label": "yes", "weight": 2}),
        tiny_tokenizer(),
    )
    assert named.meta["classes"] == ["no", "yes"]
    assert named.fields["class"].tolist() == [0, 1]
    assert [one.weight for one in named.sequences] == [1.0, 2.0]
    numbered = class_records(
        rows({"text": "a", "label": 3}, {"text": "b", "label": True}), tiny_tokenizer()
    )
    assert numbered.meta["classes"] == ["0", "1", "2", "3"]
    assert numbered.fields["class"].tolist() == [3, 1]


def test_a_conversation_may_be_classified() -> None:
    messages = [{"role": "user", "content": "How many?"}]
    given = rows({"messages": messages, "label": 0}, {"messages": messages, "label": 1})
    text = tiny_tokenizer(chat=True).decode(
        class_records(given, tiny_tokenizer(chat=True))[0].sequences[0].input_ids
    )
    assert text == "<|im_start|>user\nHow many?<|im_end|>\n"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([{"text": "a", "label": "c"}], "rows.jsonl:1: label 'c' is none of the classes a, b"),
        ([{"text": "a"}], "rows.jsonl:1: has no label"),
        ([{"label": "a"}], "rows.jsonl:1: has no text and no messages"),
        ([{"text": "a", "label": -1}], "rows.jsonl:1: label must be at least 0"),
        ([{"text": "a", "label": 0.5}], "must be the name or the number of a class"),
    ],
)
def test_labels_that_are_no_classes(values: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        class_records(rows(*values), tiny_tokenizer(), classes=["a", "b"])


def test_one_class_is_nothing_to_learn() -> None:
    with pytest.raises(DataError, match="every row has the class 'a'"):
        class_records(rows({"text": "a", "label": "a"}), tiny_tokenizer())


@pytest.mark.parametrize("label", ["many", float("nan"), True, None])
def test_numbers_must_be_numbers(label: Any) -> None:
    assert value_records(rows({"text": "a", "label": "1.5"}), tiny_tokenizer()).fields[
        "value"
    ].tolist() == [1.5]
    with pytest.raises(DataError, match=r"rows\.jsonl:2"):
        value_records(
            rows({"text": "a", "label": 1}, {"text": "a", "label": label}), tiny_tokenizer()
        )
