"""Files as users have them: several, compressed, separated by something else, of another form."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from runs import llama_folder

from samestep.data.load import load_rows
from samestep.errors import ConfigError, DataError
from samestep.train.command import read_settings
from samestep.train.run_data import read_only
from samestep.train.settings.base import finalize
from samestep.train.settings.language import CausalLMSettings

HERE = Path(__file__).parent


def write(path: Path, *texts: str) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def texts(source: Any, **settings: Any) -> list[str]:
    return [row.values["text"] for row in load_rows(source, **settings)]


NEEDED = ["--model", "m", "--out", "o"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--data", "a", "--data", "b"],
        ["--data", "a", *NEEDED, "--data=b"],
        ["--data=a", "--data=b"],
        ["--data", "a", "b"],
    ],
)
def test_data_that_is_given_several_times_is_all_read(flags: list[str]) -> None:
    needed = [] if "m" in flags else NEEDED
    assert read_settings([*flags, *needed]).data == ("a", "b")


def test_data_in_yaml_may_be_a_list_and_flags_replace_it(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text("model: m\nout: o\ndata: [a, b]\neval_data: [c]\n")
    settings = read_settings([str(run)])
    assert (settings.data, settings.eval_data) == (("a", "b"), "c")
    assert settings.saved()["data"] == ["a", "b"]
    again = finalize(CausalLMSettings(**settings.saved()))
    assert again.saved() == settings.saved()
    assert read_settings([str(run), "--data", "z"]).data == "z"


def test_a_flag_of_one_value_that_is_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--lr is given 2 times: 1, 2"):
        read_settings(["--data", "a", "--lr", "1", "--lr", "2", *NEEDED])


def test_several_files_are_read_in_order_and_reported(tmp_path: Path) -> None:
    one, two = write(tmp_path / "b.jsonl", "first"), write(tmp_path / "a.jsonl", "second", "third")
    assert texts([one, two]) == ["first", "second", "third"]
    model = llama_folder(tmp_path / "model")
    flags = ["--model", str(model), "--out", "unused", "--data", one, "--data", two, "--dry-run"]
    said = "".join("\n".join(read_only(read_settings(flags))).split())  # long paths are wrapped
    assert f"{one},{two}:3rowsoftext" in said


def test_the_problems_of_all_files_are_named_at_once(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": \n', encoding="utf-8")
    with pytest.raises(DataError) as refused:
        load_rows([str(bad), str(tmp_path / "missing.jsonl")])
    assert "bad.jsonl:1" in str(refused.value)
    assert "missing.jsonl: no such file" in str(refused.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.ndjson"])
def test_compressed_files_are_read(tmp_path: Path, name: str) -> None:
    content = {
        "a.jsonl": '{"text": "x"}\n',
        "a.ndjson": '{"text": "x"}\n',
        "a.json": '[{"text": "x"}]',
        "a.csv": "text,other\nx,y\n",
        "a.tsv": "text\tother\nx\ty, z\n",
    }[name]
    (tmp_path / name).write_text(content)
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + content.encode()))
    assert texts(str(tmp_path / name)) == texts(str(tmp_path / f"{name}.gz")) == ["x"]
    assert texts(str(tmp_path)) == ["x", "x"]


@pytest.mark.parametrize(
    "content", [b"no gzip", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-12]]
)
def test_compressed_files_that_are_damaged_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: cannot be read"):
        load_rows(str(tmp_path / "a.jsonl.gz"))


def test_patterns_are_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl"):
        write(tmp_path / name, name)
    assert texts(f"{tmp_path}/*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert texts(f"{tmp_path}/**/*.jsonl") == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
    with pytest.raises(DataError, match="no file matches this pattern"):
        load_rows(f"{tmp_path}/*.csv")
    odd = write(tmp_path / "odd[1].jsonl", "a name, no pattern")
    assert texts(odd) == ["a name, no pattern"]


def test_what_a_folder_holds_beside_its_files_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "more").mkdir()
    write(tmp_path / "more" / "b.jsonl", "b")
    with pytest.raises(DataError, match=r"it has more/.*Subfolders are not read"):
        load_rows(str(tmp_path))
    write(tmp_path / "a.jsonl", "a")
    (tmp_path / "notes.txt").write_text("x")
    assert texts(str(tmp_path)) == ["a"]
    assert "not read: more/, notes.txt" in caplog.text


def test_folders_of_save_to_disk_are_read(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list([{"text": "x"}, {"text": "y"}])
    data.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "dict")
    assert texts(str(tmp_path / "plain")) == ["x", "y"]
    assert texts(str(tmp_path / "dict")) == ["x", "y"]
    assert texts(str(tmp_path / "dict"), split="test") == ["y"]
    with pytest.raises(DataError, match="splits train, test and no 'dev'"):
        load_rows(str(tmp_path / "dict"), split="dev")


@pytest.mark.parametrize("separator", [";", "|", "\t"])
def test_values_that_are_separated_otherwise_are_read_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, separator: str
) -> None:
    rows = (HERE / "semicolon.csv").read_text(encoding="utf-8").replace(";", separator)
    (tmp_path / "a.csv").write_text(rows, encoding="utf-8")
    loaded = load_rows(tmp_path / "a.csv")
    assert loaded[4].values["completion"] == "apple, banana, cherry"
    assert f"separated by {separator!r}" in caplog.text


def test_one_column_with_a_semicolon_in_its_text_stays_one_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\na;b\n")
    assert texts(tmp_path / "a.csv") == ["a;b"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '[{"text": "a"}, {"text": "b"}]', "looks like a JSON array"),
        ("a.jsonl", '[\n  {"text": "a"},\n  {"text": "b"}\n]\n', "looks like a JSON array"),
        ("a.jsonl", '{\n  "text": "a"\n}\n{\n  "text": "b"\n}\n', "looks like pretty-printed JSON"),
        ("a.json", '{\n  "text": "a"\n}\n{\n  "text": "b"\n}\n', "looks like pretty-printed JSON"),
        ("a.jsonl", '{"text": "a",\n "other": 1}\n{"text": "b",\n "other": 1}', "pretty-printed"),
        ("a.json", '{"version": 1, "data": [{"text": "a"}]}', "the rows seem to be its 'data'"),
        ("a.jsonl", "prompt,completion\n" * 50, "none of its 50 lines"),
    ],
)
def test_what_is_wrong_with_a_whole_file_is_said_once(
    tmp_path: Path, name: str, content: str, said: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as refused:
        load_rows(tmp_path / name)
    assert said in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 2


def test_a_first_line_that_is_broken_is_named_as_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\n{"text": "b"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1: not JSON"):
        load_rows(tmp_path / "a.jsonl")
