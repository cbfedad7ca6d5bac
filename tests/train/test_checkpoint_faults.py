"""What a kill, a failing disk and other people's files may do to checkpoints: nothing."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from thorough import THOROUGH
from torch import nn

from samestep.errors import CheckpointError
from samestep.train import checkpoint
from samestep.train.progress import DataFingerprint, Progress

ATTACK = Path(__file__).parent.parent / "support" / "save_attack.py"
FAULTS = ["kill", "EIO", "EACCES", "ENOSPC"] if THOROUGH else ["kill/2", "EIO/5", "EACCES/7"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_no_operation_of_a_save_loses_anything_when_it_kills_or_fails() -> None:
    done = subprocess.run(
        [sys.executable, str(ATTACK), *FAULTS],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["lost"] == []
    assert all(number >= 10 for number in result["tried"].values()), result


def network(value: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(2, 2)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(value)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def save(folder: Path, step: int, value: float, *, keep: int = 1) -> Path:
    model, optimizer = network(value)
    data = DataFingerprint(fingerprint="abc", records=3, tokens=10, blocks=["d"])
    progress = Progress(step=step, tokens=0, seconds=0.0, skipped=0, data=data)
    return checkpoint.save(folder, model, optimizer=optimizer, progress=progress, keep=keep)


def value_of(path: Path) -> float:
    model, optimizer = network(-1.0)
    checkpoint.load(path, model, optimizer=optimizer)
    (value,) = {x for weight in model.parameters() for x in weight.detach().flatten().tolist()}
    return value


@pytest.mark.parametrize("name", ["0.safetensors", "shard (conflicted copy).safetensors", "z"])
def test_files_that_lie_beside_a_checkpoints_own_are_not_read(tmp_path: Path, name: str) -> None:
    path, other = save(tmp_path / "a", 1, 1.0), save(tmp_path / "b", 1, 9.0)
    (shard,) = other.glob("*.safetensors")
    shutil.copy(shard, path / name)
    shutil.copy(shard, path / f"zzz-{shard.name}")
    assert checkpoint.newest_intact(tmp_path / "a") == path
    assert value_of(path) == 1.0


def test_what_changes_between_check_and_use_is_told(tmp_path: Path) -> None:
    path, other = save(tmp_path / "a", 1, 1.0), save(tmp_path / "b", 1, 9.0)
    assert checkpoint.newest_intact(tmp_path / "a") == path
    (shard,) = other.glob("*.safetensors")
    shutil.copy(shard, path / shard.name)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        value_of(path)


def test_a_list_of_files_cannot_lead_elsewhere(tmp_path: Path) -> None:
    path = save(tmp_path / "a", 1, 1.0)
    (shard,) = path.glob("*.safetensors")
    shard.rename(tmp_path / shard.name)
    shard.symlink_to(tmp_path / shard.name)
    with pytest.raises(CheckpointError, match="is a link"):
        checkpoint.newest_intact(tmp_path / "a")


def test_only_exact_names_of_folders_are_checkpoints(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere", 9, 9.0)
    (tmp_path / "a" / "step-best").mkdir(parents=True)
    (tmp_path / "a" / "step-00000009").symlink_to(tmp_path / "elsewhere" / "step-00000009")
    (tmp_path / "a" / "step-00000008").write_text("", encoding="utf-8")
    (tmp_path / "a" / "step-1").mkdir()
    path = save(tmp_path / "a", 1, 1.0)
    assert checkpoint.newest_intact(tmp_path / "a") == path
    save(tmp_path / "a", 2, 2.0)
    assert {entry.name for entry in (tmp_path / "a").iterdir()} == {
        *("step-best", "step-00000009", "step-00000008", "step-1", "step-00000002")
    }
    assert (tmp_path / "elsewhere" / "step-00000009" / "state.txt").exists()


def test_pruning_keeps_what_no_run_wrote_and_what_is_not_past(tmp_path: Path) -> None:
    first = save(tmp_path, 1, 1.0)
    (first / "notes.txt").write_text("mine", encoding="utf-8")
    shutil.copytree(save(tmp_path / "other", 5, 5.0), tmp_path / "step-00000005")
    (tmp_path / "step-00000005" / "state.txt").write_text("damaged", encoding="utf-8")
    second = save(tmp_path, 2, 2.0)
    assert [file.name for file in first.iterdir()] == ["notes.txt"]
    assert checkpoint.newest_intact(tmp_path) == second


def test_notes_in_a_checkpoint_outlive_its_being_saved_again(tmp_path: Path) -> None:
    path = save(tmp_path, 1, 1.0)
    (path / "notes.txt").write_text("mine", encoding="utf-8")
    assert value_of(save(tmp_path, 1, 2.0)) == 2.0
    assert (path / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_renamed_checkpoint_does_not_pass_for_another_step(tmp_path: Path) -> None:
    path = save(tmp_path, 1, 1.0)
    shutil.copytree(path, tmp_path / "step-00000007")
    assert checkpoint.newest_intact(tmp_path) == path


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, bad: float) -> None:
    path = save(tmp_path, 1, 1.0)
    with pytest.raises(CheckpointError, match=r"2 weights are not finite \(bias, weight\)"):
        save(tmp_path, 2, bad)
    assert checkpoint.newest_intact(tmp_path) == path
