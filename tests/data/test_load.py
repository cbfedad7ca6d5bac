import csv
import json

import pytest

from samestep.data.load import load_rows
from samestep.errors import DataError


def error_of(source, **keywords) -> str:
    with pytest.raises(DataError) as caught:
        load_rows(source, **keywords)
    return str(caught.value)


def test_jsonl_skips_blank_lines_and_counts_them(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "a"}\n\n  \r\n{"text": "b"}\r\n{"text": "c"}')
    assert [(r.values, r.origin) for r in load_rows(path)] == [
        ({"text": "a"}, "train.jsonl:1"),
        ({"text": "b"}, "train.jsonl:4"),
        ({"text": "c"}, "train.jsonl:5"),
    ]


def test_a_line_separator_inside_a_string_does_not_cut_the_line(tmp_path):
    path = tmp_path / "train.jsonl"
    value = {"text": "one\u2028two\u0085three"}
    path.write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [row.values for row in load_rows(str(path))] == [value]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "é"}'),
        ("a.json", '[{"text": "é"}]'),
        ("a.csv", "text\né\n"),
        ("A.JSONL", '{"text": "é"}'),
        ("lines.json", '{"text": "é"}\n{"text": "é"}\n'),
    ],
)
def test_byte_order_mark_is_accepted(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8-sig")
    assert load_rows(path)[0].values == {"text": "é"}


def test_csv_with_long_fields_and_line_breaks(tmp_path):
    path = tmp_path / "train.csv"
    limit = csv.field_size_limit()
    long = "x" * (limit + 1)
    path.write_text(f'prompt,completion\n"two\nlines",{long}\n\nb,"say ""hi"""\n')
    rows = load_rows(path)
    assert [row.origin for row in rows] == ["train.csv:2", "train.csv:5"]
    assert rows[0].values == {"prompt": "two\nlines", "completion": long}
    assert rows[1].values["completion"] == 'say "hi"'
    assert csv.field_size_limit() == limit


def test_csv_problems_name_the_line(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text('a,b\n1,2,3\n1\n"open,2\n')
    message = error_of(path)
    assert "train.csv:2: 3 fields, but the header has 2" in message
    assert "train.csv:3: 1 fields" in message
    assert "train.csv:4: not CSV" in message
    path.write_text("a,a\n1,2\n")
    assert "train.csv:1: the header names a twice" in error_of(path)


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    values = [{"messages": [{"role": "user", "content": "a"}]}, {"messages": []}]
    pq.write_table(pa.Table.from_pylist(values), tmp_path / "train.parquet")
    rows = load_rows(tmp_path / "train.parquet")
    assert [row.values for row in rows] == values
    assert rows[1].origin == "train.parquet row 2"
    (tmp_path / "train.parquet").write_bytes(b"no parquet")
    assert "train.parquet: not a Parquet file" in error_of(tmp_path / "train.parquet")


def test_folder_is_read_in_order_without_subfolders(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"n": 2}\n')
    (tmp_path / "a.json").write_text('[{"n": 0}, {"n": 1}]')
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / ".hidden.jsonl").write_text("no json")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "c.jsonl").write_text('{"n": 3}\n')
    rows = load_rows(str(tmp_path))
    assert [row.values["n"] for row in rows] == [0, 1, 2]
    assert rows[1].origin == "a.json row 2"


def test_folder_without_data(tmp_path):
    assert "no data file in this folder (it is empty)" in error_of(tmp_path)
    (tmp_path / "README.md").write_text("")
    assert "it has README.md" in error_of(tmp_path)
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "dataset_info.json").write_text("{}")
    assert "written by save_to_disk, but damaged" in error_of(tmp_path)


def test_list_and_dataset_in_memory():
    import datasets

    values = [{"text": "a"}, {"text": "b"}]
    assert load_rows(values)[1].origin == "row 2"
    data = datasets.Dataset.from_list(values)
    assert [row.values for row in load_rows(data)] == values
    assert [row.values for row in load_rows(data.with_format("torch"))] == values
    assert "splits train, test" in error_of(datasets.DatasetDict({"train": data, "test": data}))
    assert "not a streamed one" in error_of(data.to_iterable_dataset())
    assert "no rows" in error_of([])
    assert "row 2: a row must be an object" in error_of([{"text": "a"}, "b"])
    assert "data of type int" in error_of(3)


def test_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    assert f"did you mean {tmp_path / 'train.jsonl'}?" in error_of(tmp_path / "trian.jsonl")
    assert "no such file" in error_of(str(tmp_path / "train.json"))
    assert "does not exist either" in error_of(tmp_path / "nowhere" / "train.jsonl")
    assert "did you mean" not in error_of(tmp_path / "zzz.csv")


def test_hub_name_that_cannot_be_loaded(monkeypatch, tmp_path):
    import datasets

    def load_dataset(name, *, split):
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "train-small").mkdir()
    message = error_of("corpus/train-smal", split="test")
    for part in (
        "'test'",
        "offline mode is on",
        "Couldn't reach 'corpus/train-smal'",
        "did you mean corpus/train-small?",
        "./data/train.jsonl",
    ):
        assert part in message


def test_hub_name(monkeypatch):
    import datasets

    data = datasets.Dataset.from_list([{"text": "a"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *, split: data)
    assert load_rows("owner/name", split="test")[0].origin == "owner/name[test] row 1"


def test_every_problem_at_once_but_at_most_ten(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text"\n[1]\n"caf\xe9"\n' + b"nope\n" * 20)
    lines = error_of(path).split("\n")
    assert lines[0].startswith("train.jsonl:2: not JSON: Expecting ':' delimiter at column")
    assert lines[1] == "train.jsonl:3: a row must be an object with named columns, found list [1]"
    assert lines[2].startswith("train.jsonl:4: not UTF-8: byte 0xe9")
    assert len(lines) == 11
    assert lines[-1] == "and 13 more"


def test_problems_of_whole_files(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n \n")
    (tmp_path / "b.csv").write_text("text\n")
    (tmp_path / "c.json").write_text('{"data": []}')
    (tmp_path / "d.json").write_text('[\n{"a": 1},\n{"a" 1}]')
    (tmp_path / "e.json").write_bytes(b'[\n{"a":\n "\xff"}]')
    (tmp_path / "f.csv").write_bytes(b"text\n\xff\n")
    message = error_of(tmp_path)
    assert f"{tmp_path / 'a.jsonl'}: empty" in message
    assert f"{tmp_path / 'b.csv'}: empty" in message
    assert "c.json: the top level must be a list of objects, found dict" in message
    assert "d.json:3: not JSON" in message
    assert "e.json:3: not UTF-8" in message
    assert "f.csv:2: not UTF-8" in message


def test_unknown_extension(tmp_path):
    (tmp_path / "train.txt").write_text("a")
    message = error_of(tmp_path / "train.txt")
    assert (
        "unknown extension '.txt'; accepted: .jsonl, .json, .ndjson, .csv, .tsv, .parquet"
        in message
    )
