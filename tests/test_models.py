"""Every row of docs/models.md, measured again; and the page is what its result file says."""

import json
from pathlib import Path

import pytest
import torch
from named_measure import in_trainer, over_ranks, over_splits
from named_models import NAMED
from named_page import command, page
from named_sizes import Size, full_size

from samestep.train.command import read_settings

ROOT = Path(__file__).parents[1]
RESULTS = json.loads((ROOT / "benchmarks/results/models.json").read_text(encoding="utf-8"))
KINDS = list(dict.fromkeys(named.reduced for named in NAMED))
FLOAT32_INSIDE = {
    "deepseek_v3": 1e-7,
    "vision kimi_k25": 1e-7,
    "vision ernie4_5_vl_moe": 1e-7,
    "vision minicpmv4_6": 1e-6,
}
"""Bounds of models that compute a part in float32 whatever the weights are."""


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", KINDS)
def test_no_split_changes_the_gradient(kind: str) -> None:
    assert over_splits(kind, torch.float64) < FLOAT32_INSIDE.get(kind, 1e-12)
    assert over_splits(kind, torch.float32) < 2e-6


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks(kind: str) -> None:
    assert over_ranks(kind) < 2e-6


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", KINDS)
def test_trainer_is_as_the_page_says(kind: str) -> None:
    told = next(RESULTS["rows"][named.name]["trainer"] for named in NAMED if named.reduced == kind)
    found = in_trainer(kind)
    assert (found > 1e-3) == (told > 1e-3)
    assert found == pytest.approx(told, rel=0.05) or max(found, told) < 2e-6


def test_the_page_is_current() -> None:
    assert (ROOT / "docs/models.md").read_text(encoding="utf-8") == page(RESULTS)


@pytest.mark.parametrize("named", NAMED, ids=lambda named: named.name)
def test_sizes_and_commands(named, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """The sizes are those of the class, and the command's flags exist."""
    assert full_size(named) == Size(**RESULTS["rows"][named.name]["full"])
    flags = command(named, full_size(named)).split("samestep train ")[1].split()
    assert read_settings(flags).objective == named.objective


def test_published_sizes() -> None:
    """Against the numbers in the models' names and cards."""
    found = {named.name: full_size(named).parameters for named in NAMED}
    assert found["SmolLM2-135M"] == 134_515_008
    assert found["Llama 3.2 1B"] == 1_235_814_400
    assert found["Qwen2 7B"] == 7_615_616_512
    assert found["Kimi-K2-Thinking"] == pytest.approx(1.03e12, rel=0.01)
    assert found["MiniMax-M2"] == pytest.approx(229e9, rel=0.01)
    assert found["HunyuanVideo-1.5"] == pytest.approx(8.3e9, rel=0.01)
