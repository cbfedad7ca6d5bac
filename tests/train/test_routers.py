"""Whole runs on mixtures of experts: they learn and balance, and no memory knob changes them."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from experts import experts_folder
from runs import llama_folder, read_lines, run_config
from safetensors.torch import load_file

from samestep.errors import ConfigError
from samestep.train.trainer import train

BALANCED: dict[str, Any] = {"router_loss": "window", "router_loss_weight": 0.1}
BIASED: dict[str, Any] = {"router_bias_rate": 0.01, "router_loss": "sequence"}


def test_it_learns_and_balances(tmp_path: Path) -> None:
    model = str(experts_folder(tmp_path / "experts"))
    train(run_config(tmp_path, model=model, steps=12, **BALANCED, router_z_loss=1e-3))
    first, *_, last = (line["terms"] for line in read_lines(tmp_path / "out" / "log.jsonl"))
    assert last["nll"] < 0.8 * first["nll"]
    assert last["router_z"] < first["router_z"]
    assert last["router_balance"] - 2 < 0.8 * (first["router_balance"] - 2)  # 2: all loads equal


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("family", "settings", "bound"),
    [("qwen3_moe", BALANCED, 1e-12), ("minimax_m2", BIASED, 1e-8)],
)
def test_memory_knobs_do_not_change_the_weights(
    tmp_path: Path, family: str, settings: dict[str, Any], bound: float
) -> None:
    """The biases among them (MiniMax-M2 takes its sigmoids in float32)."""
    model, found = str(experts_folder(tmp_path / "experts", family)), []
    knobs: list[dict[str, Any]] = [{}, {"micro_batch": 1}, {"micro_batch": 3, "padding": "left"}]
    for at, knob in enumerate(knobs):
        plain = {"precision": "float64", "steps": 2, "optimizer": "sgd", "lr": 0.1}
        train(
            run_config(
                tmp_path, model=model, out=str(tmp_path / str(at)), **plain, **settings, **knob
            )
        )
        found.append(load_file(tmp_path / str(at) / "model" / "model.safetensors"))
    biases = [name for name in found[0] if "e_score_correction_bias" in name]
    assert len(biases) == (2 if family == "minimax_m2" else 0)
    assert all(found[0][name].abs().max() > 0.009 for name in biases)
    for other in found[1:]:
        worst = max(float((other[n] - w).norm() / w.norm()) for n, w in found[0].items())
        assert worst < bound


def test_biases_are_resumed(tmp_path: Path) -> None:
    model = str(experts_folder(tmp_path / "experts", "deepseek_v3"))
    common = {"model": model, "save_every": 2, "keep": 9, **BIASED}
    train(run_config(tmp_path, out=str(tmp_path / "whole"), steps=4, **common))
    half = {"out": str(tmp_path / "half"), "steps": 4, **common}
    train(run_config(tmp_path, **half))
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "step-00000004")
    train(run_config(tmp_path, **half, resume=True))
    one, other = (
        load_file(tmp_path / out / "model" / "model.safetensors") for out in ("whole", "half")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("folder", "settings", "message"),
    [
        (llama_folder, BALANCED, "LlamaForCausalLM has no routers"),
        (experts_folder, BIASED, "the routers of Qwen3MoeForCausalLM have no bias to move"),
    ],
)
def test_models_that_do_not_fit_are_refused(
    tmp_path: Path, folder: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(run_config(tmp_path, model=str(folder(tmp_path / "model")), **settings))


def test_adapters_cannot_hold_biases(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="router_bias_rate: adapters do not hold the biases"):
        run_config(tmp_path, lora_rank=2, **BIASED)
