from typing import Any

import pytest
from tiny import tiny_tokenizer

from samestep.data.readers.question_answering import answer_records
from samestep.data.rows import Row
from samestep.errors import DataError


def rows(*values: dict[str, Any]) -> list[Row]:
    return [Row(value, f"rows.jsonl:{number}") for number, value in enumerate(values, 1)]


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
