"""``deterministic``: PyTorch's deterministic kernels while a run goes on, and only then."""

import os
from pathlib import Path
from typing import Any

import bit_runs
import pytest
import torch
from runs import run_config
from safetensors.torch import load_file

import samestep
from samestep import cli
from samestep.engine import repeatable
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


CUBLAS = (
    "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` or "
    "`at::Context::setDeterministicAlgorithms(true)`, but this operation is not deterministic "
    "because it uses CuBLAS and you have CUDA >= 10.2. To enable deterministic behavior in this "
    "case, you must set an environment variable before running your PyTorch application: "
    "CUBLAS_WORKSPACE_CONFIG=:4096:8 or CUBLAS_WORKSPACE_CONFIG=:16:8."
)
"""What PyTorch says of a product once it has read the environment without the variable."""


def fails(*_: Any, **__: Any) -> Any:
    raise RuntimeError(CUBLAS)


def test_cublas_that_was_used_before_is_a_setting_to_correct(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:2")
    remedy = r"deterministic: cuBLAS does not.*\(it is :4096:2 now\).*first cell"
    optimizer = torch.optim.SGD((model := bit_runs.TwoLayers()).parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="bitwise: cuBLAS does not"):
        samestep.step(model, optimizer, bit_runs.packs(0), fails, bitwise=samestep.Bitwise())
    monkeypatch.setattr(trainer, "step", fails)
    with pytest.raises(ConfigError, match=remedy):
        train(run_config(tmp_path, steps=1, deterministic=True))
    with pytest.raises(ConfigError, match="bitwise: cuBLAS does not"):
        train(run_config(tmp_path, steps=1, bitwise=True, out=str(tmp_path / "bits")))


def test_a_process_that_has_used_a_gpu_is_asked_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later the message would be taken for one about the model."""
    monkeypatch.setattr(trainer, "set_up", lambda *_, **__: pytest.fail("loads"))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(repeatable, "multiply_on_gpu", fails)
    with pytest.raises(ConfigError, match="deterministic: cuBLAS does not"):
        train(run_config(tmp_path, deterministic=True))
    with pytest.raises(ConfigError, match="bitwise: cuBLAS does not"):
        train(run_config(tmp_path, bitwise=True))
    assert not torch.are_deterministic_algorithms_enabled()
    assert not (tmp_path / "out").exists()  # no trace of it
    monkeypatch.setattr(repeatable, "multiply_on_gpu", lambda: torch.ones(1).reshape(2))
    with pytest.raises(RuntimeError, match="shape"):  # what is about something else stays
        train(run_config(tmp_path, deterministic=True))


@pytest.mark.parametrize(("command", "set_for"), [("train", ":4096:8"), ("check", None)])
def test_a_command_that_trains_lets_cublas_repeat_before_torch_is_used(
    command: str, set_for: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    seen: list[str | None] = []

    def noted(name: str) -> Any:
        seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        raise ConfigError("enough")

    monkeypatch.setattr(cli, "import_module", noted)
    assert cli.main([command]) == cli.BAD_INPUT
    assert seen == [set_for]
