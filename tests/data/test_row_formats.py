"""The table of row formats, and converters: recognised by columns, or named by a reference."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_tokenizer

from samestep.data.load import load_rows
from samestep.data.readers.latents import latent_records
from samestep.data.readers.preference import pair_records
from samestep.data.row_converters import convert_rows, resolve_row_format
from samestep.data.row_formats import ROW_FORMATS, RowFormat, document_formats, recognize_format
from samestep.data.rows import Row, RowError
from samestep.data.tokenize import tokenize_rows
from samestep.engine.targets import IGNORE
from samestep.errors import ConfigError, DataError

TALK = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Nine."}]
ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "token ids": ({"input_ids": [5, 6, 7], "labels": [IGNORE, 6, IGNORE]}, ""),
    "messages": ({"messages": TALK}, "Nine.<|im_end|>"),
    "prompt and completion": ({"prompt": "How? ", "completion": "So."}, "So.<|im_end|>"),
    "prompt and completion turns": (
        {"prompt": TALK[:1], "completion": TALK[1:]},
        "Nine.<|im_end|>",
    ),
    "text": ({"text": "Nine."}, "Nine.<|im_end|>"),
    "ShareGPT": (
        {
            "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "Nine."}],
            "system": "Short.",
        },
        "Nine.<|im_end|>",
    ),
    "Alpaca": ({"instruction": "How?", "input": "b", "output": "So."}, "So.<|im_end|>"),
}
"""A row of each format, and the text that is learned of it."""

PREFERENCES: dict[str, dict[str, Any]] = {
    "HH": {
        "chosen": "\n\nHuman: How?\n\nAssistant: So.",
        "rejected": "\n\nHuman: How?\n\nAssistant: No.",
    },
    "OpenAI preferences": {
        "input": {"messages": [{"role": "user", "content": "How?"}], "tools": []},
        "preferred_output": [{"role": "assistant", "content": "So."}],
        "non_preferred_output": [{"role": "assistant", "content": "No."}],
    },
}
"""A row of each format of preferences, which say: after "How?" rather "So." than "No."."""


def question_format(**settings: Any) -> RowFormat:
    """A format that is converted, recognised by its columns."""

    def convert(columns: dict[str, Any]) -> dict[str, Any]:
        if not columns["question"]:
            raise ValueError("the question is empty")
        return {"prompt": columns["question"], "completion": columns["answer"]}

    return RowFormat(name="questions", columns=("question", "answer"), convert=convert, **settings)


def test_every_format_has_a_row_here() -> None:
    assert {*ROWS, *PREFERENCES} == set(ROW_FORMATS)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_recognised_and_learned(name: str) -> None:
    columns, learned = ROWS[name]
    assert recognize_format(columns) is ROW_FORMATS[name]
    tokenizer = tiny_tokenizer(chat=True)
    (example,) = tokenize_rows(load_rows([columns]), tokenizer)
    targets = example.labels[example.labels != IGNORE]
    if learned:
        assert tokenizer.decode(targets) == learned
    else:
        assert targets.tolist() == [6]


@pytest.mark.parametrize("name", ROW_FORMATS)
def test_a_format_reads_no_columns_but_its_own(name: str) -> None:
    row_format = ROW_FORMATS[name]
    columns = PREFERENCES[name] if name in PREFERENCES else ROWS[name][0]
    assert columns.keys() <= {*row_format.columns, *row_format.optional}
    for missing in row_format.columns:
        assert recognize_format({**columns, missing: None}) is not row_format


@pytest.mark.parametrize("name", PREFERENCES)
def test_a_row_of_preferences_is_recognised_and_learned(name: str) -> None:
    assert recognize_format(PREFERENCES[name]) is ROW_FORMATS[name]
    tokenizer = tiny_tokenizer(chat=True)
    (pair,) = pair_records(load_rows([PREFERENCES[name]]), tokenizer)
    whole = [tokenizer.decode(side.input_ids) for side in pair.sequences]
    learned = [tokenizer.decode(side.labels[side.labels != IGNORE]) for side in pair.sequences]
    assert learned == ["So.<|im_end|>", "No.<|im_end|>"]
    assert [text.count("How?") for text in whole] == [1, 1]


def test_the_docs_have_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "train.md"
    assert document_formats() in page.read_text(encoding="utf-8")


def test_a_converted_format_of_the_table_is_recognised_row_by_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(ROW_FORMATS, "questions", question_format())
    values = [
        {"question": "How? ", "answer": "So.", "weight": 2},
        {"prompt": "Why? ", "completion": "Because."},
        {"text": 3, "label": "a class"},
    ]
    first, second, third = load_rows(values)
    assert first == Row({"prompt": "How? ", "completion": "So.", "weight": 2}, "row 1")
    assert (second.values, third.values) == (values[1], values[2])
    assert len(tokenize_rows([Row(values[0], "a"), second], tiny_tokenizer())) == 2
    with pytest.raises(DataError, match="row 2: the question is empty"):
        load_rows([values[0], {"question": "", "answer": "So."}])
    assert resolve_row_format("questions").name == "questions"
    with pytest.raises(ConfigError, match="there is no 'question'; did you mean 'questions'"):
        resolve_row_format("question")


def test_columns_of_known_formats_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROW_FORMATS, "questions", question_format())
    row = {"question": "a", "answer": "b", "text": "c"}
    assert load_rows([row])[0].values == row


def test_all_problems_of_a_converter_are_shown() -> None:
    def convert(columns: dict[str, Any]) -> Any:
        kind = columns["kind"]
        if kind == "refused":
            raise RowError("refused")
        if kind == "value":
            return {"text": columns["texts"][0]} if columns["texts"] else int("x")
        return [kind]

    values = [{"kind": "refused"}, {"kind": "value", "texts": []}, {"kind": "value"}, {"kind": "a"}]
    with pytest.raises(DataError) as raised:
        load_rows(values, row_format=convert)
    assert str(raised.value).split("\n") == [
        "row 1: refused",
        "row 2: invalid literal for int() with base 10: 'x'",
        "row 3: convert fails: KeyError: 'texts'",
        "row 4: convert must return columns by name, not list",
    ]


def test_a_converter_cannot_change_the_row() -> None:
    row = Row({"text": "a", "weight": 2}, "row 1")
    (converted,) = convert_rows(
        [row], resolve_row_format(lambda columns: {"text": columns.pop("text")})
    )
    assert row.values == {"text": "a", "weight": 2} == converted.values
    weightless = resolve_row_format(lambda columns: {"text": "a", "weight": 3})
    assert convert_rows([row], weightless)[0].values["weight"] == 3


FILE = """
from samestep.data import RowFormat

number = 3

def plain(columns):
    return {"text": columns["body"]}

class Made:
    def __call__(self, columns):
        return {"text": columns["body"] + "!"}

class Needs:
    def __init__(self, prefix):
        self.prefix = prefix

declared = RowFormat(name="bodies", convert=plain)
"""


@pytest.mark.parametrize(("name", "text"), [("plain", "Hi"), ("Made", "Hi!"), ("declared", "Hi")])
def test_references(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "formats.py").write_text(FILE, encoding="utf-8")
    rows = load_rows([{"body": "Hi"}], row_format=f"{tmp_path / 'formats.py'}:{name}")
    assert rows == [Row({"text": text}, "row 1")]


def test_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_formats.py").write_text(FILE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_rows([{"body": "Hi"}], row_format="my_formats:plain")[0].values == {"text": "Hi"}


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (
            "{0}/formats.py:plian",
            "row_format: .*formats.py (defines|has) no 'plian'; did you mean 'plain'",
        ),
        ("{0}/format.py:plain", "row_format: there is no file"),
        ("no_such_module:plain", "row_format: there is no module 'no_such_module'"),
        ("{0}/formats.py:number", "is int; it must be a function"),
        ("{0}/formats.py:Needs", "must take no arguments"),
        ("messages", "'messages' are recognised by their columns .*: leave row_format out"),
        ("mesages", "row_format: there is no 'mesages'. Accepted: .*file.py:name"),
    ],
)
def test_references_that_name_nothing(tmp_path: Path, reference: str, message: str) -> None:
    (tmp_path / "formats.py").write_text(FILE, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_rows([{"body": "Hi"}], row_format=reference.format(tmp_path))


def test_rows_that_name_latents_are_converted_too(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", latents=np.ones((3, 4), dtype=np.float32))
    (tmp_path / "rows.jsonl").write_text('{"path": "a.npz"}\n', encoding="utf-8")

    def convert(columns: dict[str, Any]) -> dict[str, Any]:
        return {"file": columns["path"]}

    records = latent_records(str(tmp_path / "rows.jsonl"), row_format=convert)
    assert [file.path.name for file in records.files] == ["a.npz"]
    with pytest.raises(ConfigError, match="is a folder of latents, not of rows"):
        latent_records(str(tmp_path), row_format=convert)


def test_a_format_that_does_not_convert_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no convert"):
        resolve_row_format(ROW_FORMATS["text"])
    with pytest.raises(ConfigError, match="needs either tokenize or convert"):
        RowFormat(name="nothing")
