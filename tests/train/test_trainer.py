"""Whole runs of a tiny model, in this process."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import gpt2_folder, llama_folder, read_lines, run_config, write_rows
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from samestep.errors import ConfigError, Interrupted, StepError
from samestep.train import trainer
from samestep.train.settings.base import TrainSettings
from samestep.train.trainer import train


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def worst(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).norm() / other[name].norm()) for name in other)


def test_a_run_leaves_everything_that_the_docs_promise(tmp_path: Path) -> None:
    evaluation = write_rows(tmp_path / "eval.jsonl", 9, seed=1)
    config = run_config(tmp_path, eval_data=str(evaluation), eval_every=4, save_every=2, keep=2)
    summary = train(config)
    out = tmp_path / "out"

    lines = read_lines(out / "log.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["counts"]["sequence"] for line in lines] == [8, 8, 4, 8, 8, 4]
    assert lines[2]["epoch"] == 1.0
    assert lines[-1]["loss"] < lines[0]["loss"]
    fields = "step epoch loss terms counts grad_norm lr tokens seconds micro_batches skipped"
    assert set(lines[0]) == set(fields.split())
    assert [line["step"] for line in read_lines(out / "eval.jsonl")] == [0, 4, 6]
    kept = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000006"]
    assert json.loads((out / "summary.json").read_text(encoding="utf-8")) == summary
    assert summary["evaluation_after"] < summary["evaluation_before"]
    assert summary["tokens"] == sum(line["tokens"] for line in lines)
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "knobs",
    [
        {"micro_batch": 1},
        {"micro_batch": 3, "padding": "left"},
        {"micro_batch": 8, "padding": "right"},
        {"micro_tokens": 70},
        {"micro_tokens": 200, "padding": "right"},
        {"gradient_checkpointing": "none"},
        {"gradient_checkpointing": "full"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "settings",
    [{}, {"normalize": "sequence", "label_smoothing": 0.1}, {"lora_rank": 2, "lora_dropout": 0.2}],
    ids=str,
)
def test_memory_knobs_do_not_change_the_weights(
    tmp_path: Path, knobs: dict[str, Any], settings: dict[str, Any]
) -> None:
    common = {"precision": "float64", "steps": 3, "optimizer": "sgd", "lr": 0.1, **settings}
    if "lora_rank" in settings:
        common["merge"] = True
    train(run_config(tmp_path, out=str(tmp_path / "a"), **common))
    train(run_config(tmp_path, out=str(tmp_path / "b"), **common, **knobs))
    assert worst(weights(tmp_path / "b"), weights(tmp_path / "a")) < 1e-12


def test_dropout_of_gpt2_belongs_to_the_examples(tmp_path: Path) -> None:
    gpt2_folder(tmp_path / "gpt2")
    common = {
        "model": str(tmp_path / "gpt2"),
        "precision": "float64",
        "steps": 2,
        "optimizer": "sgd",
    }
    for out, knobs in (("a", {}), ("b", {"micro_batch": 2, "padding": "left"})):
        train(run_config(tmp_path, out=str(tmp_path / out), **common, **knobs))
    train(run_config(tmp_path, out=str(tmp_path / "c"), **common, seed=1))
    assert worst(weights(tmp_path / "b"), weights(tmp_path / "a")) < 1e-12
    assert worst(weights(tmp_path / "c"), weights(tmp_path / "a")) > 1e-9


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2, "lora_dropout": 0.1}], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    whole = run_config(tmp_path, out=str(tmp_path / "whole"), save_every=2, **settings)
    train(whole)

    broken = {**settings, "out": str(tmp_path / "broken"), "save_every": 2}
    real_step, calls = trainer.step, iter(range(100))

    def dies_in_the_fifth(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 4:
            raise RuntimeError("power cut")
        return real_step(*arguments, **options)

    monkeypatch.setattr(trainer, "step", dies_in_the_fifth)
    with pytest.raises(RuntimeError, match="power cut"):
        train(run_config(tmp_path, **broken))
    monkeypatch.undo()
    train(run_config(tmp_path, **broken, resume=True))

    name = "adapter_model.safetensors" if settings else "model.safetensors"
    one, other = (load_file(tmp_path / out / "model" / name) for out in ("whole", "broken"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    logs = [read_lines(tmp_path / out / "log.jsonl") for out in ("whole", "broken")]
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]]


def test_resume_refuses_other_rows(tmp_path: Path) -> None:
    train(run_config(tmp_path, steps=1))
    write_rows(tmp_path / "rows.jsonl", 20, seed=5)
    with pytest.raises(ConfigError, match="training rows are not those"):
        train(run_config(tmp_path, steps=1, resume=True))


def test_resume_of_nothing_starts_at_the_beginning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(run_config(tmp_path, steps=1, resume=True))
    assert "starting at step 0" in caplog.text


def test_resume_of_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    train(run_config(tmp_path, steps=2))
    before = weights(tmp_path / "out")
    assert train(run_config(tmp_path, steps=2, resume=True))["steps"] == 2
    assert worst(weights(tmp_path / "out"), before) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_micro_batch_and_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """In the second micro-batch of the second step: that step is given up, nothing else is lost."""
    whole = run_config(tmp_path, out=str(tmp_path / "whole"), micro_batch=2)
    train(whole)
    keyed: list[int] = []

    at = 4 + 2  # in the second step

    def signals_in_the_second(*_: Any, **__: Any) -> None:
        keyed.append(1)
        if len(keyed) == at:
            signal.raise_signal(number)

    monkeypatch.setattr(trainer, "key_dropout", signals_in_the_second)
    with pytest.raises(Interrupted) as stopped:
        train(run_config(tmp_path, micro_batch=2))
    assert stopped.value.number == number
    assert len(keyed) == at
    assert (tmp_path / "out" / "checkpoints" / "step-00000001").is_dir()
    assert not (tmp_path / "out" / "model").exists()
    monkeypatch.undo()
    assert train(run_config(tmp_path, micro_batch=2, resume=True))["steps"] == 6
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted_twice(*_: Any, **__: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("still running")

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(trainer, "step", interrupted_twice)
    with pytest.raises(KeyboardInterrupt):
        train(run_config(tmp_path))
    assert signal.getsignal(signal.SIGINT) is before


def test_the_log_says_how_well_micro_batches_are_filled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "samestep")
    train(run_config(tmp_path, steps=1, micro_tokens=100))
    assert re.search(r"micro-batches, \d+% of their 100 tokens filled", caplog.text)
    padded = {"micro_batch": 4, "padding": "right", "out": str(tmp_path / "padded")}
    train(run_config(tmp_path, steps=1, **padded))
    assert re.search(r"2 micro-batches; \d+% of what is computed is padding", caplog.text)


def test_activations_of_a_cpu_have_nowhere_to_go(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="activation_offload: on a CPU"):
        train(run_config(tmp_path, activation_offload=True))


def test_lora_saves_an_adapter_or_merges_it(tmp_path: Path) -> None:
    from peft import PeftModel

    adapter, merged = run_config(tmp_path, lora_rank=4), None
    train(adapter)
    merged = run_config(tmp_path, out=str(tmp_path / "merged"), lora_rank=4, merge=True)
    train(merged)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
    ids = torch.arange(9)[None]
    with torch.no_grad():
        plain = base(ids).logits
        with_adapter = PeftModel.from_pretrained(base, tmp_path / "out" / "model")(ids).logits
        folded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "model")(ids).logits
    torch.testing.assert_close(with_adapter, folded)
    assert not torch.allclose(plain, folded, atol=1e-3)


def test_batch_tokens_bounds_every_step(tmp_path: Path) -> None:
    train(run_config(tmp_path, batch_size=None, batch_tokens=150, steps=None, epochs=1))
    lines = read_lines(tmp_path / "out" / "log.jsonl")
    assert all(line["tokens"] <= 150 or line["counts"]["sequence"] == 1 for line in lines)
    assert sum(line["counts"]["sequence"] for line in lines) == 20


def test_bfloat16_trains(tmp_path: Path) -> None:
    train(run_config(tmp_path, precision="bfloat16", lr=1e-2))
    lines = read_lines(tmp_path / "out" / "log.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").dtype == torch.bfloat16


def test_random_weights_follow_the_seed(tmp_path: Path) -> None:
    first = {}
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(run_config(tmp_path, out=str(tmp_path / out), init="random", seed=seed, steps=1))
        first[out] = weights(tmp_path / out)
    assert worst(first["a"], first["b"]) == 0
    assert worst(first["a"], first["c"]) > 0.1


def test_a_diverging_run_stops_and_keeps_its_checkpoint(tmp_path: Path) -> None:
    wild = run_config(
        tmp_path, optimizer="sgd", lr=1e30, max_grad_norm=None, save_every=1, schedule="constant"
    )
    with pytest.raises(StepError, match="not taken"):
        train(wild)
    assert (tmp_path / "out" / "checkpoints" / "step-00000001").is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "nowhere.jsonl"}, "nowhere"),
        ({"model": "./nowhere"}, "no folder"),
        ({"device": "cuda:7"}, "device"),
        ({"lora_rank": 2, "lora_targets": ("no_such_layer",)}, "lora_targets"),
    ],
)
def test_a_wrong_setting_writes_nothing(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    llama_folder(tmp_path / "tiny")
    config: TrainSettings = run_config(tmp_path, **{"model": str(tmp_path / "tiny"), **changes})
    with pytest.raises(Exception, match=message):
        train(config)
    assert not (tmp_path / "out").exists()


def test_rows_longer_than_the_model_are_refused(tmp_path: Path) -> None:
    row = {"text": "Yes, of course. " * 200}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="set max_length to 256"):
        train(run_config(tmp_path))
