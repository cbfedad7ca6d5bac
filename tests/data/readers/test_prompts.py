"""Prompts up to where a completion begins, and what a reward function reads of their rows."""

from typing import Any

import pytest
from tiny import build_tokenizer, tiny_tokenizer

from samestep.data.readers.prompts import ROWS, prompt_records
from samestep.data.rows import Row
from samestep.errors import ConfigError, DataError


def rows_of(*values: dict[str, Any]) -> list[Row]:
    return [Row(each, f"rows.jsonl:{at}") for at, each in enumerate(values, 1)]


@pytest.mark.parametrize("add", ["", "bos", "bos eos"])
def test_a_text_ends_where_its_completion_begins(add: str) -> None:
    tokenizer = build_tokenizer(add=add)
    records = prompt_records(rows_of({"prompt": "How many forks?", "answer": 3}), tokenizer)
    ids = records[0].sequences[0].input_ids.tolist()
    plain = build_tokenizer()("How many forks?").input_ids
    assert ids == ([0] if add else []) + plain
    assert records.meta[ROWS][0].columns == {"answer": 3}


def test_messages_end_with_the_header_of_the_answer() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    messages = [{"role": "user", "content": "How many?"}]
    records = prompt_records(rows_of({"prompt": messages, "tools": [{"name": "f"}]}), tokenizer)
    text = tokenizer.apply_chat_template(
        messages, tools=[{"name": "f"}], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(records[0].sequences[0].input_ids) == text
    assert text.endswith("<|im_start|>assistant\n")


def test_the_fingerprint_counts_what_rewards_read() -> None:
    tokenizer = tiny_tokenizer()
    one, same, other = (
        prompt_records(rows_of({"prompt": "How many?", "answer": answer}), tokenizer).fingerprint()
        for answer in (3, 3, 4)
    )
    assert one == same != other


def test_rows_are_left_out_by_weight_and_named_where_they_are_wrong() -> None:
    tokenizer = tiny_tokenizer()
    kept = prompt_records(
        rows_of({"prompt": "a", "weight": 0}, {"prompt": "b", "weight": "2"}), tokenizer
    )
    assert kept.first_rows() == [1]
    assert kept[0].sequences[0].weight == 2
    assert kept.dropped == {"weight 0": 1}
    bad = rows_of({"prompt": ""}, {"prompt": 3}, {"answer": 1}, {"prompt": [{"content": "x"}]})
    with pytest.raises(DataError) as caught:
        prompt_records(bad, tiny_tokenizer(chat=True))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("rows.jsonl:1: prompt is empty")
    assert lines[1] == "rows.jsonl:2: prompt must be text or a list of messages, found int"
    assert lines[2] == "rows.jsonl:3: has no prompt (columns: answer)"
    assert lines[3].startswith("rows.jsonl:4: prompt[0] has no role")
    with pytest.raises(DataError, match=r"no row is left to complete \(1 of weight 0\)|weight 0"):
        prompt_records(rows_of({"prompt": "a", "weight": 0}), tokenizer)
    with pytest.raises(ConfigError, match="no chat template"):
        prompt_records(rows_of({"prompt": [{"role": "user", "content": "a"}]}), tokenizer)
