"""Several sources: mixed by weight or rows, with names of columns, splits and URLs of their own."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from runs import llama_folder, read_lines, run_config, write_rows
from safetensors.torch import load_file

from samestep.data.batching import num_steps, plan_steps
from samestep.data.load import load_rows
from samestep.data.mixing import Mix, mix_of
from samestep.errors import ConfigError, DataError
from samestep.train import trainer
from samestep.train.command import check_paths, read_settings
from samestep.train.run_data import read_only
from samestep.train.trainer import train
from samestep.utils.sources import DataSource


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixing")
    llama_folder(path / "tiny")
    write_rows(path / "a.jsonl", 12)
    write_rows(path / "b.jsonl", 5, seed=1)
    rows = [json.loads(line) for line in (path / "b.jsonl").read_text("utf-8").splitlines()]
    renamed = [{"q": row["prompt"], "a": row["completion"]} for row in rows]
    text = "".join(json.dumps(row) + "\n" for row in renamed)
    (path / "renamed.jsonl").write_text(text, encoding="utf-8")
    return path


def sources(**shares: Any) -> list[DataSource]:
    return [DataSource(path=name, **values) for name, values in shares.items()]


def test_an_epoch_takes_each_source_by_its_weight_and_goes_through_all_of_its_rows() -> None:
    mix = mix_of(sources(a={"weight": 3}, b={"weight": 1}), [60, 8])
    assert mix == Mix((60, 8), (24, 8))
    epochs = [mix.epoch(seed=7, epoch=epoch) for epoch in range(5)]
    for epoch in epochs:
        assert sorted(at for at in epoch if at >= 60) == list(range(60, 68))
        assert len(epoch) == 32
    taken = Counter(int(at) for epoch in epochs for at in epoch if at < 60)
    assert taken == Counter(range(60)) + Counter(range(60)), "120 places: each of 60 rows twice"
    assert not np.array_equal(epochs[0] >= 60, epochs[1] >= 60), "the sources are shuffled"
    assert np.array_equal(mix.epoch(seed=7, epoch=3), epochs[3]), "it has a memory"
    assert not np.array_equal(mix.epoch(seed=8, epoch=3), epochs[3])


def test_rows_beyond_a_source_are_repeated_evenly() -> None:
    mix = mix_of(sources(a={"rows": 7}, b={}), [3, 4])
    assert mix == Mix((3, 4), (7, 4))
    counts = Counter(mix.epoch(seed=0, epoch=0).tolist())
    assert sorted(counts[at] for at in range(3)) == [2, 2, 3]
    assert [counts[at] for at in range(3, 7)] == [1, 1, 1, 1]
    assert mix_of(sources(a={}, b={}), [3, 4]) is None


@pytest.mark.parametrize("size", [{"batch_size": 5}, {"batch_tokens": 40}], ids=str)
def test_a_resumed_mix_goes_on_where_it_was(size: dict[str, int]) -> None:
    mix, lengths = Mix((20, 6), (9, 6)), [3 + at % 7 for at in range(26)]
    whole = plan_steps(lengths, seed=1, mix=mix, **size)
    plans = [next(whole) for _ in range(9)]
    later = plan_steps(lengths, seed=1, mix=mix, start=5, **size)
    assert [next(later) for _ in range(4)] == plans[5:]
    steps = num_steps(lengths, seed=1, epochs=2, mix=mix, **size)
    assert {plan.epoch for plan in plans[:steps]} == {0, 1}
    assert sum(len(plan.examples) for plan in plans if plan.epoch == 0) == 15


def mixed(folder: Path, out: str, **changes: Any) -> dict[str, torch.Tensor]:
    data = [
        {"path": str(folder / "a.jsonl"), "weight": 2},
        {"path": str(folder / "renamed.jsonl"), "weight": 1,
         "columns": {"prompt": "q", "completion": "a"}},
    ]  # fmt: skip
    settings = {"precision": "float64", "batch_size": 4, "steps": 5, "data": data, **changes}
    train(run_config(folder, out=str(folder / out), **settings))
    return load_file(folder / out / "model" / "model.safetensors")


def test_a_mix_trains_for_every_split_and_resumes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="samestep")
    weights = mixed(folder, "whole")
    assert "an epoch takes 10 of 12 rows of" in caplog.text
    epochs = [line["epoch"] for line in read_lines(folder / "whole" / "log.jsonl")]
    assert epochs[3] == 1.0, "15 rows an epoch: 4 steps"
    split = mixed(folder, "split", micro_batch=1, padding="left")
    assert all(torch.allclose(split[name], weight, atol=1e-6) for name, weight in weights.items())
    real, calls = trainer.step, iter(range(9))

    def dies(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 3:
            raise RuntimeError("power cut")
        return real(*arguments, **options)

    monkeypatch.setattr(trainer, "step", dies)
    with pytest.raises(RuntimeError, match="power cut"):
        mixed(folder, "broken", save_every=1)
    monkeypatch.undo()
    resumed = mixed(folder, "broken", save_every=1, resume=True)
    assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())


def test_columns_are_renamed_and_what_is_missing_is_named(folder: Path) -> None:
    plain = load_rows(str(folder / "b.jsonl"))
    columns = {"prompt": "q", "completion": "a"}
    rows = load_rows(str(folder / "renamed.jsonl"), columns=columns)
    assert [row.values for row in rows] == [row.values for row in plain]
    swapped = load_rows([{"prompt": "x", "completion": "y"}],
                        columns={"prompt": "completion", "completion": "prompt"})  # fmt: skip
    assert swapped[0].values == {"prompt": "y", "completion": "x"}
    with pytest.raises(
        DataError, match=r"renamed.jsonl:1: columns: there is no 'qq'; did you mean 'q'"
    ):
        load_rows(str(folder / "renamed.jsonl"), columns={"prompt": "qq"})
    flags = ["--columns", "prompt=q", "completion=a"]
    data = ["--model", str(folder / "tiny"), "--data", str(folder / "renamed.jsonl"), "--out", "o"]
    assert "5 rows of prompt and completion" in read_only(read_settings([*data, *flags]))[
        0
    ].replace("\n ", "")


def test_zstandard_and_urls_are_read_as_files_are(folder: Path) -> None:
    content = (folder / "a.jsonl").read_bytes()
    plain = load_rows(str(folder / "a.jsonl"))
    packed = folder / "a.jsonl.zst"
    with pa.OSFile(str(packed), "wb") as file, pa.CompressedOutputStream(file, "zstd") as stream:
        stream.write(content)
    assert [row.values for row in load_rows(str(packed))] == [row.values for row in plain]
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a.jsonl.zst: cannot be read"):
        load_rows(str(packed))
    memory = fsspec.filesystem("memory")
    memory.pipe("/rows/b.jsonl", (folder / "b.jsonl").read_bytes())
    memory.pipe("/rows/a.jsonl", content)
    assert len(load_rows("memory://rows/*.jsonl")) == 17
    assert load_rows("memory://rows/b.jsonl")[0].origin == "b.jsonl:1"
    memory.pipe("/rows/b.jsonl", content)
    assert len(load_rows("memory://rows/b.jsonl")) == 12, "a file that has changed is read again"
    with pytest.raises(DataError, match=r"memory://rows/none.jsonl: cannot be read"):
        load_rows("memory://rows/none.jsonl")
    with pytest.raises(DataError, match=r"no://x.jsonl: cannot be read.*Protocol not known"):
        load_rows("no://x.jsonl")
    settings = read_settings(
        [
            "--model",
            str(folder / "tiny"),
            "--data",
            "memory://rows/a.jsonl",
            "--out",
            str(folder / "o"),
        ]
    )
    check_paths(settings)


def test_a_split_and_a_configuration_go_to_the_library(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def load(path: str, *, name: str | None = None, split: str) -> datasets.Dataset:
        asked.append((path, name, split))
        return datasets.Dataset.from_list([{"text": "one"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    load_rows(DataSource(path="owner/name", config="main", split="test[:5]"))
    load_rows("owner/name")
    assert asked == [("owner/name", "main", "test[:5]"), ("owner/name", None, "train")]
    parts = datasets.DatasetDict(
        {"test": datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])}
    )
    parts.save_to_disk(str(folder / "saved"))
    assert len(load_rows(DataSource(path=str(folder / "saved"), split="test"))) == 2
    with pytest.raises(DataError, match="config and split belong to data sets of the Hub"):
        load_rows(DataSource(path=str(folder / "a.jsonl"), config="x", split="y"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"path": "a", "wieght": 1}], "data: a: wieght: no such field; did you mean 'weight'"),
        ([{"weight": 1}], "data: a source: path: is missing"),
        ([{"path": "a", "weight": 0}], "a: weight: .*greater than 0; found 0"),
        ([{"path": "a", "rows": -1}], "a: rows: .*greater than or equal to 1"),
        ([{"path": "a", "weight": 1}, {"path": "b"}, "c"], "b, c has no weight"),
        ([{"path": "a", "weight": 1}, {"path": "b", "rows": 3}], "weight and rows are both given"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_source_is_said(folder: Path, data: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_config(folder, data=data)


def test_sets_are_evaluated_whole_and_a_source_must_keep_rows(folder: Path) -> None:
    with pytest.raises(ConfigError, match="eval_data: x must have neither weight nor rows"):
        run_config(folder, eval_data={"math": {"path": "x", "rows": 3}})
    with pytest.raises(DataError, match="b: none of its rows is left"):
        mix_of(sources(a={"weight": 1}, b={"weight": 1}), [3, 0])
