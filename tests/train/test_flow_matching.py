"""Whole runs on latents: `samestep train --objective flow_matching`."""

from pathlib import Path
from typing import Any

import pytest
from diffusers import HunyuanVideo15Transformer3DModel
from diffusion import video_folder, write_latents
from runs import llama_folder, read_lines
from safetensors.torch import load_file

from samestep.errors import ConfigError
from samestep.train.command import read_settings
from samestep.train.trainer import train


def arguments(folder: Path, **settings: Any) -> list[str]:
    model = folder / "video"
    values = {
        "objective": "flow_matching",
        "model": model if model.exists() else video_folder(model),
        "data": write_latents(folder / "train", 12),
        "out": folder / "out",
        "batch_size": 6,
        "epochs": 2,
        "lr": 1e-2,
        **settings,
    }
    return [text for key, value in values.items() for text in (f"--{key}", str(value))]


def test_a_run_learns_and_leaves_a_model_that_loads(tmp_path: Path) -> None:
    held_out = write_latents(tmp_path / "eval", 6, seed=1)
    train(
        read_settings(arguments(tmp_path, eval_data=held_out, epochs=6, time_policy="logit_normal"))
    )
    before, after = read_lines(tmp_path / "out" / "eval.jsonl")
    assert after["loss"] < 0.9 * before["loss"]
    assert HunyuanVideo15Transformer3DModel.from_pretrained(tmp_path / "out" / "model")


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-10), ("float32", 2e-6)])
def test_memory_knobs_do_not_change_the_weights(tmp_path: Path, dtype: str, bound: float) -> None:
    found = []
    for at, knobs in enumerate([{}, {"micro_batch": 1}, {"micro_tokens": 24}]):
        plain = {"precision": dtype, "optimizer": "sgd", "lr": 0.1, "epochs": 1}
        given = arguments(tmp_path, out=tmp_path / str(at), **plain, **knobs)
        train(read_settings(given + ["--gradient-checkpointing", "full"] * (at == 2)))
        weights = tmp_path / str(at) / "model" / "diffusion_pytorch_model.safetensors"
        found.append(load_file(weights))
    for other in found[1:]:
        worst = max(
            float((other[n] - w).norm() / w.norm().clamp(min=1e-6)) for n, w in found[0].items()
        )
        assert worst < bound


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="could not be loaded as a model of diffusers"):
        train(read_settings(arguments(tmp_path, model=llama_folder(tmp_path / "llama"))))
    with pytest.raises(ConfigError, match="lora_rank: adapters are not served"):
        read_settings(arguments(tmp_path, lora_rank=2))
    wide = write_latents(tmp_path / "wide", 2)
    for path in wide.iterdir():
        from safetensors.torch import save_file

        tensors = load_file(path)
        save_file({**tensors, "latents": tensors["latents"].repeat(2, 1, 1, 1)}, path)
    with pytest.raises(ConfigError, match="has 6 channels, but the model takes 7 and answers 3"):
        train(read_settings(arguments(tmp_path, data=wide)))
