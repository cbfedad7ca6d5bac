"""The budget from two measurements: arithmetic, memory, and the file that remembers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import build

from samestep.train import micro_tokens
from samestep.train.budget_range import ON_ACCELERATOR, ON_CPU, BudgetRange, budget_range
from samestep.train.micro_tokens import (
    Costs,
    Sample,
    cached_costs,
    choose_budget,
    fit_costs,
    measure_costs,
)
from samestep.train.settings.base import finalize
from samestep.train.settings.objectives import settings_class

COSTS = Costs(seconds=0.2, seconds_per_token=0.004, bytes=3e9, bytes_per_token=1e6)


def test_the_lines_go_through_both_measurements() -> None:
    small, large = Sample(200, 1.0, 3.2e9), Sample(1000, 4.2, 4.0e9)
    costs = fit_costs(small, large)
    assert costs.seconds == pytest.approx(0.2)
    assert costs.seconds_per_token == pytest.approx(0.004)
    assert costs.bytes == pytest.approx(3e9)
    assert costs.bytes_per_token == pytest.approx(1e6)


def test_noise_that_makes_no_sense_gives_costs_that_do() -> None:
    costs = fit_costs(Sample(200, 2.0, 5e9), Sample(1000, 1.9, 4e9))
    assert costs.seconds_per_token > 0
    assert costs.bytes_per_token == 0
    assert fit_costs(Sample(200, 0.1, None), Sample(1000, 0.9, None)).bytes is None


def test_the_smallest_budget_with_little_fixed_cost_is_taken() -> None:
    # 0.2 s is 12 % of 1.67 s, which 367 tokens take; 0.4 s of what 733 take.
    assert choose_budget(COSTS) == 448
    assert choose_budget(Costs(0.4, 0.004, None, 0.0)) == 896
    assert (
        choose_budget(Costs(0.0, 0.004, None, 0.0)) == ON_CPU.least_for_speed
    )  # never less for its time alone
    assert choose_budget(Costs(1e9, 0.004, None, 0.0)) == ON_CPU.budgets[-1]


def test_low_precision_on_a_cpu_gets_more_since_code_is_made_for_every_shape() -> None:
    def choice(precision: str) -> BudgetRange:
        return budget_range(torch.device("cpu"), precision=precision)

    assert [choose_budget(COSTS, choice=choice(one)) for one in ("float32", "mixed")] == [448, 896]
    assert choice("bfloat16") == choice("mixed")
    assert choice("float64") == ON_CPU


def test_a_budget_below_the_longest_row_would_save_no_memory() -> None:
    assert choose_budget(COSTS, longest=300) == 448
    assert choose_budget(COSTS, longest=700) == 700
    assert choose_budget(Costs(0.4, 0.004, None, 0.0), longest=700) == 896
    assert choose_budget(COSTS, longest=9000) == ON_CPU.budgets[-1]
    assert choose_budget(COSTS, longest=700, limit=3.6e9) == 448


def test_an_accelerator_gets_what_memory_holds() -> None:
    launches = Costs(seconds=0.05, seconds_per_token=1.5e-5, bytes=12e9, bytes_per_token=1e6)
    asked = {"choice": ON_ACCELERATOR, "reserved": 10e9}
    assert choose_budget(launches, **asked) == 65536
    assert choose_budget(launches, limit=64e9, **asked) == 32768
    assert choose_budget(launches, limit=28e9, **asked) == 4096
    assert choose_budget(Costs(0.001, 1.5e-5, None, 0.0), choice=ON_ACCELERATOR) == 8192


def test_no_budget_is_chosen_that_ran_out_of_memory() -> None:
    """Where nobody says how much memory there is, too."""
    costs = Costs(0.05, 1.5e-5, None, 0.0, too_large=8100)
    assert choose_budget(costs, choice=ON_ACCELERATOR) == 4096
    assert choose_budget(replace(costs, too_large=500), choice=ON_ACCELERATOR) == 256
    assert choose_budget(costs, longest=9000, choice=ON_ACCELERATOR) == 4096


def test_the_file_is_of_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = set()
    settings = finalize(settings_class("causal_lm")(model="m", data="d", out="o"))
    model = build("llama")
    for name, size in (("H100", 80), ("H100", 94), ("H200", 141)):
        monkeypatch.setattr(
            micro_tokens, "describe_device", lambda device, own=(name, size): ["cuda:0", *own]
        )
        keys.add(micro_tokens._key(model, settings))
    assert len(keys) == 3


def test_memory_bounds_the_budget() -> None:
    costly = Costs(seconds=0.4, seconds_per_token=0.004, bytes=3e9, bytes_per_token=1e6)
    assert choose_budget(costly, limit=4.1e9) == 896
    assert choose_budget(costly, limit=3.6e9) == 448
    assert choose_budget(costly, limit=4.1e9, reserved=0.5e9) == 448
    assert choose_budget(costly, limit=1e9) == ON_CPU.budgets[0]


def test_two_sizes_are_measured_and_the_first_run_does_not_count() -> None:
    seconds = iter([9.0, 1.0, 3.0, 0.9, 3.1])
    cut = {256: [250, 200], 1024: [700, 1000]}
    runs = []

    def run(budget: int, place: int) -> Sample:
        runs.append(cut[budget][place])
        return Sample(cut[budget][place], next(seconds), None)

    costs = measure_costs(lambda budget: cut[budget], run)
    assert runs == [200, 200, 1000, 200, 1000]
    assert costs is not None
    assert costs.seconds_per_token == pytest.approx(2.1 / 800)
    assert measure_costs(lambda _: [250, 300], run) is None


def test_costs_are_remembered_and_a_damaged_file_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "costs" / "one.json"
    assert cached_costs(path, lambda: COSTS) == COSTS
    assert cached_costs(path, lambda: pytest.fail("measured twice")) == COSTS
    path.write_text("{}", encoding="utf-8")
    assert cached_costs(path, lambda: None) is None
    assert cached_costs(path, lambda: replace(COSTS, too_large=900)) == replace(
        COSTS, too_large=900
    )
    assert cached_costs(path, lambda: COSTS) == COSTS
