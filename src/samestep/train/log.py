"""Where the numbers of a run go: always JSONL, and the trackers that the settings name."""

import errno
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from samestep.engine.evaluate import EvalReport
from samestep.engine.step import StepReport
from samestep.errors import ConfigError
from samestep.train.run_folder import RunFolder
from samestep.train.settings.base import TrainSettings
from samestep.utils.files import write_atomically


class Tracker(Protocol):
    """An optional writer of numbers by step."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Take the numbers of a step."""

    def close(self) -> None:
        """Flush and end."""


class JsonLines:
    """A file of one JSON object a line, flushed after each."""

    def __init__(self, path: Path) -> None:
        # Unbuffered: what could not be written must not come up again when the file is closed.
        self._file = path.open("ab", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        """Append one line; numbers that are not finite, which JSON has not, become null.

        Raises:
            OSError: It cannot be written, as on a full disk.
        """
        line = (json.dumps(_finite(record), ensure_ascii=False) + "\n").encode()
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunLog:
    """Everything that a run writes down while it goes.

    Args:
        folder: The run's folder, open for writing.
        settings: ``track`` names the trackers.
        done: Steps that a resumed run has behind it; later lines of the logs are dropped.

    Attributes:
        evaluated: The steps after which an evaluation is written down already.

    Raises:
        ConfigError: The package of a tracker is not installed.
    """

    def __init__(self, folder: RunFolder, settings: TrainSettings, *, done: int) -> None:
        self._trackers = open_trackers(
            settings.track, folder=folder.tracking, run=folder.root.name, config=settings.saved()
        )
        for path in (folder.log, folder.evaluations):
            keep_steps(path, done)
        self.evaluated = _steps_in(folder.evaluations)
        self._log = JsonLines(folder.log)
        self._evaluations = JsonLines(folder.evaluations)

    def step(self, report: StepReport, *, step: int, epoch: float, lr: float) -> None:
        """Write a step down: a line with all of the report, scalars to the trackers."""
        self._log.write({"step": step, "epoch": epoch, "lr": lr, **asdict(report)})
        terms = {f"train/{name}": value for name, value in report.terms.items()}
        scalars = {"loss": report.loss, "grad_norm": report.grad_norm, "lr": lr}
        self._track(step, terms | {f"train/{name}": value for name, value in scalars.items()})

    def evaluation(self, report: EvalReport, *, step: int) -> None:
        """Write an evaluation down."""
        self._evaluations.write({"step": step, **asdict(report)})
        terms = {f"eval/{name}": value for name, value in report.terms.items()}
        self._track(step, terms | {"eval/loss": report.loss})

    def close(self) -> None:
        """Close every file and tracker."""
        self._log.close()
        self._evaluations.close()
        for tracker in self._trackers:
            tracker.close()

    def _track(self, step: int, values: dict[str, float]) -> None:
        for tracker in self._trackers:
            tracker.write(step, values)


def keep_steps(path: Path, done: int) -> None:
    """Cut a log back to its first ``done`` steps: a resumed run writes the later ones again."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= done]
    write_atomically(path, "".join(line + "\n" for line in kept))


def _steps_in(path: Path) -> set[int]:
    if not path.exists():
        return set()
    return {json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()}


def open_trackers(
    names: Sequence[str], *, folder: Path, run: str, config: dict[str, Any]
) -> list[Tracker]:
    """Start the optional writers.

    Args:
        names: "tensorboard", "wandb", "trackio".
        folder: Where they keep files.
        run: A name for the run.
        config: The settings, to show beside the curves.

    Returns:
        The writers.

    Raises:
        ConfigError: The package of a writer is not installed.
    """
    try:
        return [_TRACKERS[name](folder, run=run, config=config) for name in names]
    except ImportError as error:
        raise ConfigError(
            f"track: a package is missing ({error}): pip install 'samestep[track]'"
        ) from error


class _TensorBoard:
    def __init__(self, folder: Path, *, run: str, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("config", json.dumps(config))

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, *, run: str, config: dict[str, Any]) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(project="samestep", name=run, config=config, dir=str(folder))

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, folder: Path, *, run: str, config: dict[str, Any]) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(project="samestep", name=run, config=config)

    def write(self, step: int, values: dict[str, float]) -> None:
        self._trackio.log(values, step=step)

    def close(self) -> None:
        self._trackio.finish()


_TRACKERS: dict[str, type[_TensorBoard | _Wandb | _Trackio]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}
