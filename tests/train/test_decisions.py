"""What was measured for a run is in its checkpoints, and a deterministic one goes on with it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import run_config, write_rows
from safetensors.torch import load_file

from samestep.errors import OutOfMemoryError
from samestep.train import decisions, setup, trainer
from samestep.train.checkpoint_files import all_checkpoints, read_origin
from samestep.train.decisions import Decisions, decisions_before
from samestep.train.run_folder import RunFolder
from samestep.train.settings.base import TrainSettings
from samestep.train.trainer import train

MEASURED = 64


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, whole, and one that was stopped after its second, both measured."""
    folder = tmp_path_factory.mktemp("begun")
    write_rows(folder / "rows.jsonl", 24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "choose_micro_tokens", lambda *_, **__: MEASURED)
        train(config(folder, out=str(folder / "whole")))
        stop_in_step(patch, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train(config(folder))
    return folder


@pytest.fixture
def stopped(begun: Path, tmp_path: Path) -> Path:
    """The stopped run's folder, to go on in."""
    return shutil.copytree(begun / "out", tmp_path / "out")


def config(folder: Path, **changes: Any) -> TrainSettings:
    """Under SGD a gradient's last bits reach the weights."""
    options = {"deterministic": True, "save_every": 1, "steps": 4, "keep": 9, "optimizer": "sgd"}
    return run_config(folder, **{**options, **changes})


def stop_in_step(patch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    step, done = trainer.step, []

    def stops(*arguments: Any, **options: Any) -> Any:
        done.append(1)
        if len(done) == number:
            raise error
        return step(*arguments, **options)

    patch.setattr(trainer, "step", stops)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def with_budget(patch: pytest.MonkeyPatch, chosen: int) -> None:
    patch.setattr(setup, "choose_micro_tokens", lambda *_, **__: chosen)


def test_another_measurement_changes_no_bit(
    begun: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_budget(monkeypatch, 256)
    train(config(begun, out=str(stopped), resume=True))
    assert same(weights(stopped), weights(begun / "whole"))


@pytest.mark.parametrize("changes", [{"deterministic": False}, {"micro_tokens": 256}], ids=str)
def test_without_the_flag_or_with_another_setting_it_may(
    changes: dict[str, Any], begun: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the test above could not fail."""
    with_budget(monkeypatch, 256)
    train(config(begun, out=str(stopped), resume=True, **changes))
    assert not same(weights(stopped), weights(begun / "whole"))
    kept = read_origin(all_checkpoints(stopped / "checkpoints")[-1])["decisions"]
    assert kept == {"budget": 256, "compiled": False, "recomputed": False}


@pytest.mark.parametrize("unit", ["micro_tokens", "micro_batch"])
def test_a_budget_that_was_halved_stays_halved(
    unit: str, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {unit: 128 if unit == "micro_tokens" else 6, "steps": 3}
    whole, out = tmp_path / "whole", tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_in_step(patch, 2, OutOfMemoryError("full"))
        train(config(begun, out=str(whole), **options))
    with monkeypatch.context() as patch:
        stop_in_step(patch, 2, OutOfMemoryError("full"))
        stop_in_step(patch, 4, KeyboardInterrupt())  # the second step was taken twice
        with pytest.raises(KeyboardInterrupt):
            train(config(begun, out=str(out), **options))
    train(config(begun, out=str(out), resume=True, **options))
    assert same(weights(out), weights(whole))
    kept = read_origin(all_checkpoints(out / "checkpoints")[-1])["decisions"]
    assert kept["budget"] < options[unit]


def test_compiled_and_recomputed_layers_stay_as_they_are(
    begun: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU packs do not compile whole, so what the setup is asked for is looked at."""
    asked: list[tuple[str, str, int | None]] = []
    set_up = trainer.set_up

    def noted(settings: TrainSettings, *, budget: int | None) -> Any:
        asked.append((settings.compile, settings.gradient_checkpointing, budget))
        return set_up(settings.model_copy(update={"compile": "none"}), budget=budget)

    monkeypatch.setattr(trainer, "set_up", noted)
    again = config(begun, out=str(stopped), resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(decisions, "compiled_layers", lambda model: [model])
        stop_in_step(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train(again)
    train(again)
    assert asked == [("none", "auto", MEASURED), ("layers", "auto", MEASURED)]
    kept = Decisions(compiled=False, recomputed=True)
    found = kept.put_into(again)
    assert (found.compile, found.gradient_checkpointing) == ("none", "selective")
    asked_for = config(begun, compile="layers", gradient_checkpointing="auto")
    assert kept.put_into(asked_for).compile == "layers"


@pytest.mark.parametrize(
    "chosen",
    [{"compiled": True, "recomputed": False}, {"compiled": False, "recomputed": True}],
    ids=["compiled", "recomputed"],
)
@pytest.mark.parametrize(
    "changes",
    [{"gradient_checkpointing": "none", "activation_offload": True}, {"device": "cpu"}],
    ids=["offload", "device"],
)
def test_what_the_new_settings_rule_out_is_chosen_anew(
    begun: Path,
    stopped: Path,
    monkeypatch: pytest.MonkeyPatch,
    chosen: dict[str, bool],
    changes: dict[str, Any],
) -> None:
    """What was chosen went with other settings; layers that are offloaded are not compiled."""
    settings = config(begun, out=str(stopped), resume=True, device="auto")
    origin = {"settings": settings.saved(), "decisions": {"budget": 64, **chosen}}
    monkeypatch.setattr(decisions, "read_origin", lambda _: origin)
    folder = RunFolder(stopped)
    assert decisions_before(settings, folder) == Decisions(budget=64, **chosen)
    changed = settings.model_copy(update=changes)
    decided = decisions_before(changed, folder)
    assert (decided.compiled, decided.recomputed) == (None, None)
    assert decided.budget == (None if "device" in changes else 64)
    assert decided.put_into(changed) == changed


def test_bit_equal_steps_compile_nothing_that_was_not_asked_for(tmp_path: Path) -> None:
    bits = config(tmp_path, bitwise=True)
    assert bits.compile == "none"
    assert config(tmp_path, bitwise=True, compile="layers").compile == "layers"
    assert config(tmp_path).compile == "auto"
