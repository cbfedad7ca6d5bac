"""AdamW with moments of 8 bits, and Lion: the formulas, checkpoints, and what is refused."""

import copy
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from runs import llama_folder, run_config, write_rows
from safetensors.torch import load_file
from torch import Tensor, nn

from samestep.errors import ConfigError
from samestep.train.command import check_paths, read_settings
from samestep.train.optim import build_optimizer
from samestep.train.precision import bytes_per_weight
from samestep.train.settings.base import finalize
from samestep.train.settings.language import CausalLMSettings
from samestep.train.trainer import train

NAMES = ("adamw_8bit", "lion", "lion_8bit")
DECAY, RATE = 0.1, 0.01


def config(**changes: Any) -> CausalLMSettings:
    given = {"model": "m", "data": "d", "out": "o", "lr": RATE, "weight_decay": DECAY, **changes}
    return finalize(CausalLMSettings(**given))


class Stored:
    """A moment, stored in 8 bits between the steps by bitsandbytes' own codes if it is large."""

    def __init__(self, like: Tensor, *, bits: int, signed: bool) -> None:
        self.codes = bnb.create_dynamic_map(signed=signed)
        self.low = bits == 8 and like.numel() >= 4096
        self.value = torch.zeros_like(like)

    def keep(self, value: Tensor) -> None:
        if self.low:
            packed, state = bnb.quantize_blockwise(value, code=self.codes, blocksize=256)
            value = bnb.dequantize_blockwise(packed, state)
        self.value = value


def by_formula(weights: list[Tensor], gradients: list[list[Tensor]], name: str) -> list[Tensor]:
    """The weights after the papers' updates: AdamW's (1711.05101) or Lion's (2302.06675)."""
    bits, results = 32 if name == "lion" else 8, []
    for at, start in enumerate(weights):
        first = Stored(start, bits=bits, signed=True)
        second = Stored(start, bits=bits, signed=False)
        weight, decay = start.clone(), DECAY if start.dim() > 1 else 0.0
        for step, each in enumerate(gradients, start=1):
            gradient = each[at]
            weight *= 1 - RATE * decay
            if name == "adamw_8bit":
                mean = 0.9 * first.value + 0.1 * gradient
                square = 0.999 * second.value + 0.001 * gradient**2
                corrected = (square / (1 - 0.999**step)).sqrt() + 1e-8
                weight -= RATE * mean / (1 - 0.9**step) / corrected
                first.keep(mean)
                second.keep(square)
            else:
                weight -= RATE * (0.9 * first.value + 0.1 * gradient).sign()
                first.keep(0.99 * first.value + 0.01 * gradient)
        results.append(weight)
    return results


@pytest.mark.parametrize("name", NAMES)
def test_updates_are_the_papers(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 80), nn.Linear(80, 4))
    begin = [weight.detach().clone() for weight in model.parameters()]
    gradients = [[torch.randn_like(weight) for weight in begin] for _ in range(3)]
    optimizer = build_optimizer(model, config(optimizer=name))
    for each in gradients:
        for weight, gradient in zip(model.parameters(), each, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()
    expected = by_formula(begin, gradients, name)
    for weight, wanted, start in zip(model.parameters(), expected, begin, strict=True):
        moved = (wanted - start).norm()
        assert (weight - wanted).norm() < 2e-3 * moved
    kinds = {w.shape: s["state1"].dtype for w, s in optimizer.state.items()}
    low = torch.float32 if name == "lion" else torch.uint8
    assert kinds[torch.Size([80, 64])] == low
    assert kinds[torch.Size([80])] == torch.float32  # small ones are kept whole
    size = bytes_per_weight(model, config(optimizer=name, precision="float32"))
    assert size["optimizer"] == {"adamw_8bit": 2, "lion": 4, "lion_8bit": 1}[name]
    other = "lion" if name == "adamw_8bit" else "adamw_8bit"
    wrong = by_formula(begin, gradients, other)
    assert (wrong[0] - expected[0]).norm() > 0.1 * (expected[0] - begin[0]).norm()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("few")
    llama_folder(path / "tiny")
    write_rows(path / "rows.jsonl", 12)
    return path


def run(folder: Path, out: str, **changes: Any) -> dict[str, Tensor]:
    common = {"steps": 2, "lr": 1e-3, "save_every": 1, "micro_batch": 8, "optimizer": "adamw_8bit"}
    train(run_config(folder, out=str(folder / out), **{**common, **changes}))
    return load_file(folder / out / "model" / "model.safetensors")


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return float(sum((one[name] - other[name]).square().sum() for name in other)) ** 0.5


def test_a_run_splits_and_resumes(folder: Path) -> None:
    whole = run(folder, "whole")
    kept = {}
    checkpoints = folder / "whole" / "checkpoints"
    for file in (checkpoints / "step-00000001").glob("*.safetensors"):
        kept |= load_file(file)
    assert torch.uint8 in {tensor.dtype for tensor in kept.values()}
    shutil.rmtree(checkpoints / "step-00000002")
    resumed = run(folder, "whole", resume=True)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    split = run(folder, "split", micro_batch=1, padding="right")
    exact = run(folder, "exact", optimizer="adamw")
    # A gradient's last bit may move a moment from one of 256 codes to the next.
    assert distance(split, whole) < 0.1 * distance(exact, whole)


def test_states_of_any_go_through_a_checkpoint(folder: Path) -> None:
    """Every optimizer of bitsandbytes hands them out wrapped."""
    name = "bitsandbytes.optim:Lion8bit"
    whole = run(folder, "other", optimizer=name)
    shutil.rmtree(folder / "other" / "checkpoints" / "step-00000002")
    resumed = run(folder, "other", optimizer=name, resume=True)
    assert all(torch.equal(resumed[part], whole[part]) for part in whole)


def test_what_cannot_be_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2).double()
    for name in NAMES:
        with pytest.raises(ConfigError, match=f"{name} has moments of 32 bits at most"):
            build_optimizer(model, config(optimizer=name))
    with pytest.raises(ConfigError, match="eps"):
        config(optimizer="lion", eps=1e-6)
    monkeypatch.setattr("samestep.train.few_bits.DTensor", nn.Parameter)
    with pytest.raises(ConfigError, match="lion needs whole weights: not under parallel fsdp2"):
        build_optimizer(copy.deepcopy(model).float(), config(optimizer="lion"))
    monkeypatch.setattr("samestep.utils.extras.find_spec", lambda name: None)
    files = ["--model", str(folder / "tiny"), "--data", str(folder / "rows.jsonl"), "--out", "o"]
    with pytest.raises(ConfigError, match=r"lion needs bitsandbytes: pip install .*\[quant\]"):
        check_paths(read_settings([*files, "--optimizer", "lion"]))
