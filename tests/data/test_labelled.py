from typing import Any

import pytest
from tiny import tiny_tokenizer

from samestep.data.labelled import answer_records, class_records, tag_records, value_records
from samestep.data.load import Row
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


CONTEXT = "She hid 90 treats; her friends found 40 treats."


def answer(text: str) -> dict[str, Any]:
    answers = {"text": [text], "answer_start": [CONTEXT.index(text)]}
    return {"question": "How many treats?", "context": CONTEXT, "answers": answers}


def test_answers_are_found_in_the_tokens() -> None:
    none = {**answer("90"), "answers": {"text": [], "answer_start": []}}
    records = answer_records(rows(answer("40 treats"), none), tiny_tokenizer())
    start, end = (int(records.fields[name][0]) for name in ("start", "end"))
    text = tiny_tokenizer().decode(records[0].sequences[0].input_ids[start : end + 1])
    assert text.strip() == "40 treats"
    assert records.fields["start"].tolist()[1] == 0


def test_answers_cut_off_are_dropped_and_misplaced_ones_named() -> None:
    records = answer_records(rows(answer("90"), answer("40")), tiny_tokenizer(), max_length=24)
    assert records.dropped == {"the answer is cut off": 1}
    wrong = {**answer("90"), "answers": {"text": ["90"], "answer_start": [0]}}
    with pytest.raises(DataError, match="'90' does not stand at character 0"):
        answer_records(rows(wrong), tiny_tokenizer())
