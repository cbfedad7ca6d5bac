"""Whole runs on latents: `samestep train --objective flow_matching`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from diffusers import HunyuanVideo15Transformer3DModel
from diffusion import video_folder, write_latents
from runs import llama_folder, read_lines
from safetensors.torch import load_file
from same_weights import check_same_weights
from torch import Tensor

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


@pytest.mark.sampled(4)
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_memory_knobs_do_not_change_the_weights(tmp_path: Path, precision: str) -> None:
    def run(precision: str, knobs: Mapping[str, Any]) -> dict[str, Tensor]:
        plain = {"precision": precision, "optimizer": "sgd", "lr": 0.1, "epochs": 1}
        given = arguments(tmp_path, out=tmp_path / "run", **plain, **knobs)
        recompute = ["--gradient-checkpointing", "full"] if "micro_tokens" in knobs else []
        train(read_settings([*given, *recompute, "--overwrite"]))
        return load_file(tmp_path / "run" / "model" / "diffusion_pytorch_model.safetensors")

    knobs = [{"micro_batch": 1}, {"micro_tokens": 24}]
    check_same_weights(run, knobs, precision=precision, floor=1e-6, bound=1e-10)


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
