"""Measuring a run's micro-batches, and choosing a budget, through a real run."""

import logging
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import worst
from runs import read_lines, run_config, write_rows
from safetensors.torch import load_file

from samestep.engine.counts import input_tokens
from samestep.engine.oom import memory_guard
from samestep.errors import OutOfMemoryError, SequenceTooLargeError
from samestep.train import micro_tokens
from samestep.train import summary as summaries
from samestep.train.budget_range import ON_CPU
from samestep.train.fitting import first_that_fits
from samestep.train.micro_tokens import Costs
from samestep.train.setup import set_up
from samestep.train.trainer import train
from samestep.utils.files import cache_folder
from samestep.utils.memory import available_memory, peak_memory, reset_peak_memory


def run(folder: Path, **changes: Any) -> Any:
    write_rows(folder / "rows.jsonl", 120)
    settings = {
        "batch_size": 100,
        "steps": 2,
        "precision": "float64",
        "optimizer": "sgd",
        "lr": 0.1,
    }
    return run_config(folder, **{**settings, **changes})


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def test_auto_measures_once_and_does_not_change_the_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(micro_tokens, "_key", lambda *_: "once")  # this test's own costs
    caplog.set_level(logging.INFO, "samestep")
    train(run(tmp_path, out=str(tmp_path / "a")))
    assert caplog.text.count("measuring what a micro-batch costs") == 1
    assert "tokens a micro-batch" in caplog.text
    assert len(list((cache_folder() / "costs").iterdir())) >= 1
    train(run(tmp_path, out=str(tmp_path / "b")))
    assert caplog.text.count("measuring what a micro-batch costs") == 1
    train(run(tmp_path, out=str(tmp_path / "c"), micro_batch=7))
    assert weights(tmp_path / "a").keys() == weights(tmp_path / "c").keys()
    assert worst(weights(tmp_path / "a"), weights(tmp_path / "c")) < 1e-12


def test_a_limit_below_what_is_needed_takes_the_smallest_budget_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(micro_tokens, "_key", lambda *_: "one")  # this test's own costs
    config = run(tmp_path, memory_limit=0.001, steps=1)
    train(config)
    assert "above the limit of 0.0 GB" in caplog.text
    (line,) = read_lines(Path(config.out) / "log.jsonl")
    assert line["tokens"] / line["micro_batches"] <= 256


def test_memory_that_runs_out_while_measuring_is_no_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(micro_tokens, "_key", lambda *_: "none")
    real = micro_tokens.backward

    def full(model: Any, micros: Any, *arguments: Any, **options: Any) -> Any:
        if sum(map(input_tokens, micros)) > 300:
            with memory_guard(micros[0]):
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return real(model, micros, *arguments, **options)

    monkeypatch.setattr(micro_tokens, "backward", full)
    train(run(tmp_path, steps=1))
    assert "out of memory on" in caplog.text
    assert "starting from 256 tokens a micro-batch" in caplog.text
    (line,) = read_lines(tmp_path / "out" / "log.jsonl")
    assert line["tokens"] / line["micro_batches"] <= 256
    assert not (cache_folder() / "costs" / "none.json").exists()


class FullAbove:
    """A backward that runs out of memory above so many tokens, its activations at hand."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.real = tokens, micro_tokens.backward
        self.held: weakref.ref[torch.Tensor] | None = None
        self.ran: list[int] = []

    def __call__(self, model: Any, micros: Any, *arguments: Any, **options: Any) -> Any:
        assert self.held is None or self.held() is None, "the failed attempt holds its memory"
        tokens = sum(map(input_tokens, micros))
        if tokens <= self.tokens:
            self.ran.append(tokens)
            return self.real(model, micros, *arguments, **options)
        activations = model.get_input_embeddings().weight * 2
        self.held = weakref.ref(activations)
        with memory_guard(micros[0]):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("pairs", [((256, 1024), (64, 256)), ((256, 1024),)])
def test_smaller_ones_are_measured_where_memory_runs_out(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    pairs: tuple[tuple[int, int], ...],
) -> None:
    """Each attempt has the memory of the one that failed; layers are checkpointed last."""
    caplog.set_level(logging.INFO, "samestep")
    full = FullAbove(300)
    monkeypatch.setattr(micro_tokens, "backward", full)
    monkeypatch.setattr(
        micro_tokens, "budget_range", lambda *_, **__: replace(ON_CPU, measured=pairs)
    )
    key = f"smaller {len(pairs)}"
    monkeypatch.setattr(micro_tokens, "_key", lambda *_: key)
    setup = set_up(run(tmp_path))
    assert full.held is not None
    found = "fewer were measured" in caplog.text
    assert found == (len(pairs) > 1)
    assert (min(full.ran) <= 64) == found
    assert ("starting from 256" in caplog.text) == (not found)
    assert setup.model.is_activation_checkpointing == (not found)
    assert not (cache_folder() / "costs" / f"{key}.json").exists()


def test_a_sequence_that_does_not_fit_is_not_tried_again() -> None:
    def run(size: int) -> None:
        assert size == 8
        raise SequenceTooLargeError("one sequence")

    with pytest.raises(SequenceTooLargeError):
        first_that_fits([8, 2], run)


@pytest.mark.parametrize("how", ["too large", "runs out"])
def test_layers_are_checkpointed_where_memory_wants_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    caplog.set_level(logging.INFO, "samestep")
    asked = []

    def measure(model: Any, *_: Any, **__: Any) -> Costs:
        asked.append(model.is_activation_checkpointing)
        if how == "runs out" and not asked[-1]:
            raise OutOfMemoryError("out of memory")
        return Costs(0.1, 0.001, 1e9, 1e5 if asked[-1] else 1e7)

    monkeypatch.setattr(micro_tokens, "_measure", measure)
    key = f"anew {how}"
    monkeypatch.setattr(micro_tokens, "_key", lambda m, _: f"{key} {m.is_activation_checkpointing}")
    train(run(tmp_path, steps=1, memory_limit=1.05, out=str(tmp_path / "a")))
    assert asked == [False, True]
    assert ("since the longest row" in caplog.text) == (how == "too large")
    train(
        run(
            tmp_path, out=str(tmp_path / "b"), steps=1, gradient_checkpointing="none", micro_batch=9
        )
    )
    assert asked == [False, True]
    assert worst(weights(tmp_path / "a"), weights(tmp_path / "b")) < 1e-12


@pytest.mark.skipif(available_memory(torch.device("cpu")) is None, reason="the system does not say")
def test_the_peak_of_a_block_is_seen() -> None:
    reset_peak_memory(torch.device("cpu"))  # gives back what the heap has free
    with peak_memory(torch.device("cpu")) as before:
        pass
    with peak_memory(torch.device("cpu")) as during:
        block = torch.ones(80_000_000)  # too large to come from what the heap has free
        # Memory is sampled by a thread, which on a busy machine has to wait for its turn.
        ends = time.monotonic() + 60
        while (during.bytes or 0) < (before.bytes or 0) + 200e6 and time.monotonic() < ends:
            time.sleep(0.01)
        del block
    assert before.bytes is not None
    assert during.bytes is not None
    assert during.bytes > before.bytes + 200e6


def test_the_device_s_peak_is_in_the_summary_and_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert train(run(tmp_path))["peak_device_bytes"] is None
    monkeypatch.setattr(summaries, "device_peak", lambda device: 5_000_000_000)
    with caplog.at_level(logging.INFO, logger="samestep"):
        summary = train(run(tmp_path, overwrite=True))
    assert summary["peak_device_bytes"] == 5_000_000_000
    assert "5.0 GB of the device's memory at the peak" in caplog.text
