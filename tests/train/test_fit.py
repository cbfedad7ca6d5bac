"""A run from Python: objects in, callbacks on the way, a result out."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from runs import llama_folder, write_rows
from safetensors.torch import load_file
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM

import samestep
from samestep.errors import ConfigError
from samestep.train.command import read_settings
from samestep.train.trainer import train


class Recorder(samestep.Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []

    def on_step(self, record: dict[str, Any]) -> None:
        self.seen.append(("step", record["step"]))
        record["terms"].clear()
        torch.manual_seed(0)

    def on_evaluation(self, record: dict[str, Any]) -> None:
        self.seen.append(("evaluation", record["step"]))

    def on_save(self, record: dict[str, Any]) -> None:
        self.seen.append(("save", Path(record["path"]).name))

    def on_end(self, record: dict[str, Any]) -> None:
        self.seen.append(("end", record["steps"]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fit")
    llama_folder(path / "tiny")
    write_rows(path / "rows.jsonl", 10)
    return path


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text("utf-8").splitlines()]


def test_objects_give_what_paths_give_and_callbacks_change_nothing(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "tiny")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    recorder = Recorder()
    result = samestep.fit(
        model,
        datasets.Dataset.from_list(rows(folder)),
        tokenizer=tiny_tokenizer(chat=True),
        eval_data={"own": rows(folder)[:3], "file": str(folder / "rows.jsonl")},
        out=folder / "objects",
        callbacks=[recorder],
        steps=2,
        batch_size=4,
        eval_every=1,
        best="own/loss",
        lr=1e-2,
    )
    flags = ["--steps", "2", "--batch-size", "4", "--lr", "1e-2", "--out", str(folder / "paths")]
    source = ["--model", str(folder / "tiny"), "--data", str(folder / "rows.jsonl")]
    train(read_settings([*source, *flags]))
    one, other = (
        load_file(folder / out / "model" / "model.safetensors") for out in ("objects", "paths")
    )
    assert all(torch.equal(one[name], weight) for name, weight in other.items())
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in before.items())
    assert recorder.seen == [
        *[("evaluation", 0)] * 2,
        *[("step", 1), ("evaluation", 1), ("evaluation", 1), ("save", "step-00000001")],
        *[("step", 2), ("evaluation", 2), ("evaluation", 2), ("save", "step-00000002")],
        ("end", 2),
    ]
    assert [record["step"] for record in result.steps] == [1, 2]
    assert result.steps[0]["terms"]["nll"] > 0
    assert [record["set"] for record in result.evaluations] == ["own", "file"] * 3
    assert result.summary["best"]["step"] == 2
    assert torch.equal(result.model.lm_head.weight, one["lm_head.weight"])
    assert result.tokenizer.decode(result.tokenizer("a").input_ids) == "a"
    # The folder says all that the run needs: the command goes on with it.
    summary = train(read_settings(["--resume", "--out", str(folder / "objects")]))
    assert summary["steps"] == 2


def test_an_error_of_a_callback_ends_the_run_after_what_was_saved(folder: Path) -> None:
    class Fails(samestep.Callback):
        def on_save(self, record: dict[str, Any]) -> None:
            raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        samestep.fit(
            str(folder / "tiny"), str(folder / "rows.jsonl"), out=folder / "fails", steps=1,
            callbacks=[Fails()],
        )  # fmt: skip
    assert (folder / "fails" / "checkpoints" / "step-00000001").is_dir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": object(), "tokenizer": "t"}, "model: a object is no name, no path"),
        ({"model": torch.nn.Linear(1, 1)}, "tokenizer: a model that is an object needs one"),
        ({"data": []}, "data: a list that is empty is no source of rows"),
        ({"data": 3}, "data: a int is no source"),
        ({"eval_data": {"a": [1]}}, "eval_data-a: a list is no source"),
        ({"learning_rate": 1}, "learning_rate: no such field; here it is 'lr'"),
        ({"ranks": 2}, "start the ranks by torchrun"),
        ({"steps": 0}, "steps: .*greater than or equal to 1"),
    ],
    ids=range(8),
)
def test_what_is_wrong_is_said_before_anything_is_written(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    given = {"model": "m", "data": "d", **arguments}
    with pytest.raises(ConfigError, match=message):
        samestep.fit(given.pop("model"), given.pop("data"), out=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
