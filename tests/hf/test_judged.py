"""The auditor's judgement of a trainer that exact() was applied to, and of the same without."""

from pathlib import Path
from typing import Any

import pytest
from exact_cases import plain

import samestep
from samestep.hf.exact_trainer import exact

AXES = ("micro-batch", "short-window", "zero-target", "reported", "evaluation-batch")


def factory(folder: Path, *, apply: bool) -> Any:
    def make_trainer(
        *, per_device_train_batch_size: int, gradient_accumulation_steps: int, **_: Any
    ) -> Any:
        make = plain("BertForMaskedLM", "tokens", number=12)
        trainer = make(per_device_train_batch_size, gradient_accumulation_steps, folder)
        return exact(trainer) if apply else trainer

    return make_trainer


@pytest.mark.sampled(4)
@pytest.mark.parametrize("apply", [True, False])
def test_the_auditor_finds_it_exact(tmp_path: Path, apply: bool) -> None:
    report = samestep.check(factory(tmp_path, apply=apply), axes=AXES)
    verdicts = {axis.name: axis.verdict for axis in report.axes}
    assert set(verdicts) == set(AXES)
    if apply:
        assert set(verdicts.values()) == {"exact"}, verdicts
    else:
        assert verdicts["micro-batch"] == "inexact"
