from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from samestep.errors import CheckpointError
from samestep.train import checkpoint, shards
from samestep.train.progress import DataFingerprint, Progress


def progress(step: int) -> Progress:
    data = DataFingerprint(fingerprint="abc", records=3, tokens=10, blocks=["d"])
    return Progress(step=step, tokens=step * 10, seconds=0.5, skipped=0, data=data)


def trained(kind: type[torch.optim.Optimizer]) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = kind(model.parameters(), lr=0.1)
    for _ in range(3):
        update(model, optimizer)
    return model, optimizer


def update(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.arange(12.0).view(3, 4).sin()).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_training_goes_on_bit_for_bit(tmp_path: Path, kind: type[torch.optim.Optimizer]) -> None:
    model, optimizer = trained(kind)
    path = checkpoint.save(tmp_path, model, optimizer=optimizer, progress=progress(3), keep=2)
    update(model, optimizer)

    other = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    other_optimizer = kind(other.parameters(), lr=0.1)
    assert checkpoint.load(path, other, optimizer=other_optimizer) == progress(3)
    update(other, other_optimizer)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_files_are_small_because_the_writer_copies_them_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "FILE_BYTES", 100)  # a 4 x 4 matrix is 64
    model, optimizer = trained(torch.optim.AdamW)
    path = checkpoint.save(tmp_path, model, optimizer=optimizer, progress=progress(3), keep=2)
    assert len(list(path.glob("*.safetensors"))) >= 4
    other = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.1)
    checkpoint.load(path, other, optimizer=other_optimizer)
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in model.state_dict().items())


def test_files_are_the_same_whoever_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "FILE_BYTES", 100)
    model, optimizer = trained(torch.optim.AdamW)
    given: dict[str, Any] = {"optimizer": optimizer, "progress": progress(3), "keep": 2}
    one = checkpoint.save(tmp_path / "one", model, **given)
    other = checkpoint.save(tmp_path / "other", model, writers=3, **given)
    names = sorted(path.name for path in one.glob("*.safetensors"))
    assert len(names) > 4
    assert names == sorted(path.name for path in other.glob("*.safetensors"))
    for name in names:  # the order of fields in their headers is safetensors' own, and changes
        found, wanted = load_file(other / name), load_file(one / name)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


def test_what_one_of_several_writers_meets_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "FILE_BYTES", 100)
    model, optimizer = trained(torch.optim.AdamW)
    write = shards.HuggingFaceStorageWriter.write_data

    def full(self: Any, plan: Any, planner: Any) -> Any:
        if any(item.index.fqn == "model.0.weight" for item in plan.items):
            raise OSError(28, "No space left on device")
        return write(self, plan, planner)

    monkeypatch.setattr(shards.HuggingFaceStorageWriter, "write_data", full)
    given: dict[str, Any] = {"optimizer": optimizer, "progress": progress(3), "keep": 2}
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoint.save(tmp_path, model, writers=3, **given)
    assert not list(tmp_path.iterdir())


def test_the_newest_are_kept(tmp_path: Path) -> None:
    model, optimizer = trained(torch.optim.SGD)
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, model, optimizer=optimizer, progress=progress(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000010"]
    assert checkpoint.newest_intact(tmp_path) == tmp_path / "step-00000010"


def test_nothing_there_is_none(tmp_path: Path) -> None:
    assert checkpoint.newest_intact(tmp_path / "none") is None


def test_a_full_disk_leaves_the_previous_one_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained(torch.optim.AdamW)
    before = checkpoint.save(tmp_path, model, optimizer=optimizer, progress=progress(1), keep=1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.state_dict_saver, "save", full)
    with pytest.raises(CheckpointError, match=r"No space left.*step-00000001 is intact"):
        checkpoint.save(tmp_path, model, optimizer=optimizer, progress=progress(2), keep=1)
    assert list(tmp_path.iterdir()) == [before]
    checkpoint.load(before, model, optimizer=optimizer)


def test_a_crash_while_writing_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained(torch.optim.AdamW)

    def die(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, "sync", die)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, model, optimizer=optimizer, progress=progress(1), keep=1)
    assert checkpoint.newest_intact(tmp_path) is None


def test_another_model_is_refused(tmp_path: Path) -> None:
    model, optimizer = trained(torch.optim.SGD)
    path = checkpoint.save(tmp_path, model, optimizer=optimizer, progress=progress(1), keep=1)
    other = nn.Linear(4, 5)
    with pytest.raises(CheckpointError, match="another model"):
        checkpoint.load(path, other, optimizer=torch.optim.SGD(other.parameters(), lr=0.1))


def shard(path: Path) -> Path:
    return next(path.glob("shard-*.safetensors"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", ["shard", "state.txt"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, damage: Any, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = trained(torch.optim.AdamW)
    first = checkpoint.save(tmp_path, model, optimizer=optimizer, progress=progress(1), keep=2)
    second = checkpoint.save(tmp_path, model, optimizer=optimizer, progress=progress(2), keep=2)
    assert checkpoint.newest_intact(tmp_path) == second
    damage(shard(second) if name == "shard" else second / name)
    assert checkpoint.newest_intact(tmp_path) == first
    assert "step-00000002 is damaged" in caplog.text
    damage(shard(first))
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole: .*00002.*00001"):
        checkpoint.newest_intact(tmp_path)


def test_nothing_in_a_checkpoint_is_pickled(tmp_path: Path) -> None:
    model, optimizer = trained(torch.optim.AdamW)
    path = checkpoint.save(tmp_path, model, optimizer=optimizer, progress=progress(1), keep=1)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".txt"}
