"""Whole runs on pictures: `samestep train --objective vision_language`."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from runs import read_lines
from safetensors.torch import load_file
from same_weights import check_same_weights
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, GotOcr2Processor
from vision import got_folder, write_illustrated_rows

from samestep.errors import ConfigError
from samestep.train.command import read_settings
from samestep.train.trainer import train


@pytest.fixture(autouse=True)
def few_tokens_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one setting of this processor that a folder does not keep."""
    monkeypatch.setattr(GotOcr2Processor, "num_image_tokens", 16)


def arguments(folder: Path, **settings: Any) -> list[str]:
    """A run of the tiny GOT-OCR2."""
    values = {
        "objective": "vision_language",
        "model": got_folder(folder / "model"),
        "data": write_illustrated_rows(folder, 12, plain=5),
        "eval_data": write_illustrated_rows(folder, 4, seed=1),
        "out": folder / "out",
        "batch_size": 6,
        "epochs": 2,
        "lr": 5e-3,
        **settings,
    }
    return [text for key, value in values.items() for text in (f"--{key}", str(value))]


def test_a_run_learns_and_leaves_a_model_that_loads(tmp_path: Path) -> None:
    train(read_settings(arguments(tmp_path)))
    before, after = read_lines(tmp_path / "out" / "eval.jsonl")
    assert after["terms"]["nll"] < before["terms"]["nll"]
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "out" / "model")
    assert AutoProcessor.from_pretrained(tmp_path / "out" / "model").image_token == "<imgpad>"


@pytest.mark.sampled(4)
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_memory_knobs_do_not_change_the_weights(tmp_path: Path, precision: str) -> None:
    def run(precision: str, knobs: Mapping[str, Any]) -> dict[str, Tensor]:
        plain = {"precision": precision, "optimizer": "sgd", "lr": 0.1, "epochs": 1}
        given = arguments(tmp_path, out=tmp_path / "run", **plain, **knobs)
        train(read_settings([*given, "--overwrite"]))
        return load_file(tmp_path / "run" / "model" / "model.safetensors")

    # Biases that start from zero have hardly moved: in float32 they hold rounding alone.
    knobs = [{"micro_batch": 1}, {"micro_batch": 4, "padding": "left"}]
    floor = 2e-3 if precision == "float32" else 1e-9
    check_same_weights(run, knobs, precision=precision, floor=floor, bound=1e-12)


def test_a_model_without_a_processor_is_refused(tmp_path: Path) -> None:
    given = arguments(tmp_path)
    for file in (tmp_path / "model").glob("*processor*.json"):
        file.unlink()
    with pytest.raises(ConfigError, match="tokenizer: "):
        train(read_settings(given))


def test_help_shows_what_applies(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_settings(["--objective", "vision_language", "--help"])
    shown = capsys.readouterr().out
    assert "{right,left}" in shown
    assert not re.search(r"--beta\b", shown)
