"""What a gradient becomes: options, rates and decay by name, frozen parts, an average."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import llama_folder, read_lines, run_config, write_rows
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from samestep.errors import ConfigError
from samestep.train import trainer
from samestep.train.command import read_settings
from samestep.train.optim import build_optimizer, freeze, learning_rate
from samestep.train.settings.base import finalize
from samestep.train.settings.language import CausalLMSettings
from samestep.train.trainer import train

OWN = """
import torch

class Plain(torch.optim.SGD):
    def __init__(self, groups, lr, betas=(0, 0)):
        assert betas == (0.5, 0.6)
        super().__init__(groups, lr=lr)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("updates")
    llama_folder(path / "tiny")
    double = AutoModelForCausalLM.from_pretrained(path / "tiny", dtype=torch.float64)
    double.save_pretrained(path / "tiny")  # so that what a run leaves is not rounded
    write_rows(path / "rows.jsonl", 12)
    write_rows(path / "eval.jsonl", 4, seed=1)
    (path / "own.py").write_text(OWN, encoding="utf-8")
    return path


def config(**changes: Any) -> CausalLMSettings:
    return finalize(CausalLMSettings(**{"model": "m", "data": "d", "out": "o", **changes}))


def weights_of(folder: Path, out: str) -> dict[str, Tensor]:
    return load_file(folder / out / "model" / "model.safetensors")


def run(folder: Path, out: str, **changes: Any) -> dict[str, Tensor]:
    common = {"precision": "float64", "steps": 3, "batch_size": 6, "lr": 1e-2}
    train(run_config(folder, out=str(folder / out), **{**common, **changes}))
    return weights_of(folder, out)


def worst(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).norm() / other[name].norm()) for name in other)


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 2)).double()


def after(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[Tensor]:
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.tensor([0, 1, step])).square().sum().backward()
        optimizer.step()
    return [weight.detach() for weight in model.parameters()]


@pytest.mark.parametrize(
    ("settings", "peer"),
    [
        (
            {"optimizer": "adamw", "betas": (0.5, 0.9), "eps": 1e-3},
            lambda w: torch.optim.AdamW(w, 0.1, betas=(0.5, 0.9), eps=1e-3, weight_decay=0.0),
        ),
        (
            {"optimizer": "sgd", "momentum": 0.9},
            lambda w: torch.optim.SGD(w, 0.1, momentum=0.9),
        ),
    ],
    ids=["adamw", "sgd"],
)
def test_options_are_those_of_pytorch(settings: dict[str, Any], peer: Any) -> None:
    ours, theirs = tiny(), tiny()
    mine = after(ours, build_optimizer(ours, config(lr=0.1, **settings)))
    others = after(theirs, peer(theirs.parameters()))
    plain = tiny()
    default = {"optimizer": settings["optimizer"], "lr": 0.1}
    without = after(plain, build_optimizer(plain, config(**default)))
    for one, other, third in zip(mine, others, without, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)
        assert not torch.allclose(one, third)


def test_muon_moves_hidden_matrices_and_adamw_the_rest() -> None:
    ours, theirs = tiny(), tiny()
    optimizer = build_optimizer(ours, config(optimizer="muon", lr=0.1, weight_decay=0.1))
    hidden = [theirs[1].weight, theirs[2].weight]
    others = [theirs[0].weight, theirs[1].bias, theirs[2].bias]
    muon = torch.optim.Muon(hidden, 0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    groups = [
        {"params": others[:1], "weight_decay": 0.1},
        {"params": others[1:], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, 0.1)
    mine = after(ours, optimizer)
    for step in range(3):
        muon.zero_grad()
        adamw.zero_grad()
        theirs(torch.tensor([0, 1, step])).square().sum().backward()
        muon.step()
        adamw.step()
    for one, other in zip(mine, theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-12, atol=1e-15)
    # Its state goes through a checkpoint's form, and it goes on with it.
    again = copy.deepcopy(ours)
    restored = build_optimizer(again, config(optimizer="muon", lr=0.1, weight_decay=0.1))
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(
        torch.equal(one, other)
        for one, other in zip(after(ours, optimizer), after(again, restored), strict=True)
    )


def test_rates_and_decay_go_by_name_and_frozen_weights_stay(folder: Path) -> None:
    chosen = {
        "optimizer": "sgd",
        "lr_by_name": {"embed": 1e-3, "mlp": 3e-2},
        "weight_decay_by_name": {r"norm\.weight$": 0.5},
        "freeze": (r"layers\.0\.", "lm_head"),
    }
    start = AutoModelForCausalLM.from_pretrained(folder / "tiny", dtype=torch.float64)
    begin = {name: weight.detach().clone() for name, weight in start.named_parameters()}
    plain = run(folder, "plain", optimizer="sgd", steps=1, max_grad_norm=None)
    moved = run(folder, "named", **{**chosen, "steps": 1, "max_grad_norm": None})
    for name, weight in moved.items():
        frozen = "layers.0." in name or "lm_head" in name
        scale = 0.1 if "embed" in name else 3 if "mlp" in name else 1
        decay = 0.5 * 1e-2 * begin[name] if name.endswith("norm.weight") else 0
        expected = begin[name] + (0 if frozen else scale * (plain[name] - begin[name]) - decay)
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-12)
        assert torch.equal(weight, begin[name]) is frozen
    split = run(
        folder,
        "split",
        **{**chosen, "steps": 1, "max_grad_norm": None},
        micro_batch=1,
        padding="left",
    )
    assert worst(split, moved) < 1e-12


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"schedule": "cosine", "min_lr_ratio": 0.2}, {0: 1.0, 5: 0.6, 9: 0.2195774}),
        ({"schedule": "wsd", "cooldown": 4}, {0: 1.0, 6: 1.0, 7: 0.75, 9: 0.25}),
        ({"schedule": "wsd", "cooldown": 0.4, "warmup": 2}, {0: 1 / 3, 2: 1.0, 6: 1.0, 8: 0.5}),
        (
            {"schedule": "cooldown", "cooldown": 4, "min_lr_ratio": 0.5},
            {6: 1.0, 7: 0.75, 9: 0.5669873},
        ),
        ({"schedule": "linear", "min_lr_ratio": 0.5}, {0: 1.0, 5: 0.75}),
    ],
    ids=str,
)
def test_schedules_have_a_floor_and_a_cool_down(
    settings: dict[str, Any], rates: dict[int, float]
) -> None:
    chosen = config(lr=1.0, **settings)
    found = {step: learning_rate(step, total=10, settings=chosen) for step in rates}
    assert found == pytest.approx(rates, rel=1e-6)


def test_the_average_is_that_of_every_step_whatever_the_split_and_after_a_resume(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common: dict[str, Any] = {"ema": 0.6, "eval_data": str(folder / "eval.jsonl"), "eval_every": 2}
    weights = run(folder, "ema", **common)
    start = AutoModelForCausalLM.from_pretrained(folder / "tiny", dtype=torch.float64)
    average = {name: weight.detach() for name, weight in start.named_parameters()}
    last = run(folder, "last", schedule="constant", save_every=1, keep=3)
    for shard in sorted((folder / "last" / "checkpoints").glob("*/*.safetensors")):
        step = load_file(shard)
        average = {name: 0.6 * w + 0.4 * step[f"model.{name}"] for name, w in average.items()}
    same = run(folder, "constant", **common, schedule="constant", micro_batch=1, padding="left")
    assert worst(same, {name: average[name] for name in same}) < 1e-12
    assert worst(same, last) > 1e-3
    # It is what was evaluated.
    judged = run(folder, "judge", model=str(folder / "constant" / "model"), lr=1e-30, steps=1,
                 eval_data=str(folder / "eval.jsonl"))  # fmt: skip
    assert judged.keys() == same.keys()
    said = read_lines(folder / "constant" / "eval.jsonl")[-1]["loss"]
    assert read_lines(folder / "judge" / "eval.jsonl")[0]["loss"] == pytest.approx(said, rel=1e-12)
    # A run that dies and goes on has the same one, to the bit.
    real, calls = trainer.step, iter(range(9))

    def dies(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 2:
            raise RuntimeError("power cut")
        return real(*arguments, **options)

    monkeypatch.setattr(trainer, "step", dies)
    with pytest.raises(RuntimeError, match="power cut"):
        run(folder, "broken", **common, save_every=1)
    monkeypatch.undo()
    resumed = run(folder, "broken", **common, save_every=1, resume=True)
    assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"optimizer": "sgd", "betas": (0.9, 0.9), "eps": 1.0},
            "betas: sgd takes momentum(.|\n)*eps:",
        ),
        ({"optimizer": "adafactor", "momentum": 0.9}, "momentum: adafactor takes none of these"),
        ({"betas": (0.9, 1.0)}, "betas: each from 0 up to, not with, 1, not 0.9 1.0"),
        ({"cooldown": 0.2}, "cooldown belongs to schedule wsd and cooldown, and this is linear"),
        ({"schedule": "constant", "min_lr_ratio": 0.1}, "schedule constant never falls"),
        ({"schedule": "wsd", "warmup": 0.6, "cooldown": 0.5}, "more than all"),
        ({"freeze": ("lay(",)}, "is no regular expression"),
        ({"lr_by_name": {"embed": -1.0}}, "lr_by_name: .*greater than or equal to 0; found -1.0"),
        ({"lr_by_name": {"embed": 0.0}}, "name those weights in freeze"),
        ({"ema": 1.0}, "ema: .*less than 1"),
        ({"optimizer": "moun"}, "did you mean 'muon'"),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_said(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_patterns_that_are_in_no_name_are_said_with_names() -> None:
    model = tiny()
    with pytest.raises(
        ConfigError, match=r"lr_by_name: 'q_proj' is(.|\n)*'v'(.|\n)*such as 0.weight"
    ):
        build_optimizer(model, config(lr_by_name={"q_proj": 1.0}, weight_decay_by_name={"v": 1.0}))
    with pytest.raises(ConfigError, match="freeze: 'layers' is in the name of no weight"):
        freeze(model, ["layers"])
    with pytest.raises(ConfigError, match="nothing would be left to train"):
        freeze(model, [r"\d"])


def test_options_go_to_an_optimizer_of_ones_own_or_are_refused(folder: Path) -> None:
    own = f"{folder / 'own.py'}:Plain"
    build_optimizer(tiny(), config(optimizer=own, betas=(0.5, 0.6)))
    with pytest.raises(ConfigError, match=r"could not be built: TypeError: .*momentum"):
        build_optimizer(tiny(), config(optimizer=own, momentum=0.5))


def test_settings_that_a_run_has_saved_are_read_again(folder: Path) -> None:
    settings = config(schedule="cosine", lr_by_name={"x": 0.1})
    assert finalize(CausalLMSettings(**settings.saved())) == settings


def test_they_are_flags_too(folder: Path) -> None:
    flags = ["--betas", "0.9", "0.95", "--lr-by-name", "embed=1e-3", "a=b=2", "--freeze", "x", "y"]
    settings = read_settings(["--model", "m", "--data", "d", "--out", "o", *flags])
    assert settings.betas == (0.9, 0.95)
    assert settings.lr_by_name == {"embed": 1e-3, "a=b": 2.0}
    assert settings.freeze == ("x", "y")
