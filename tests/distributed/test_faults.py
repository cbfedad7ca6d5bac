"""Ranks that die, hang or are stopped, in real runs under the launcher."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from cases import worst
from planted import PlantedRun
from runs import llama_folder, read_lines, run_config, write_rows
from safetensors.torch import load_file

from samestep.train.trainer import train

pytestmark = pytest.mark.slow
SETTINGS: dict[str, Any] = {
    "batch_size": 8,
    "micro_batch": 1,
    "steps": 30,
    "precision": "float64",
    "save_every": 4,
    "lr": 1e-2,
    "rank_timeout": 5,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    llama_folder(folder / "tiny")
    write_rows(folder / "rows.jsonl", 20)
    paths = {"model": str(folder / "tiny"), "data": str(folder / "rows.jsonl")}
    text = yaml.safe_dump({**SETTINGS, **paths})
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    train(run_config(folder, out=str(folder / "alone"), **SETTINGS))
    return folder


class LaunchedRun:
    """``samestep train --ranks 2`` as a user starts it."""

    def __init__(self, folder: Path, out: str, *options: str, ranks: int = 2) -> None:
        self.out = folder / out
        arguments = ["train", str(folder / "run.yaml"), "--out", str(self.out)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "samestep", *arguments, "--ranks", str(ranks), *options],
            env=os.environ | {"NO_COLOR": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "8"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for_step(self, step: int) -> None:
        log = self.out / "log.jsonl"
        until(lambda: log.exists() and log.read_text().count("\n") >= step)

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            if child.environ().get("LOCAL_RANK") == str(number):
                return child
        raise AssertionError(f"rank {number} is not there")

    def end(self) -> tuple[int, str]:
        """The exit code and everything that was printed."""
        text, _ = self.process.communicate(timeout=120)
        return self.process.returncode, text


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def launched(folder: Path) -> Iterator[list[LaunchedRun]]:
    runs: list[LaunchedRun] = []
    yield runs
    for run in runs:
        if run.process.poll() is None:
            for child in psutil.Process(run.process.pid).children(recursive=True):
                child.kill()
            run.process.kill()


def assert_resumes(folder: Path, run: LaunchedRun, *, ranks: int) -> None:
    code, text = LaunchedRun(folder, run.out.name, "--resume", ranks=ranks).end()
    assert code == 0, text
    assert "resuming after step" in text
    found, wanted = (
        load_file(out / "model" / "model.safetensors") for out in (run.out, folder / "alone")
    )
    assert worst(found, wanted) < 1e-9
    assert [line["step"] for line in read_lines(run.out / "log.jsonl")] == list(range(1, 31))


@pytest.mark.thorough
def test_a_rank_that_is_killed_is_named_and_the_run_goes_on_with_fewer(
    folder: Path, launched: list[LaunchedRun]
) -> None:
    run = LaunchedRun(folder, "killed")
    launched.append(run)
    run.wait_for_step(10)
    run.rank(1).kill()
    killed = time.monotonic()
    code, text = run.end()
    assert code == 128 + signal.SIGKILL
    assert "rank 1 died or was stopped" in text
    assert "rank 1 was ended by SIGKILL" in text
    assert "Traceback" not in text
    assert time.monotonic() - killed < 60
    assert_resumes(folder, run, ranks=1)


@pytest.mark.thorough
def test_a_rank_that_hangs_is_named(folder: Path, launched: list[LaunchedRun]) -> None:
    run = LaunchedRun(folder, "hung")
    launched.append(run)
    run.wait_for_step(10)
    rank = run.rank(1)
    rank.suspend()
    code, text = run.end()
    assert code == 3
    assert "nothing has moved for 5 s: rank 1 died or was stopped" in text
    assert not rank.is_running()
    assert_resumes(folder, run, ranks=2)


def test_a_hang_in_a_loss_of_ones_own_is_blamed_on_its_line(folder: Path) -> None:
    """Not on ranks that wait, nor on the collective that the loss runs in; without a launcher."""
    codes, text = PlantedRun(folder, "custom loss", 1).end()
    assert codes == [3, 3], text
    assert text.count("rank 1 hangs (last seen at evaluation, micro-batch 7: ") == 2
    assert f"{folder}/loss.py, line 12, in slow_loss). --resume continues" in text


@pytest.mark.thorough
def test_sigterm_saves_and_ends_with_a_code_of_its_own(
    folder: Path, launched: list[LaunchedRun]
) -> None:
    run = LaunchedRun(folder, "stopped", ranks=2)
    launched.append(run)
    run.wait_for_step(9)
    run.process.send_signal(signal.SIGTERM)
    code, text = run.end()
    assert code == 128 + signal.SIGTERM, text
    assert "stopped by SIGTERM after step" in text
    done = len(read_lines(run.out / "log.jsonl"))
    assert (run.out / "checkpoints" / f"step-{done:08d}").is_dir()
    assert_resumes(folder, run, ranks=2)


def test_an_error_on_one_rank_ends_all_with_its_message(folder: Path) -> None:
    bad = folder / "bad.jsonl"
    bad.write_text(json.dumps({"prompt": 3}) + "\n", encoding="utf-8")
    code, text = LaunchedRun(folder, "bad", "--data", str(bad)).end()
    assert code == 2
    assert "bad.jsonl" in text
    assert "Traceback" not in text
