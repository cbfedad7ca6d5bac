"""``deterministic``: PyTorch's deterministic kernels while a run goes on, and only then."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import run_config
from safetensors.torch import load_file

from samestep.errors import ConfigError
from samestep.train import trainer
from samestep.train.trainer import train


def test_a_run_is_deterministic_and_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen: list[tuple[bool, str | None]] = []
    step = trainer.step

    def noted(*args: Any, **kwargs: Any) -> Any:
        mode = torch.are_deterministic_algorithms_enabled()
        seen.append((mode, os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
        return step(*args, **kwargs)

    monkeypatch.setattr(trainer, "step", noted)
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    train(run_config(tmp_path, steps=2, deterministic=True))
    assert seen == [(True, ":4096:8")] * 2
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory == fill  # type: ignore[attr-defined]
    train(run_config(tmp_path, steps=2, out=str(tmp_path / "plain")))
    assert seen[2:] == [(False, ":4096:8")] * 2
    one, other = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("out", "plain")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_operation_that_has_no_such_kernel_ends_the_run_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(*_: Any, **__: Any) -> Any:
        # An operation without one, on every device.
        return torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)

    monkeypatch.setattr(trainer, "step", without)
    with pytest.raises(ConfigError, match=r"deterministic: put_ does not have a deterministic"):
        train(run_config(tmp_path, steps=1, deterministic=True))
    assert not torch.are_deterministic_algorithms_enabled()
