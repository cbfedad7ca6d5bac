"""Stopping, going on and what a run leaves, as a user sees it."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import samestep
from runs import llama_folder, run_config, write_rows
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from samestep.errors import ConfigError
from samestep.train import trainer as trainer_module
from samestep.train.command import read_settings
from samestep.train.trainer import Trainer, train


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    llama_folder(tmp_path / "tiny")
    write_rows(tmp_path / "rows.jsonl", 20)
    (tmp_path / "run.yaml").write_text(
        "model: tiny\ndata: rows.jsonl\nout: my out\nbatch_size: 8\nsteps: 3\nmicro_batch: 4\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_stop_prints_the_command_that_goes_on(folder: Path) -> None:
    arguments = ["train", "run.yaml", "--steps", "2000", "--lr", "1e-3", "--schedule", "constant"]
    with subprocess.Popen(
        [sys.executable, "-m", "samestep", *arguments],
        env=os.environ | {"NO_COLOR": "1", "COLUMNS": "80"},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step 2/2000"):
                process.send_signal(signal.SIGINT)
                break
        lines = process.stderr.read().splitlines()
    assert process.returncode == 130
    stopped = re.fullmatch(
        r"samestep: stopped by SIGINT after step (\d+), which is saved. To go on:", lines[-2]
    )
    assert stopped
    command = shlex.split(lines[-1])
    assert command[0] == "samestep"
    settings = read_settings(command[2:])
    assert (settings.out, settings.lr, settings.steps) == ("my out", 1e-3, 2000)
    config = yaml.safe_load((folder / "my out" / "config.yaml").read_text(encoding="utf-8"))
    config["steps"] = int(stopped[1]) + 1  # so that it ends soon
    (folder / "my out" / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    done = samestep(*command[1:], folder=folder)
    assert done.code == 0, done.err
    assert f"resuming after step {stopped[1]}" in done.err


def test_resume_without_a_run_says_so(folder: Path) -> None:
    with pytest.raises(ConfigError, match="resume: there is no run in nowhere"):
        read_settings(["--resume", "--out", "nowhere"])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_longer_run_says_what_to_do_instead(folder: Path, schedule: str) -> None:
    train(run_config(folder, steps=1, schedule=schedule))
    flags = ["--resume", "--out", str(folder / "out"), "--steps", "4"]
    done = samestep("train", *flags, folder=folder)
    assert done.code == 2
    assert "steps: was 1, is 4" in done.err
    assert "another number is another run" in done.err
    assert f"--model {folder / 'out' / 'model'} --out ANOTHER-FOLDER" in done.err


def test_a_run_of_constant_rate_gets_longer_and_is_the_longer_run(folder: Path) -> None:
    common = {"schedule": "constant", "micro_batch": 4}
    train(run_config(folder, steps=4, out=str(folder / "whole"), **common))
    train(run_config(folder, steps=2, **common))
    train(run_config(folder, steps=4, resume=True, **common))
    first, second = (
        AutoModelForCausalLM.from_pretrained(folder / name / "model").state_dict()
        for name in ("out", "whole")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_finished_run_leaves_its_model_alone_if_asked_to(folder: Path) -> None:
    done = samestep("train", "run.yaml", "--save-every", "1", "--keep", "0", folder=folder)
    assert done.code == 0, done.err
    assert not (folder / "my out" / "checkpoints").exists()
    again = samestep("train", "--resume", "--out", "my out", folder=folder)
    assert again.code == 2
    assert "is finished, and kept no checkpoint" in again.err
    kept = samestep("train", "run.yaml", "--keep", "1", "--overwrite", folder=folder)
    assert kept.code == 0
    assert [each.name for each in (folder / "my out" / "checkpoints").iterdir()] == [
        "step-00000003"
    ]


@pytest.mark.parametrize(
    ("minutes", "step_minutes", "saved"),
    [(10.0, 4.0, [3, 6]), (10.0, 11.0, [1, 2, 3, 4, 5, 6]), (10.0, 1.0, [6]), (None, 99.0, [6])],
)
def test_a_checkpoint_is_never_older_than_some_minutes(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    minutes: float | None,
    step_minutes: float,
    saved: list[int],
) -> None:
    steps: list[int] = []

    class Timed(Trainer):
        def run(self) -> None:
            self.saver.clock = lambda: 60 * step_minutes * self.progress.step
            super().run()

        def _save(self, **options: Any) -> None:
            steps.append(self.progress.step)
            super()._save(**options)

    monkeypatch.setattr(trainer_module, "Trainer", Timed)
    train(run_config(folder, save_minutes=minutes, micro_batch=4))
    assert steps == saved


LORA = ["--model", "m", "--data", "d", "--out", "o", "--lora-rank", "2"]


def test_adapters_learn_ten_times_as_fast_unless_told(folder: Path) -> None:
    assert read_settings(LORA[:-2]).lr == 2e-5
    assert read_settings(LORA).lr == pytest.approx(2e-4)
    assert read_settings([*LORA, "--lr", "2e-5"]).lr == 2e-5
    assert run_config(folder, lora_rank=2, lr=3e-5).lr == 3e-5
    (folder / "lr.yaml").write_text("lr: 2.0e-5\n", encoding="utf-8")
    assert read_settings([*LORA, "lr.yaml"]).lr == 2e-5
    done = samestep("train", "run.yaml", "--lora-rank", "2", folder=folder)
    assert "lr: 0.0002, ten times that of whole weights, for adapters" in done.err
    lines = (folder / "my out" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0])["lr"] == pytest.approx(2e-4)


def test_a_run_with_adapters_goes_on_at_the_rate_that_it_had(folder: Path) -> None:
    """One that began when the default was the same for all weights."""
    train(run_config(folder, lora_rank=2, lr=2e-5, steps=1))
    flags = ["--out", str(folder / "out"), "--resume", "--lora-rank", "2"]
    assert read_settings(["run.yaml", *flags]).lr == 2e-5
    assert read_settings(["--resume", "--out", str(folder / "out")]).lr == 2e-5


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("merge", [False, True])
def test_a_model_is_saved_in_the_type_that_it_came_in(
    folder: Path, dtype: torch.dtype, merge: bool
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "tiny", dtype=dtype)
    model.save_pretrained(folder / "tiny")
    lora = {"lora_rank": 2, "merge": True} if merge else {}
    train(run_config(folder, steps=1, **lora))
    saved = folder / "out" / "model"
    with safe_open(saved / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {dtype}  # noqa: SIM118
    assert AutoModelForCausalLM.from_pretrained(saved).dtype == dtype
