"""Memory, numbers and disks that fail in one process, for real or by a hook."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import llama_folder, read_lines, run_config, write_rows
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from samestep.errors import CheckpointError, ConfigError, NotFiniteError, SequenceTooLargeError
from samestep.train import summary, trainer
from samestep.train.log import JsonLines
from samestep.train.reporter import RunReporter
from samestep.train.run_folder import RunFolder
from samestep.train.trainer import train

FULL = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def worst(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).norm() / other[name].norm()) for name in other)


class Allocator:
    """Fails in micro-batches of more than so many tokens, in the forward or the backward."""

    def __init__(self, limit: int, *, backward: bool) -> None:
        self.limit, self.backward, self.failures = limit, backward, 0

    def __call__(self, model: Any, micro: Any, **_: Any) -> None:
        if micro["input_ids"].numel() <= self.limit:
            return
        self.failures += 1
        if not self.backward:
            raise RuntimeError(FULL)
        hook = model.get_input_embeddings().weight.register_hook(lambda _: self.fail(hook))

    def fail(self, hook: Any) -> None:
        hook.remove()
        raise RuntimeError(FULL)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("knob", [{"micro_tokens": 400}, {"micro_batch": 8}], ids=str)
@pytest.mark.parametrize("backward", [False, True])
def test_out_of_memory_changes_the_cut_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backward: bool, knob: dict[str, int]
) -> None:
    common = {"precision": "float64", "steps": 3, "optimizer": "sgd", "lr": 0.1, **knob}
    train(run_config(tmp_path, out=str(tmp_path / "whole"), **common))
    allocator = Allocator(150, backward=backward)
    monkeypatch.setattr(trainer, "key_dropout", allocator)
    train(run_config(tmp_path, **common))
    assert 1 <= allocator.failures <= 3
    assert worst(weights(tmp_path / "out"), weights(tmp_path / "whole")) < 1e-12
    assert len(read_lines(tmp_path / "out" / "log.jsonl")) == 3


@pytest.mark.sampled(4)
@pytest.mark.parametrize("mode", ["auto", "none"])
def test_below_one_sequence_it_stops_with_its_row_and_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    allocator = Allocator(10, backward=False)
    monkeypatch.setattr(trainer, "key_dropout", allocator)
    with pytest.raises(SequenceTooLargeError, match=r"one sequence of \d+ tokens \(row \d+\)"):
        train(run_config(tmp_path, gradient_checkpointing=mode))
    assert ("computing most of each layer anew" in caplog.text) == (mode == "auto")


def test_one_sequence_that_is_too_large_is_computed_with_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    common = {"precision": "float64", "steps": 2, "optimizer": "sgd", "lr": 0.1, "micro_batch": 1}
    train(run_config(tmp_path, out=str(tmp_path / "whole"), **common))
    allocator = Allocator(10, backward=True)

    def only_while_all_is_kept(model: Any, micro: Any, **options: Any) -> None:
        if not model.is_activation_checkpointing:
            allocator(model, micro, **options)

    monkeypatch.setattr(trainer, "key_dropout", only_while_all_is_kept)
    train(run_config(tmp_path, **common))
    assert caplog.text.count("computing most of each layer anew") == 1
    assert worst(weights(tmp_path / "out"), weights(tmp_path / "whole")) < 1e-12


def test_any_other_error_is_not_taken_for_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(trainer, "key_dropout", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train(run_config(tmp_path))


LIMITED = """
import resource, sys
from samestep.train.command import read_settings
from samestep.train.trainer import train

megabytes, warm, *arguments = sys.argv[1:]
# What a first run leaves behind (code, caches, arenas) must not count against the limit.
elsewhere = list(arguments)
elsewhere[elsewhere.index("--out") + 1] = warm
train(read_settings([*elsewhere, "--micro-batch", "1"]))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = used + int(megabytes) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
print(train(read_settings([*arguments, "--micro-tokens", "1000000"]))["steps"])
"""


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_real_memory_limit_is_survived(tmp_path: Path) -> None:
    """The address space of a child is limited: the whole batch does not fit, parts of it do."""
    llama_folder(tmp_path / "tiny")
    with (tmp_path / "rows.jsonl").open("w", encoding="utf-8") as file:
        for at in range(256):
            file.write(json.dumps({"text": f"{at} Yes, of course. " * 12}) + "\n")
    arguments = {
        "model": tmp_path / "tiny",
        "data": tmp_path / "rows.jsonl",
        "out": tmp_path / "out",
        "batch-size": 256,
        "steps": 1,
        "padding": "none",
        "precision": "float64",
    }
    flags = [str(part) for name, value in arguments.items() for part in (f"--{name}", value)]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "100", str(tmp_path / "warm"), *flags],
        capture_output=True,
        text=True,
        check=False,
        # Freed tensors go back to the system at once, so that the limit is on what is in use.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "out of memory on" in done.stderr
    assert "the same again, in micro-batches of at most" in done.stderr
    assert worst(weights(tmp_path / "out"), weights(tmp_path / "warm")) < 1e-12


class Poison:
    """Makes the hidden states of one row's micro-batch overflow, so many times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, row: int, times: int) -> None:
        self.row, self.times, self.real = row, times, trainer.key_dropout
        monkeypatch.setattr(trainer, "key_dropout", self)

    def __call__(self, model: Any, micro: Any, **options: Any) -> None:
        self.real(model, micro, **options)
        if self.times and self.row in micro["example_ids"].tolist():
            self.times -= 1

            def overflow(_: Any, __: Any, states: Tensor) -> Tensor:
                hook.remove()
                return states * torch.inf

            hook = model.get_input_embeddings().register_forward_hook(overflow)


def test_a_step_that_is_not_finite_stops_with_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Poison(monkeypatch, row=7, times=99)
    with pytest.raises(NotFiniteError, match=r"nll.* is nan.*At fault: row 7: nll is nan$"):
        train(run_config(tmp_path, epochs=1, steps=None))


def test_a_step_that_is_not_finite_can_be_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Poison(monkeypatch, row=7, times=2)
    summary = train(run_config(tmp_path, not_finite="skip"))
    assert (summary["steps"], summary["skipped"]) == (6, 1)
    assert "At fault: row 7" in caplog.text
    lines = read_lines(tmp_path / "out" / "log.jsonl")
    skipped = [line for line in lines if line["skipped"]]
    assert len(skipped) == 1
    assert skipped[0]["loss"] is None
    assert "row 7" in skipped[0]["skipped"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_on_a_full_disk_ends_the_run_and_it_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/dev/full gives the system's own "No space left on device"."""
    settings: dict[str, Any] = {"save_every": 2, "steps": 6}
    train(run_config(tmp_path, out=str(tmp_path / "whole"), **settings))
    real, log = RunReporter.step, tmp_path / "out" / "log.jsonl"

    def fills_up(self: RunReporter, *arguments: Any, step: int, **options: Any) -> None:
        if step == 4:
            assert self._log is not None
            self._log._log.close()
            self._log._log = JsonLines(Path("/dev/full"))
        real(self, *arguments, step=step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(RunReporter, "step", fills_up)
        with pytest.raises(CheckpointError, match=r"cannot be written.*No space left.*--resume"):
            train(run_config(tmp_path, **settings))
    assert [line["step"] for line in read_lines(log)] == [1, 2, 3]
    train(run_config(tmp_path, **settings, resume=True))
    assert [line["step"] for line in read_lines(log)] == [1, 2, 3, 4, 5, 6]
    assert worst(weights(tmp_path / "out"), weights(tmp_path / "whole")) == 0


def test_a_slow_disk_only_takes_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"save_every": 2, "steps": 4}
    train(run_config(tmp_path, out=str(tmp_path / "whole"), **settings))
    real, waited = os.fsync, []

    def slow(descriptor: int) -> None:
        time.sleep(0.1)
        waited.append(descriptor)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    train(run_config(tmp_path, **settings))
    assert len(waited) > 4
    assert worst(weights(tmp_path / "out"), weights(tmp_path / "whole")) == 0
    assert len(read_lines(tmp_path / "out" / "log.jsonl")) == 4


FULL_DISK = """
import resource, signal, sys
from samestep.train.command import read_settings
from samestep.train.trainer import train
from samestep.errors import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
small, *arguments = sys.argv[1:]
if small != "0":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(small), int(small)))
try:
    train(read_settings(arguments))
except CheckpointError as error:
    sys.exit(str(error))
"""


@pytest.mark.thorough
@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path: Path) -> None:
    """Files of the child may not grow past a limit: the system refuses the shard's bytes."""
    config = run_config(tmp_path, steps=4, save_every=1, keep=9)
    train(config)
    checkpoints = tmp_path / "out" / "checkpoints"
    for step in (3, 4):
        shutil.rmtree(checkpoints / f"step-0000000{step}")
    settings = tmp_path / "out" / "config.yaml"

    def again(limit: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                sys.executable,
                "-c",
                FULL_DISK,
                str(limit),
                str(settings),
                "--resume",
            ],
            capture_output=True,
            text=True,
            check=False,
        )

    done = again(30_000)
    assert done.returncode == 1
    assert "step-00000003 could not be written" in done.stderr
    assert "step-00000002 is intact" in done.stderr
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000001", "step-00000002"]
    assert again(0).returncode == 0
    assert (checkpoints / "step-00000004").is_dir()


@pytest.mark.parametrize("at", ["save_pretrained", "rename", "summary.json"])
def test_a_disk_that_is_full_at_the_end_is_named_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    train(run_config(tmp_path, steps=1))
    before = weights(tmp_path / "out")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    def full_rename(path: Path, target: Path) -> Path:
        if path.name == ".model.tmp":
            full()
        os.rename(path, target)
        return target

    with monkeypatch.context() as patch:
        if at == "save_pretrained":
            patch.setattr(LlamaForCausalLM, "save_pretrained", full)
        elif at == "rename":
            patch.setattr(Path, "rename", full_rename)
        else:
            patch.setattr(summary, "write_atomically", full)
        with pytest.raises(CheckpointError, match=r"could not be written.*No space left"):
            train(run_config(tmp_path, steps=1, resume=True))
    assert worst(weights(tmp_path / "out"), before) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not names & {".model.tmp", ".model.old"}
    train(run_config(tmp_path, steps=1, resume=True))


def test_a_planted_link_does_not_lead_the_export_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    for name in (".model.tmp", ".model.old"):
        (tmp_path / "out" / name).symlink_to(tmp_path / "elsewhere")
    train(run_config(tmp_path, steps=1))
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


def test_a_model_is_not_trained_over_itself(tmp_path: Path) -> None:
    train(run_config(tmp_path, steps=1))
    model = str(tmp_path / "out" / "model")
    with pytest.raises(ConfigError, match=r"model: .* lies in .*out/model"):
        train(run_config(tmp_path, steps=1, overwrite=True, model=model))
    assert weights(tmp_path / "out")


def test_weights_that_are_not_finite_end_the_run_and_are_not_exported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="are not finite"):
        train(run_config(tmp_path, steps=1, weight_decay=1e300))
    assert not (tmp_path / "out" / "model").exists()
    assert not list((tmp_path / "out" / "checkpoints").glob("*"))


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"out: /proc/samestep cannot be written"):
        train(run_config(tmp_path, out="/proc/samestep"))


def test_two_runs_cannot_write_to_one_folder(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "out")
    first.open(run_config(tmp_path))
    with pytest.raises(ConfigError, match="another run is writing to"):
        train(run_config(tmp_path, overwrite=True))
    assert first.config.exists()
    first.close()
    train(run_config(tmp_path, overwrite=True, steps=1))


def test_a_clock_that_jumps_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(10**9, 0, -86_400))
    monkeypatch.setattr(time, "time", lambda: next(now))
    summary = train(run_config(tmp_path, steps=2, save_every=1))
    assert summary["seconds"] > 0
    assert all(line["seconds"] > 0 for line in read_lines(tmp_path / "out" / "log.jsonl"))


def test_changed_rows_are_told_apart(tmp_path: Path) -> None:
    train(run_config(tmp_path, steps=1))
    rows = tmp_path / "rows.jsonl"
    lines = rows.read_text(encoding="utf-8").splitlines()
    write_rows(rows, 21)
    with pytest.raises(ConfigError, match=r"then 20 records of [\d,]+ tokens, now 21"):
        train(run_config(tmp_path, steps=1, resume=True))
    changed = [*lines[:13], lines[13].replace("=", "+"), *lines[14:]]
    rows.write_text("\n".join(changed) + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="the first difference is among records 13 to 13"):
        train(run_config(tmp_path, steps=1, resume=True))
