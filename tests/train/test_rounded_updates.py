"""Updates that weights in low precision round away are said, with their share."""

import logging
import re
from pathlib import Path

import pytest
import torch
from runs import run_config

from samestep.train.rounded_updates import changed_share
from samestep.train.trainer import train


def test_the_share_counts_elements_over_all_weights() -> None:
    before = [torch.zeros(6), torch.ones(2, 2)]
    after = [torch.tensor([0.0, 1, 2, 0, 0, 0]), torch.ones(2, 2)]
    assert changed_share(before, after) == 0.2
    assert changed_share([], []) == 0


def shares(caplog: pytest.LogCaptureFixture) -> list[float]:
    lines = [record.getMessage() for record in caplog.records]
    found = [re.search(r"changed (less than )?(\d+)% of them", line) for line in lines]
    return [int(match[2]) / 100 for match in found if match]


def test_bfloat16_weights_are_warned_of_once_and_float32_ones_never(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = {}
    for name, dtype, lr in [("small", "bfloat16", 1e-6), ("large", "bfloat16", 1e-1)]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "samestep"):
            train(run_config(tmp_path, precision=dtype, lr=lr, steps=4, out=str(tmp_path / name)))
        (found[name],) = shares(caplog)
        assert "--precision float32" in caplog.text
    assert found["small"] < found["large"]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "samestep"):
        train(run_config(tmp_path, precision="float32", steps=4, out=str(tmp_path / "float32")))
    assert shares(caplog) == []
