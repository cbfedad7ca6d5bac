"""A run that an earlier version began goes on: the same rows, the same steps, the same weights."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from samestep.train import checkpoint
from samestep.train.command import read_settings
from samestep.train.setup import set_up
from samestep.train.trainer import train

FIXTURE = Path(__file__).parent / "fixtures" / "run_0_1_0"
"""3 of 6 steps by version 0.1.0, and the checkpoint that it left after step 6 uninterrupted."""

FLAGS = [
    "--model",
    "model",
    "--data",
    "rows.jsonl",
    "--out",
    "out",
    "--batch-size",
    "8",
    "--steps",
    "6",
    "--lr",
    "0.01",
    "--precision",
    "float64",
    "--micro-tokens",
    "64",
    "--save-every",
    "3",
    "--device",
    "cpu",
    "--keep",
    "9",
    "--resume",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(FIXTURE, folder)
    monkeypatch.chdir(folder)
    return folder


def tensors(step: Path) -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = {}
    for shard in step.glob("shard-*.safetensors"):
        loaded |= load_file(shard)
    return loaded


def test_what_is_loaded_is_what_was_saved(folder: Path) -> None:
    path = folder / "out" / "checkpoints" / "step-00000003"
    saved, setup = tensors(path), set_up(read_settings(FLAGS))
    progress = checkpoint.load(path, setup.model, optimizer=setup.optimizer)
    assert (progress.step, progress.tokens, progress.skipped) == (3, 993, 0)
    model = dict(setup.model.named_parameters())
    state = setup.optimizer.state_dict()["state"]
    for name, tensor in saved.items():
        part, rest = name.split(".", 1)
        if part == "model":
            assert torch.equal(model[rest], tensor), name
        else:
            index, moment = rest.split(".", 1)
            assert torch.equal(state[int(index)][moment], tensor), name
    assert len(saved) == 4 * len(model)


def test_the_resumed_run_ends_as_the_uninterrupted_one(folder: Path) -> None:
    assert train(read_settings(FLAGS))["steps"] == 6
    resumed = tensors(folder / "out" / "checkpoints" / "step-00000006")
    wanted = tensors(folder / "after_6_steps")
    assert resumed.keys() == wanted.keys()
    for name, tensor in wanted.items():
        difference = float((resumed[name] - tensor).double().norm())
        assert difference <= 1e-12 * float(tensor.double().norm()), name
