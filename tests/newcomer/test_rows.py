"""Rows as other tools write them: read as they are meant, or refused with what to change."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import build_tokenizer, tiny_tokenizer

from samestep.data.examples import Example
from samestep.data.load import load_rows
from samestep.data.message_forms import normalize_messages
from samestep.data.readers.preference import pair_records
from samestep.data.rows import Row
from samestep.data.tokenize import tokenize_rows
from samestep.engine.targets import IGNORE
from samestep.errors import DataError

HERE = Path(__file__).parent


def learned(example: Example, tokenizer: Any) -> str:
    return str(tokenizer.decode(example.labels[example.labels != IGNORE]))


def read(name: str) -> list[str]:
    tokenizer = tiny_tokenizer(chat=True)
    return [learned(row, tokenizer) for row in tokenize_rows(load_rows(HERE / name), tokenizer)]


def test_conversations_of_sharegpt_are_read() -> None:
    texts = read("sharegpt.jsonl")
    assert texts[0] == "4<|im_end|>that is all<|im_end|>"
    assert len(texts) == 8


def test_contents_in_parts_of_text_are_read() -> None:
    assert read("parts.jsonl") == ["the answer<|im_end|>"] * 4


def test_roles_of_sharegpt_are_read_in_messages() -> None:
    assert read("role_human.jsonl") == ["b<|im_end|>"] * 3


@pytest.mark.parametrize("generation_tags", [False, True])
def test_the_roles_are_known_with_either_kind_of_template(generation_tags: bool) -> None:
    talk = [{"role": " Human", "content": "a"}, {"role": "GPT", "content": "b"}]
    tokenizer = tiny_tokenizer(chat=True, generation_tags=generation_tags)
    (example,) = tokenize_rows(load_rows([{"messages": talk}]), tokenizer)
    assert learned(example, tokenizer) == "b<|im_end|>"


def test_a_role_one_letter_off_is_refused_with_the_nearest() -> None:
    with pytest.raises(DataError) as refused:
        read("one_typo.jsonl")
    first, *_, last = str(refused.value).splitlines()
    assert first.startswith("one_typo.jsonl:1: messages[3] has the role 'asistant'")
    assert "user, assistant, asistant" in first
    assert "did you mean 'assistant'?" in first
    assert last.startswith("one_typo.jsonl:4")


@pytest.mark.parametrize("column", ["messages", "prompt", "completion", "chosen", "rejected"])
def test_roles_are_looked_at_in_every_column_of_messages(column: str) -> None:
    with pytest.raises(DataError, match=rf"row 1: {column}\[0\] has the role 'uesr'.*'user'"):
        load_rows([{column: [{"role": "uesr", "content": "a"}]}])


def with_tools() -> Any:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (HERE / "tool_template.jinja").read_text(encoding="utf-8")
    return tokenizer


def test_calls_of_tools_as_openai_writes_them_are_read() -> None:
    tokenizer = with_tools()
    examples = tokenize_rows(load_rows(HERE / "openai_tools.jsonl"), tokenizer)
    text = learned(examples[0], tokenizer)
    assert '{"name": "weather", "arguments": {"city": "Bern"}}' in text
    assert text.endswith("It is 12 C in Bern.<|im_end|>")


CALL = {"name": "weather", "arguments": '{"city": "Bern"}'}


@pytest.mark.parametrize(
    "turn",
    [
        {"content": None, "tool_calls": [{"type": "function", "function": CALL}]},
        {"tool_calls": [{"function": {**CALL, "arguments": {"city": "Bern"}}}]},
        {"content": "", "function_call": CALL},
    ],
)
def test_every_form_of_a_call_is_learned_alike(turn: dict[str, Any]) -> None:
    tokenizer = with_tools()
    talk = [{"role": "user", "content": "Weather?"}, {"role": "assistant", **turn}]
    (example,) = tokenize_rows(load_rows([{"messages": talk}]), tokenizer)
    call = '{"name": "weather", "arguments": {"city": "Bern"}}'
    assert learned(example, tokenizer) == f"<tool_call>\n{call}\n</tool_call><|im_end|>"


def test_a_call_in_a_conversation_of_sharegpt_is_learned() -> None:
    tokenizer = with_tools()
    turns = [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": {}})},
        {"from": "observation", "value": "12 C"},
        {"from": "gpt", "value": "12 C."},
    ]
    (example,) = tokenize_rows(load_rows([{"conversations": turns}]), tokenizer)
    text = learned(example, tokenizer)
    assert '"arguments": {}' in text
    assert text.endswith("12 C.<|im_end|>")


def test_arguments_that_are_no_json_are_refused_with_their_place() -> None:
    turn = {"role": "assistant", "tool_calls": [{"function": {**CALL, "arguments": "{city"}}]}
    with pytest.raises(DataError, match=r"messages\[0\]\.tool_calls\[0\]\.function\.arguments"):
        load_rows([{"messages": [turn]}])


def test_a_template_that_wants_arguments_as_text_gets_them() -> None:
    tokenizer = with_tools()
    as_text = "tc.function.arguments | tojson"
    assert as_text in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(as_text, "tc.function.arguments + ''")
    examples = tokenize_rows(load_rows(HERE / "openai_tools.jsonl"), tokenizer)
    assert '"arguments": {"city": "Bern"}}' in learned(examples[0], tokenizer)


def test_messages_that_are_plain_stay_the_same_object() -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 2}]
    row = Row({"messages": talk}, "row 1")
    assert normalize_messages(row) is row
    changed = normalize_messages(Row({"messages": [{"role": "gpt", "content": ["a", "b"]}]}, ""))
    assert changed.values == {"messages": [{"role": "assistant", "content": "ab"}]}
    assert normalize_messages(changed) is changed


def sides(rows: list[Row]) -> list[tuple[str, str]]:
    """What each pair shows: all of the chosen side, and what is learned of it."""
    tokenizer = tiny_tokenizer(chat=True)
    return [
        (
            str(tokenizer.decode(pair.sequences[0].input_ids)),
            learned(pair.sequences[0], tokenizer),
        )
        for pair in pair_records(rows, tokenizer)
    ]


def test_a_prompt_that_repeats_in_both_sides_is_used_once() -> None:
    for whole, answer in sides(load_rows(HERE / "pref_dup_prompt.jsonl")):
        assert whole.count("user") == 1
        assert answer.count("<|im_end|>") == 1


ASK = {"role": "user", "content": "What is 2+2?"}
FOUR, FIVE = ({"role": "assistant", "content": text} for text in ("4", "5"))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "What is 2+2?", "chosen": [ASK, FOUR], "rejected": [ASK, FIVE]},
        {"prompt": "What is 2+2?", "chosen": [FOUR], "rejected": [FIVE]},
        {"prompt": "What is 2+2?", "chosen": FOUR, "rejected": FIVE},
        {"prompt": [ASK], "chosen": [{**ASK, "tool_calls": None}, FOUR], "rejected": [ASK, FIVE]},
        {"chosen": [ASK, FOUR], "rejected": [ASK, FIVE], "messages": [ASK, FOUR]},
    ],
)
def test_every_form_of_a_pair_is_the_same_pair(row: dict[str, Any]) -> None:
    ((whole, answer),) = sides(load_rows([row]))
    assert whole.startswith("<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n4")
    assert whole.count("2+2") == 1
    assert answer == "4<|im_end|>"


def test_a_prompt_as_text_that_repeats_in_every_row_is_used_once() -> None:
    row = {"prompt": "How many? ", "chosen": "How many? Nine.", "rejected": "How many? Ten."}
    assert sides(load_rows([row])) == [("How many? Nine.<|im_end|>", "Nine.<|im_end|>")]
    other = {"prompt": "How many? ", "chosen": "How many? Nine.", "rejected": "Ten."}
    assert sides(load_rows([row, other]))[0][1] == "How many? Nine.<|im_end|>"


def test_a_completion_that_repeats_its_prompt_is_read_once() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    rows = load_rows([{"prompt": [ASK], "completion": [ASK, FOUR]}])
    (example,) = tokenize_rows(rows, tokenizer)
    assert str(tokenizer.decode(example.input_ids)).count("2+2") == 1


def test_a_side_that_only_calls_a_tool_is_not_empty() -> None:
    call = {"role": "assistant", "tool_calls": [{"function": CALL}]}
    row = {"prompt": [ASK], "chosen": [call], "rejected": [FIVE]}
    assert len(pair_records(load_rows([row]), with_tools())) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], "parts of image_url"),
        ({"parts": ["a"]}, "found dict"),
        (3, "found int"),
    ],
)
def test_a_content_that_is_no_text_is_refused_with_its_place(content: Any, said: str) -> None:
    rows = load_rows([{"messages": [{"role": "user", "content": content}, FOUR]}])
    with pytest.raises(DataError, match=rf"row 1: messages\[0\]\.content must be text, .*{said}"):
        tokenize_rows(rows, tiny_tokenizer(chat=True))
