"""What is chosen, averaged, mixed and answered on two ranks is what one process has."""

from pathlib import Path
from typing import Any

import pytest
import rank_work
from cases import worst
from gloo import on_ranks
from runs import llama_folder, read_lines, run_config, write_rows
from safetensors.torch import load_file

from samestep.train.trainer import train


def settings(folder: Path, out: str, **changes: Any) -> dict[str, Any]:
    sources = [
        {"path": str(folder / "rows.jsonl"), "weight": 2},
        {"path": str(folder / "more.jsonl"), "weight": 1},
    ]
    return {
        "precision": "float64",
        "steps": 3,
        "batch_size": 4,
        "eval_every": 1,
        "data": sources,
        "eval_data": {"e": str(folder / "eval.jsonl")},
        "metrics": ("sequence_accuracy",),
        "best": "e/loss",
        "ema": 0.5,
        "lr_by_name": {"embed": 1e-3},
        "sample_tokens": 3,
        "out": str(folder / out),
        **changes,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chosen")
    llama_folder(path / "tiny")
    write_rows(path / "rows.jsonl", 9)
    write_rows(path / "more.jsonl", 4, seed=1)
    write_rows(path / "eval.jsonl", 3, seed=2)
    train(run_config(path, **settings(path, "alone", samples=2)))
    return path


@pytest.mark.sampled(4)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_ranks_are_one_process(folder: Path, parallel: str) -> None:
    samples = {"samples": 2} if parallel == "ddp" else {}
    options = settings(folder, parallel, parallel=parallel, **samples)
    summaries = on_ranks(2, rank_work.training, str(folder), **options)
    one, other = (
        load_file(folder / out / "model" / "model.safetensors") for out in (parallel, "alone")
    )
    assert worst(one, other) < 1e-9
    found, wanted = (read_lines(folder / out / "eval.jsonl") for out in (parallel, "alone"))
    for line, expected in zip(found, wanted, strict=True):
        assert line["terms"] == pytest.approx(expected["terms"], rel=1e-9)
    assert summaries[0]["best"]["step"] == 3
    if samples:
        lines = [read_lines(folder / out / "samples.jsonl") for out in (parallel, "alone")]
        assert lines[0] == lines[1]
