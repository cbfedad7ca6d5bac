"""Rows of every family with values that no one would write: named by row, never a traceback."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_tokenizer

from samestep.data.load import load_rows
from samestep.data.readers import images
from samestep.data.readers.classification import class_records, tag_records, value_records
from samestep.data.readers.latents import read_tensors
from samestep.data.readers.preference import pair_records, unpaired_records
from samestep.data.readers.question_answering import answer_records
from samestep.data.readers.rollouts import rollout_records, teacher_topk_records
from samestep.data.readers.texts import text_records
from samestep.data.rows import Row, RowError, map_rows, result_or_error
from samestep.data.tokenize import tokenize_rows
from samestep.errors import ConfigError, DataError
from samestep.train.watchdog import Watchdog
from samestep.utils.files import user_path

TOKENIZER = tiny_tokenizer(chat=True)
HUGE, HALF = 10**400, "half \ud83d of it"
Read = Callable[[list[Row]], Any]


def texts(rows: list[Row]) -> Any:
    return text_records(rows, TOKENIZER, columns=("prompt", "completion"))


def distilled(rows: list[Row]) -> Any:
    return teacher_topk_records(rows, tokenize_rows(rows, TOKENIZER))


def of(reader: Any) -> Read:
    return lambda rows: reader(rows, TOKENIZER)


MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
GOOD: dict[str, tuple[Read, list[dict[str, Any]]]] = {
    "class": (of(class_records), [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]),
    "chat class": (
        of(class_records),
        [{"messages": MESSAGES, "label": "x"}, {"messages": MESSAGES, "label": "y"}],
    ),
    "value": (of(value_records), [{"text": "a", "label": 1}, {"text": "b", "label": 2}]),
    "tags": (
        of(tag_records),
        [{"tokens": ["a"], "tags": ["x"]}, {"tokens": ["b"], "tags": ["y"]}],
    ),
    "answers": (
        of(answer_records),
        [
            {"question": "Q", "context": "C", "answers": {"text": ["C"], "answer_start": [0]}},
            {"question": "Q", "context": "C", "answers": None},
        ],
    ),
    "texts": (texts, [{"prompt": "a", "completion": "b"}] * 2),
    "causal": (of(tokenize_rows), [{"prompt": "a", "completion": "b"}] * 2),
    "turns": (of(tokenize_rows), [{"messages": MESSAGES}] * 2),
    "ids": (of(tokenize_rows), [{"input_ids": [4, 5, 6]}] * 2),
    "pairs": (of(pair_records), [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2),
    "unpaired": (
        of(unpaired_records),
        [{"prompt": "a", "completion": "b", "label": n} for n in (True, False)],
    ),
    "rollouts": (
        of(rollout_records),
        [{"prompt": "a", "completion": "b", "reward": n, "group": "g"} for n in (0, 1)],
    ),
    "top k": (
        distilled,
        [{"input_ids": [4, 5], "top_ids": [[5]], "top_logps": [[-1.0]]}] * 2,
    ),
}
"""Rows of every family that can be read."""

NEVER = [
    *(None, True, -1, HUGE, -HUGE, 1e308, float("nan"), "", "²", HALF, [], {}, [[]], [None], [{}]),
    *([HUGE], [HALF], ["a", 1], {"text": 3, "answer_start": "x"}, {"text": [HALF]}),
    *({"text": ["C"], "answer_start": [HUGE]}, {"text": "C", "answer_start": [0]}),
    *([{"role": "user", "content": HALF}], [{"role": HUGE}], [{"role": "user", "content": [3]}]),
    *([{"role": "assistant", "content": "x", "weight": HUGE}], [MESSAGES], b"bytes", (1, 2)),
    *([{"role": "user"}], [{"role": "assistant", "content": None, "tool_calls": 3}]),
]
"""Values that a column may hold, whatever it is for."""


@pytest.mark.parametrize("family", GOOD)
def test_any_value_in_any_column_is_read_or_named_by_its_row(family: str) -> None:
    read, good = GOOD[family]
    read([Row(values, f"rows.jsonl:{at}") for at, values in enumerate(good, 1)])
    columns = sorted({*good[0], "weight", "label", "tools", "group", "old_log_p", "margin"})
    for column in columns:
        for value in NEVER:
            rows = [Row(good[0], "rows.jsonl:1"), Row({**good[1], column: value}, "rows.jsonl:2")]
            try:
                read(rows)
            except DataError as error:
                # Of two rows alone a problem may also be one of both: no target, one class.
                assert str(error).strip(), (column, value)
            except ConfigError as error:
                assert "tokenizer" in str(error)


@pytest.mark.parametrize("family", ["class", "value", "tags", "answers", "texts", "causal"])
def test_half_of_a_surrogate_pair_is_named_with_its_place(family: str) -> None:
    read, good = GOOD[family]
    column = next(iter(good[0]))
    value = [HALF] if column == "tokens" else HALF
    rows = [Row(good[0], "rows.jsonl:1"), Row({**good[1], column: value}, "rows.jsonl:2")]
    with pytest.raises(DataError, match=r"rows.jsonl:2: character 5 .*is half of a surrogate pair"):
        read(rows)


def test_messages_that_a_template_cannot_take_are_named_in_classification() -> None:
    rows = [
        Row({"messages": messages, "label": label}, f"rows.jsonl:{label}")
        for label, messages in enumerate((MESSAGES, [3], [{"role": "user", "content": [3]}]))
    ]
    with pytest.raises(DataError, match=r"rows.jsonl:1: .*\nrows.jsonl:2: "):
        class_records(rows, TOKENIZER)
    with pytest.raises(ConfigError, match="no chat template"):
        class_records(rows, tiny_tokenizer(chat=False))


def test_answers_of_other_types_say_what_they_should_be() -> None:
    answers = {"text": ["C"], "answer_start": "0"}
    row = Row({"question": "Q", "context": "C", "answers": answers}, "r")
    with pytest.raises(DataError, match="answers must be an object with text, a list of texts"):
        answer_records([row], TOKENIZER)


def test_rewards_whose_squares_overflow_name_the_largest() -> None:
    read, good = GOOD["rollouts"]
    rows = [Row({**good[0], "reward": r}, f"r.jsonl:{at}") for at, r in enumerate((1.0, 1e300))]
    with pytest.raises(DataError, match=r"r.jsonl:1: reward 1e\+300 is too large"):
        read(rows)


def test_what_a_library_raises_on_a_row_is_an_error_of_the_row() -> None:
    def reader(row: Row) -> None:
        raise KeyError("tokens")

    with pytest.raises(DataError, match=r"a.jsonl:3: cannot be used \(KeyError: 'tokens'\)"):
        map_rows([Row({}, "a.jsonl:3")], reader)
    assert isinstance(result_or_error(reader, Row({}, "a.jsonl:3")), RowError)


@pytest.mark.parametrize("broken", [ConfigError("a setting"), MemoryError()])
def test_what_is_no_rows_fault_stays_what_it_is(broken: Exception) -> None:
    def reader(row: Row) -> None:
        raise broken

    with pytest.raises(type(broken)):
        map_rows([Row({}, "a.jsonl:3")], reader)


def test_a_broken_invariant_of_ours_is_no_rows_fault_and_one_of_a_library_is() -> None:
    with pytest.raises(AssertionError):
        map_rows([Row({}, "a.jsonl:3")], lambda _: Watchdog(1, None).begin("no phase", "here"))

    def reader(_: Row) -> None:
        raise AssertionError("Padding_idx must be within num_embeddings")

    with pytest.raises(DataError, match=r"a.jsonl:3: cannot be used \(AssertionError: Padding"):
        map_rows([Row({}, "a.jsonl:3")], reader)


@pytest.mark.parametrize("named", [3, "x.png", {"a": 1}])
def test_images_are_a_list(tmp_path: Path, named: Any) -> None:
    with pytest.raises(RowError, match="images must be a list of files, found"):
        images.image_messages({"messages": MESSAGES, "images": named}, tmp_path)


def test_the_home_of_nobody_is_a_name_like_others(tmp_path: Path) -> None:
    assert user_path("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
    with pytest.raises(DataError, match="no such file"):
        load_rows("~nobody-of-this-name/x.jsonl")
    part = {"type": "image", "image": "~nobody-of-this-name/x.png"}
    values = {"messages": [{"role": "user", "content": [part]}]}
    _, files = images.image_messages(values, tmp_path)
    with pytest.raises(RowError, match="no such file"):
        images._open_image(files[0])


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_damaged_latents_are_errors_of_their_row(tmp_path: Path, suffix: str) -> None:
    whole, broken = tmp_path / f"whole{suffix}", tmp_path / f"broken{suffix}"
    latents = np.ones((2, 3, 3), dtype=np.float32)
    if suffix == ".npz":
        np.savez_compressed(whole, latents=latents)
    else:
        from safetensors.numpy import save_file

        save_file({"latents": latents}, whole)
    content = whole.read_bytes()
    assert read_tensors(whole)["latents"].shape == (2, 3, 3)
    for at in range(len(content)):
        flipped = content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]
        for damaged in (content[:at], flipped):
            broken.write_bytes(damaged)
            try:
                read_tensors(broken)
            except RowError as error:
                assert "cannot be read" in str(error)


def test_archives_of_something_else_are_errors_of_their_row(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("latents.npy", b"no array")
    np.save(tmp_path / "b", np.ones(3))
    (tmp_path / "b.npy").rename(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", latents=np.array(["text"]))
    for name in "abc":
        with pytest.raises(RowError, match=rf"{name}.npz: cannot be read"):
            read_tensors(tmp_path / f"{name}.npz")


def test_numbers_of_hundreds_of_digits_are_read_from_files(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"text": "a", "label": HUGE}, {"text": "b", "label": 1}]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(DataError, match=r"rows.jsonl:1: label must be a finite number"):
        value_records(load_rows(file), TOKENIZER)
