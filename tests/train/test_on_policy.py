"""Distillation of completions that the student writes: the same for any split, and that of rows."""

import json
from pathlib import Path
from typing import Any

import pytest
from cases import worst
from runs import llama_folder, read_lines, run_config, write_rows
from safetensors.torch import load_file

from samestep.errors import ConfigError
from samestep.train.setup import set_up
from samestep.train.trainer import train

OWN = {"on_policy": True, "max_completion_length": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, a teacher, prompts, and a run in ``alone``."""
    path = tmp_path_factory.mktemp("on_policy")
    llama_folder(path / "tiny", scale=4)
    llama_folder(path / "teacher", seed=5, scale=4)
    write_rows(path / "rows.jsonl", 7)
    train(config(path, "alone", **OWN))
    return path


def config(folder: Path, out: str, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "objective": "distillation",
        "teacher": str(folder / "teacher"),
        "divergence": "reverse_kl",
        "temperature": 0.8,
        "precision": "float64",
        "steps": 2,
        "batch_size": 7,
        **changes,
    }
    return run_config(folder, out=str(folder / out), **settings)


def test_no_split_changes_the_run(folder: Path) -> None:
    train(config(folder, "split", **OWN, micro_batch=1, generation_batch=1))
    one, other = (
        load_file(folder / out / "model" / "model.safetensors") for out in ("alone", "split")
    )
    assert worst(one, other) < 1e-9
    found, again = (read_lines(folder / out / "rollouts.jsonl") for out in ("alone", "split"))
    assert found == again
    assert {line["sample"] for line in found} == {1}
    assert not {"reward", "advantage"} & found[0].keys()


def test_the_step_is_that_of_rows_that_bring_the_same_completions(folder: Path) -> None:
    maker = set_up(config(folder, "unused", **OWN)).rollouts
    assert maker is not None
    lines = [line for line in read_lines(folder / "alone" / "rollouts.jsonl") if line["step"] == 1]
    order = [int(line["row"].partition(":")[2]) - 1 for line in lines]
    sequences = maker.of_step(order, 0, beat=lambda name: None).records.sequences
    rows = [
        {"input_ids": each.input_ids.tolist(), "labels": each.labels.tolist()} for each in sequences
    ]
    given = folder / "written.jsonl"
    given.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    train(config(folder, "given", data=str(given), steps=1))
    log, wanted = (read_lines(folder / out / "log.jsonl")[0] for out in ("alone", "given"))
    assert log["loss"] == pytest.approx(wanted["loss"], rel=1e-9)
    assert log["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-9)


def test_what_does_not_go_together_is_said_at_once(folder: Path) -> None:
    wrong = {**OWN, "teacher": None, "temperature": 1, "nll_weight": 0.1, "train_on": "all"}
    with pytest.raises(ConfigError) as caught:
        config(folder, "refused", **wrong)
    lines = str(caught.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["on_policy", "nll_weight", "train_on"]
    with pytest.raises(ConfigError, match="generation_batch: 1 has no effect: completions are"):
        config(folder, "refused", generation_batch=1)
