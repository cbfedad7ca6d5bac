"""Data without an end: read row by row, in an order that nothing but seed and stream decides."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rank_work
import torch
import yaml
from cases import worst
from gloo import on_ranks
from objective_rows import write_rows_of
from runs import llama_folder, read_lines, run_config, write_rows
from safetensors.torch import load_file
from torch import Tensor

from samestep.cli import main
from samestep.data import file_formats, stream_records
from samestep.data.rows import Row
from samestep.data.stream_records import StreamRecords
from samestep.data.streams import MixedStream, RowStream
from samestep.errors import ConfigError, DataError
from samestep.train.command import read_settings
from samestep.train.recipes.base import recipe_for
from samestep.train.run_data import load_data
from samestep.train.trainer import train
from samestep.utils.sources import DataSource

STREAM: dict[str, Any] = {
    "stream": True,
    "shuffle_buffer": 8,
    "precision": "float64",
    "optimizer": "sgd",
    "lr": 0.5,
    "batch_size": 5,
    "micro_batch": 3,
    "steps": 6,
    "lora_rank": None,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    llama_folder(folder / "tiny")
    write_rows(folder / "rows.jsonl", 22)
    write_rows(folder / "other.jsonl", 5, seed=1)
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks as small as the buffer."""
    monkeypatch.setattr(stream_records, "_LEAST", 1)


def run(folder: Path, out: str, **changes: Any) -> dict[str, Tensor]:
    train(run_config(folder, out=str(folder / out), **{**STREAM, **changes}))
    return load_file(folder / out / "model" / "model.safetensors")


def records_of(folder: Path, **changes: Any) -> StreamRecords:
    settings = run_config(folder, out=str(folder / "x"), **{**STREAM, **changes})
    found = load_data(recipe_for(settings))[1][0]
    assert isinstance(found, StreamRecords)
    return found


def learned(records: StreamRecords, steps: int, *, size: int = 5) -> list[int]:
    """The rows of some steps, by their number in the stream."""
    plans = zip(records.plans(batch_size=size, batch_tokens=None), range(steps), strict=False)
    return [records[at].sequences[0].row for plan, _ in plans for at in plan.examples]


@pytest.mark.usefixtures("small")
def test_the_order_is_shuffled_within_the_buffer_and_a_function_of_the_seed(folder: Path) -> None:
    rows = learned(records_of(folder), 11)
    assert [sorted(rows[at : at + 8]) for at in (0, 8, 16, 24)] == [
        list(range(at, at + 8)) for at in (0, 8, 16, 24)
    ]
    assert rows[:8] != sorted(rows[:8])
    assert learned(records_of(folder), 5, size=11) == rows
    assert learned(records_of(folder, seed=1), 11) != rows
    assert learned(records_of(folder, shuffle_buffer=1), 9) == [*range(45)]


@pytest.mark.usefixtures("small")
def test_the_window_is_bounded_whatever_was_read(folder: Path) -> None:
    records = records_of(folder)
    most = 0
    for plan, _ in zip(records.plans(batch_size=5, batch_tokens=None), range(60), strict=False):
        assert records.length_of(plan.examples[0]) > 0
        most = max(most, len(records.lengths))
    assert 8 <= most <= 3 * 8
    assert len(records) >= 300


@pytest.mark.usefixtures("small")
def test_batches_of_tokens_are_filled_in_order(folder: Path) -> None:
    records = records_of(folder)
    plans = records.plans(batch_size=None, batch_tokens=150)
    before = 0
    for plan, _ in zip(plans, range(9), strict=False):
        assert plan.examples[0] == before
        sizes = [records.length_of(at) for at in plan.examples]
        before = plan.examples[-1] + 1
        records._reach(before)
        assert sum(sizes) <= 150 < sum(sizes) + records.length_of(before)


@pytest.mark.usefixtures("small")
def test_streams_are_mixed_by_weight(folder: Path) -> None:
    sources = [
        DataSource(path=str(folder / "rows.jsonl"), weight=3),
        DataSource(path=str(folder / "other.jsonl"), weight=1),
    ]
    stream = MixedStream(sources)
    for number in (4, 8, 28, 4):
        rows = [row for row in stream.rows(number) if isinstance(row, Row)]
        assert sum(row.source for row in rows) == number // 4
    assert stream.place["taken"] == [33, 11]
    assert [place["pass"] for place in stream.place["places"]] == [1, 2]
    config = {**STREAM, "model": str(folder / "tiny"), "out": str(folder / "mixed"), "steps": 2}
    data = [{"path": each.path, "weight": each.weight, "stream": True} for each in sources]
    (folder / "mix.yaml").write_text(yaml.safe_dump({**config, "data": data, "stream": False}))
    assert train(read_settings([str(folder / "mix.yaml")]))["steps"] == 2


def test_no_split_and_no_rank_changes_the_weights_and_a_resumed_run_goes_on(
    folder: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(folder, "whole", save_every=1, keep=9, shuffle_buffer=4)
    split = run(folder, "split", micro_batch=1, padding="left", shuffle_buffer=4)
    assert worst(split, whole) < 1e-12
    other = run(folder, "order", shuffle_buffer=5)
    assert worst(other, whole) > 1e-6
    for step in (4, 5, 6):
        shutil.rmtree(folder / "whole" / "checkpoints" / f"step-{step:08d}")
    parsed = []
    real = file_formats._parse_line
    monkeypatch.setattr(
        file_formats, "_parse_line", lambda *given: parsed.append(given[1]) or real(*given)
    )
    resumed = run(folder, "whole", save_every=1, keep=9, shuffle_buffer=4, resume=True)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    # Those of the first step, to see what they are, and then those of the fourth step alone.
    assert parsed[:12] == [f"rows.jsonl:{at}" for at in (*range(1, 9), *range(13, 17))]


def test_two_ranks_and_one_learn_the_same_and_one_goes_on_from_two(folder: Path) -> None:
    there = {"steps": 3, "shuffle_buffer": 7, "save_every": 1, "keep": 9}
    whole = run(folder, "one", **there)
    two = {**STREAM, **there, "out": str(folder / "two")}
    on_ranks(2, rank_work.training, str(folder), **two)
    assert worst(load_file(folder / "two" / "model" / "model.safetensors"), whole) < 1e-12
    shutil.rmtree(folder / "two" / "checkpoints" / "step-00000003")
    assert worst(run(folder, "two", **there, resume=True), whole) < 1e-12


def _gz(folder: Path) -> str:
    path = folder / "rows.jsonl.gz"
    path.write_bytes(gzip.compress((folder / "rows.jsonl").read_bytes()))
    return str(path)


def _bom_and_blank_lines(folder: Path) -> str:
    path = folder / "spaced.jsonl"
    text = (folder / "rows.jsonl").read_bytes().replace(b"\n", b"\r\n\n")
    path.write_bytes(b"\xef\xbb\xbf" + text)
    return str(path)


def _parquet(folder: Path) -> str:
    rows = read_lines(folder / "rows.jsonl")
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=6)
    return str(folder / "rows.parquet")


def _several(folder: Path) -> str:
    lines = (folder / "rows.jsonl").read_text("utf-8").splitlines(keepends=True)
    (folder / "part").mkdir(exist_ok=True)
    (folder / "part" / "a.jsonl").write_text("".join(lines[:9]), "utf-8")
    (folder / "part" / "b.jsonl").write_text("".join(lines[9:]), "utf-8")
    return str(folder / "part")


def _saved(folder: Path) -> str:
    rows = datasets.Dataset.from_list(read_lines(folder / "rows.jsonl"))
    rows.save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


def _hub(folder: Path) -> str:
    return "owner/rows"


@pytest.mark.parametrize(
    "kind", [_gz, _bom_and_blank_lines, _parquet, _several, _saved, _hub], ids=lambda f: f.__name__
)
def test_every_kind_of_source_gives_its_rows_from_every_place(
    folder: Path, kind: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = read_lines(folder / "rows.jsonl")
    asked: list[Any] = []

    def load_dataset(*given: Any, **named: Any) -> Any:
        asked.append((given, named))
        return datasets.Dataset.from_list(wanted).to_iterable_dataset(num_shards=3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = "main" if kind is _hub else None
    source = DataSource(path=kind(folder), config=config)
    stream = RowStream(source)
    places, found = [], []
    for _ in range(2 * len(wanted) + 3):  # more than two passes
        places.append(json.dumps(stream.place))
        found.append(stream.next_row())
    values = [row.values for row in found if isinstance(row, Row)]
    assert values == [*wanted, *wanted, *wanted[:3]]
    for at in (0, 1, 5, 6, 9, 21, 22, 23, 40):
        again = RowStream(source)
        again.seek(json.loads(places[at]))
        assert [again.next_row() for _ in range(3)] == found[at : at + 3]
    if kind is _hub:
        assert asked[0] == (("owner/rows",), {"name": "main", "split": "train", "streaming": True})


def written(path: Path, *lines: str) -> str:
    path.write_text("".join(line + "\n" for line in lines), "utf-8")
    return str(path)


GOOD = '{"prompt": "a", "completion": "b"}'


@pytest.mark.usefixtures("small")
def test_bad_rows_are_named_wherever_they_are(folder: Path, tmp_path: Path) -> None:
    bad = written(tmp_path / "bad.jsonl", "{", *[GOOD] * 3, "[1]")
    with pytest.raises(DataError) as found:
        records_of(folder, data=bad)
    assert "bad.jsonl:1: not JSON" in str(found.value)
    assert "bad.jsonl:5: a row must be an object" in str(found.value)
    later = written(tmp_path / "later.jsonl", *[GOOD] * 17, '{"prompt": 3, "completion": "b"}')
    with pytest.raises(DataError, match=r"later.jsonl:18: "):
        run(folder, "bad", data=later, save_every=1)
    saved = sorted(path.name for path in (folder / "bad" / "checkpoints").iterdir())
    assert saved[-1] == "step-00000002"  # the next step needs the chunk with that row
    run(folder, "over", data=later, steps=3)  # which the last step does not
    empty = written(tmp_path / "empty.jsonl", "", " ")
    with pytest.raises(DataError, match=r"empty.jsonl: empty, it has no rows"):
        records_of(folder, data=empty)
    array = written(tmp_path / "array.jsonl", "[" + GOOD + "]")
    with pytest.raises(DataError, match="looks like a JSON array"):
        records_of(folder, data=array)
    table = written(tmp_path / "rows.csv", "prompt,completion", "a,b")
    with pytest.raises(DataError, match=r"rows.csv cannot be read row by row: JSON lines"):
        records_of(folder, data=table)
    with pytest.raises(DataError, match=r"gone.jsonl: no such file"):
        records_of(folder, data=str(tmp_path / "gone.jsonl"))


@pytest.mark.usefixtures("small")
def test_other_rows_are_noticed_by_a_resumed_run(folder: Path, tmp_path: Path) -> None:
    data = str(shutil.copy(folder / "rows.jsonl", tmp_path))
    run(folder, "changed", data=data, steps=4, save_every=3, keep=9)
    shutil.rmtree(folder / "changed" / "checkpoints" / "step-00000004")
    write_rows(Path(data), 22, seed=9)
    with pytest.raises(ConfigError, match="the rows of the stream are not those"):
        run(folder, "changed", data=data, steps=4, save_every=3, keep=9, resume=True)


def test_what_needs_a_length_is_refused_at_once(folder: Path) -> None:
    sources = (
        DataSource(path="a.jsonl", rows=3, stream=True),
        DataSource(path="b.jsonl", weight=1),
    )
    wrong = {"epochs": 2, "bitwise": True, "data": sources, "objective": "kto"}
    evaluated = DataSource(path="e.jsonl", stream=True)
    with pytest.raises(ConfigError) as found:
        run_config(folder, steps=None, eval_data=evaluated, **wrong)
    for part in (
        "stream: a stream has no end: set steps",
        "epochs: not with a stream",
        "bitwise: not with a stream",
        "objective kto needs all rows at once; these take a stream: causal_lm, dpo",
        "b.jsonl is none: all sources of data are, or none",
        "a.jsonl: rows: a stream takes a weight",
        "a.jsonl: of several streams each needs a weight",
        "eval_data: e.jsonl: a stream has no end",
    ):
        assert part in str(found.value)
    with pytest.raises(ConfigError, match="shuffle_buffer: 3 has no effect: no stream"):
        run_config(folder, shuffle_buffer=3)


@pytest.mark.usefixtures("small")
def test_pairs_are_streamed_and_a_dry_run_says_how(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = str(write_rows_of("dpo", folder / "pairs.jsonl", 9, seed=0))
    run(folder, "dpo", objective="dpo", data=pairs, steps=2)
    assert read_lines(folder / "dpo" / "log.jsonl")[1]["counts"]["pair"] == 5
    given = ["--model", str(folder / "tiny"), "--data", str(folder / "rows.jsonl"), "--out", "x"]
    flags = ["--stream", "--shuffle-buffer", "30", "--steps", "50", "--batch-size", "4"]
    assert main(["train", *given, *flags, "--dry-run", "--no-measure"]) == 0
    said = capsys.readouterr().out
    assert "a stream: 30 rows at a time, shuffled by 30; above are the first" in said
    assert "50 steps of 4 examples" in said
    assert max(map(len, said.splitlines())) <= 80
