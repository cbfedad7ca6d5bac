"""Whole runs on real ranks: those of one process, and resumed on other numbers of ranks."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import rank_work
import torch
from cases import worst
from gloo import on_ranks
from runs import llama_folder, read_lines, run_config, write_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from samestep.train.trainer import train

SETTINGS: dict[str, Any] = {
    "precision": "float64",
    "micro_batch": 2,
    "steps": 7,  # of 8 rows; the third and the sixth batch of an epoch of 17 rows hold one row
    "eval_every": 3,
    "save_every": 2,
    "keep": 9,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows, and a run of one process in ``alone``."""
    folder = tmp_path_factory.mktemp("ranks")
    llama_folder(folder / "tiny")
    write_rows(folder / "rows.jsonl", 17)
    write_rows(folder / "eval.jsonl", 5, seed=1)
    train(run_config(folder, out=str(folder / "alone"), **settings(folder)))
    return folder


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return {**SETTINGS, "eval_data": str(folder / "eval.jsonl"), **changes}


def weights(out: Path) -> dict[str, Any]:
    return load_file(out / "model" / "model.safetensors")


def assert_same_run(out: Path, alone: Path) -> None:
    assert worst(weights(out), weights(alone)) < 1e-9
    for name in ("log.jsonl", "eval.jsonl"):
        found, wanted = read_lines(out / name), read_lines(alone / name)
        assert [line["step"] for line in found] == [line["step"] for line in wanted]
        for one, other in zip(found, wanted, strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-9)
            assert one["counts"] == other["counts"]
            assert one["tokens"] == other["tokens"]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
@pytest.mark.parametrize("number", [1, 2, 4])
def test_the_run_is_that_of_one_process(folder: Path, number: int, parallel: str) -> None:
    out = folder / f"{parallel}-{number}"
    options = settings(folder, out=str(out), parallel=parallel)
    summaries = on_ranks(number, rank_work.training, str(folder), **options)
    assert {summary["ranks"] for summary in summaries} == {number}
    assert_same_run(out, folder / "alone")
    assert AutoModelForCausalLM.from_pretrained(out / "model").config.vocab_size > 0


@pytest.mark.thorough
def test_ranks_wait_for_one_with_a_slow_disk(folder: Path) -> None:
    out = folder / "slow"
    options = settings(folder, out=str(out), steps=2, save_every=1, eval_data=None)
    on_ranks(2, rank_work.training, str(folder), **{**options, "out": str(folder / "quick")})
    on_ranks(2, rank_work.training_on_a_slow_disk, str(folder), **options, rank_timeout=60)
    assert worst(weights(out), weights(folder / "quick")) == 0


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("before", "after"),
    [((2, "fsdp2"), (4, "fsdp2")), ((4, "fsdp2"), (2, "ddp")), ((4, "ddp"), (2, "fsdp2"))],
    ids=str,
)
def test_resumed_on_other_ranks_and_layouts(folder: Path, before: Any, after: Any) -> None:
    out = folder / f"resumed-{before}-{after}"
    on_ranks(
        before[0],
        rank_work.training,
        str(folder),
        **settings(folder, out=str(out), parallel=before[1]),
    )
    for step in (6, 7):  # what a run that died after step 5 leaves
        shutil.rmtree(out / "checkpoints" / f"step-{step:08d}")
    shutil.rmtree(out / "model")
    on_ranks(
        after[0],
        rank_work.training,
        str(folder),
        **settings(folder, out=str(out), parallel=after[1], resume=True),
    )
    assert_same_run(out, folder / "alone")


def test_resumed_on_one_process(folder: Path) -> None:
    out = folder / "to-one"
    options = settings(folder, out=str(out), parallel="fsdp2")
    on_ranks(2, rank_work.training, str(folder), **options)
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    shutil.rmtree(out / "checkpoints" / "step-00000007")
    train(run_config(folder, **settings(folder, out=str(out), resume=True)))
    assert_same_run(out, folder / "alone")


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    "options",
    [
        {"lora_rank": 2, "lora_dropout": 0.2, "optimizer": "sgd", "lr": 0.1},
        {"micro_batch": None, "micro_tokens": 40, "normalize": "sequence"},
        {"cpu_offload": True, "gradient_checkpointing": "full"},
    ],
    ids=str,
)
def test_options_under_fsdp2(folder: Path, options: dict[str, Any]) -> None:
    common = {**settings(folder, steps=3), **options}
    alone = {name: value for name, value in common.items() if name != "cpu_offload"}
    name = "-".join(options)
    train(run_config(folder, out=str(folder / f"{name}-alone"), **alone))
    out = folder / name
    on_ranks(2, rank_work.training, str(folder), out=str(out), parallel="fsdp2", **common)
    file = "adapter_model.safetensors" if "lora_rank" in options else "model.safetensors"
    one, other = (load_file(where / "model" / file) for where in (out, folder / f"{name}-alone"))
    assert worst(one, other) < 1e-9


@pytest.mark.sampled(4)
@pytest.mark.parametrize("lora", [None, 2])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_mixed_keeps_float32_weights_and_resumes(
    folder: Path, parallel: str, lora: int | None
) -> None:
    out = folder / f"mixed-{parallel}-{lora}"
    changes = {"precision": "mixed", "parallel": parallel, "lr": 1e-2, "lora_rank": lora}
    options = settings(folder, out=str(out), steps=4, eval_data=None, eval_every=None, **changes)
    on_ranks(2, rank_work.training, str(folder), **options)
    lines = read_lines(out / "log.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"]
    file = "model.safetensors" if lora is None else "adapter_model.safetensors"
    saved = load_file(out / "model" / file)
    assert {str(weight.dtype) for weight in saved.values()} == {"torch.float32"}
    shutil.rmtree(out / "checkpoints" / "step-00000004")  # as if it had died after step 3
    shutil.rmtree(out / "model")
    on_ranks(2, rank_work.training, str(folder), **options, resume=True)
    assert [line["step"] for line in read_lines(out / "log.jsonl")] == [1, 2, 3, 4]
    again = load_file(out / "model" / file)
    assert all(torch.equal(again[name], weight) for name, weight in saved.items())


def test_ranks_whose_devices_draw_other_weights_start_as_one() -> None:
    one, other = on_ranks(2, rank_work.drawn_start)
    assert one == other


def test_ranks_measure_by_themselves_and_take_the_worst(folder: Path) -> None:
    """One finds its costs in a cache, the other runs a micro-batch: neither waits for the other."""
    costs = [[0.1, 3e-3, 2e9, 10.0], [0.2, 1e-3, 5e9, 7.0]]
    found = on_ranks(2, rank_work.measuring, str(folder), costs)
    assert [worst for worst, _ in found] == [[0.2, 3e-3, 5e9, 10.0]] * 2
    assert [sizes for _, sizes in found] == [[], [1]]


def test_memory_that_runs_out_on_one_rank_changes_the_cut_of_all(folder: Path) -> None:
    out = folder / "memory"
    options = settings(folder, out=str(out), micro_batch=None, micro_tokens=2000)
    summaries = on_ranks(2, rank_work.faulty_training, str(folder), "memory", **options)
    assert [summary["steps"] for summary in summaries] == [7, 7]
    assert_same_run(out, folder / "alone")
    pieces = [line["micro_batches"] for line in read_lines(out / "log.jsonl")]
    assert max(pieces) > 2  # two ranks would have had one each


@pytest.mark.parametrize(
    ("fault", "kind", "text"),
    [
        ("sequence", "SequenceTooLargeError", r"out of memory on one sequence of \d+ tokens \(row"),
        ("number", "NotFiniteError", r"nll' is nan in micro-batch 0 of rank 1.*At fault: row \d+"),
    ],
)
def test_what_one_rank_meets_ends_all_with_its_rows(
    folder: Path, fault: str, kind: str, text: str
) -> None:
    options = settings(folder, out=str(folder / fault), micro_batch=1)
    found = on_ranks(2, rank_work.faulty_training, str(folder), fault, **options)
    assert [name for name, _ in found] == [kind, kind]
    assert all(re.search(text, message) for _, message in found), found
    assert found[0][1].startswith("rank 1: ") or fault == "number"


def test_generated_rollouts_are_those_of_one_process(folder: Path) -> None:
    (folder / "rewards.py").write_text(
        "def letters(completions):\n    return [float(text.count('e')) for text in completions]\n",
        encoding="utf-8",
    )
    common: dict[str, Any] = {
        "objective": "policy",
        "reward_funcs": (f"{folder / 'rewards.py'}:letters",),
        "num_generations": 3,
        "max_completion_length": 8,
        "generation_batch": 3,
        "precision": "float64",
        "steps": 3,  # of 8 prompts, and the third of one
        "save_minutes": None,
    }
    train(run_config(folder, out=str(folder / "generated"), **common))
    options = {**common, "micro_batch": 2, "out": str(folder / "generated-2")}
    on_ranks(2, rank_work.training, str(folder), **options)
    one, two = folder / "generated", folder / "generated-2"
    assert worst(weights(two), weights(one)) < 1e-9
    found, wanted = (read_lines(out / "rollouts.jsonl") for out in (two, one))
    advantages = [line.pop("advantage") for line in wanted]
    assert [line.pop("advantage") for line in found] == pytest.approx(advantages, abs=1e-9)
    assert found == wanted
    assert any(advantages)
