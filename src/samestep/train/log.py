"""Where the numbers of a run go: always JSONL, and the trackers that the settings name."""

import html
import json
import logging
import math
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from samestep.engine.evaluate import EvalReport
from samestep.engine.step import StepReport
from samestep.errors import ConfigError
from samestep.train.progress import Progress
from samestep.train.run_folder import RunFolder
from samestep.train.settings.base import TrainSettings
from samestep.train.settings.evaluation import evaluation_sets
from samestep.train.settings.rollouts import GenerationFields
from samestep.utils.extras import install_command
from samestep.utils.files import open_regular, write_atomically

log = logging.getLogger("samestep")


class Tracker(Protocol):
    """An optional writer of numbers and of answers by step."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Take the numbers of a step."""

    def table(self, step: int, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        """Take the answers to a set; all lines have the same columns."""

    def close(self) -> None:
        """Flush and end."""


class JsonLines:
    """A file of one JSON object a line, flushed after each.

    Raises:
        OSError: It cannot be opened, or is neither a file nor a device.
    """

    def __init__(self, path: Path) -> None:
        if path.exists() and stat.S_ISFIFO(path.stat().st_mode):
            raise OSError(f"{path} is a pipe")
        # Unbuffered: what could not be written must not come up again when the file is closed.
        self._file = path.open("ab", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        """Append one line, whole or not at all; numbers that are not finite become null.

        Raises:
            OSError: It cannot be written, as on a full disk.
        """
        line = (json.dumps(_finite(record), ensure_ascii=False) + "\n").encode()
        size, written = os.fstat(self._file.fileno()).st_size, 0
        try:
            while written < len(line):  # the system may take a part and say why at the next one
                written += self._file.write(line[written:])
        except OSError:
            with suppress(OSError):  # devices have no length
                self._file.truncate(size)
            raise

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
        progress: What a resumed run has behind it; later lines of the logs are dropped.

    Attributes:
        evaluated: The steps after which an evaluation is written down already.

    Raises:
        ConfigError: The package of a tracker is not installed.
    """

    def __init__(self, folder: RunFolder, settings: TrainSettings, *, progress: Progress) -> None:
        self._trackers = open_trackers(
            settings.track, folder=folder.tracking, run=folder.root.name, config=settings.saved()
        )
        done, choice = progress.step, progress.choice
        for path in (folder.log, folder.evaluations, folder.samples, folder.rollouts):
            keep_steps(path, done)
        uncounted = settings.best is not None and done > 0 and choice.judged != done
        if uncounted or not _sets_at(folder.evaluations, done) >= {*evaluation_sets(settings)}:
            for path in (folder.evaluations, folder.samples):
                keep_steps(path, done - 1)  # a kill came between: it is done again
        self.evaluated = _steps_in(folder.evaluations)
        self._log = JsonLines(folder.log)
        self._evaluations = JsonLines(folder.evaluations)
        self._samples = JsonLines(folder.samples) if settings.samples else None
        self._rollouts: JsonLines | None = None
        if isinstance(settings, GenerationFields) and settings.generates:
            self._rollouts = JsonLines(folder.rollouts) if settings.log_completions else None

    def step(self, report: StepReport, *, step: int, epoch: float, lr: float) -> dict[str, Any]:
        """Write a step down: a line with all of the report, scalars to the trackers."""
        record = {"step": step, "epoch": epoch, "lr": lr, **asdict(report)}
        self._log.write(record)
        terms = {f"train/{name}": value for name, value in report.terms.items()}
        scalars = {"loss": report.loss, "grad_norm": report.grad_norm, "lr": lr}
        self._track(step, terms | {f"train/{name}": value for name, value in scalars.items()})
        return record

    def evaluation(self, report: EvalReport, *, step: int, of: str = "") -> dict[str, Any]:
        """Write an evaluation down, with the name of its set if it has one."""
        record = {"step": step, **({"set": of} if of else {}), **asdict(report)}
        self._evaluations.write(record)
        group = f"eval/{of}" if of else "eval"
        values = {f"{group}/{name}": value for name, value in report.terms.items()}
        self._track(step, values | {f"{group}/loss": report.loss})
        return record

    def samples(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write the answers to a set down: a line each, a table to the trackers."""
        assert self._samples is not None
        for line in lines:
            self._samples.write(dict(line))
        step, of = lines[0]["step"], lines[0].get("set", "")
        shown = [
            {name: line[name] for name in line if name not in ("step", "set")} for line in lines
        ]
        for tracker in self._trackers:
            tracker.table(step, f"samples/{of}" if of else "samples", shown)

    def rollouts(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write rollouts down, if they are to be kept."""
        if self._rollouts is not None:
            for line in lines:
                self._rollouts.write(dict(line))

    def close(self) -> None:
        """Close every file and tracker."""
        if self._rollouts is not None:
            self._rollouts.close()
        if self._samples is not None:
            self._samples.close()
        self._log.close()
        self._evaluations.close()
        for tracker in self._trackers:
            tracker.close()

    def _track(self, step: int, values: dict[str, float]) -> None:
        for tracker in self._trackers:
            tracker.write(step, values)


def keep_steps(path: Path, done: int) -> None:
    """Cut a log back to its first ``done`` steps: a resumed run writes the later ones again.

    Lines that are damaged, as after a crash of the machine, are left out; a warning says which.

    Raises:
        OSError: It cannot be read or written, or is no file.
    """
    if not path.exists():
        return
    with open_regular(path) as file:
        lines = file.read().splitlines()
    steps = [_step_of(line) for line in lines]
    damaged = [number for number, step in enumerate(steps, 1) if step is None]
    if damaged:
        log.warning(
            "%s: %d damaged lines are left out (line %s)",
            *(path, len(damaged), ", ".join(map(str, damaged[:5])) + (", …" * (len(damaged) > 5))),
        )
    pairs = zip(lines, steps, strict=True)
    kept = [line.decode() for line, step in pairs if step is not None and step <= done]
    write_atomically(path, "".join(line + "\n" for line in kept))


def _step_of(line: bytes) -> int | None:
    """The step that a line of a log is about; None: it is damaged."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if type(step) is int else None


def _sets_at(path: Path, step: int) -> set[str]:
    """The names of the sets whose evaluation after a step is written down."""
    if not path.exists():
        return set()
    with open_regular(path) as file:
        records = [json.loads(line) for line in file.read().splitlines()]
    return {str(record.get("set", "")) for record in records if record["step"] == step}


def _steps_in(path: Path) -> set[int]:
    if not path.exists():
        return set()
    with open_regular(path) as file:
        steps = {_step_of(line) for line in file.read().splitlines()}
    return {step for step in steps if step is not None}


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
            f"track: a package is missing ({error}): {install_command('track')}"
        ) from error


def _columns_and_rows(lines: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    return list(lines[0]), [list(line.values()) for line in lines]


def _cell(value: Any) -> str:
    """A value as a cell of a table in Markdown, which shows it as it is."""
    text = html.escape(str(value), quote=False).replace("|", "&#124;")
    return "<br>".join(text.splitlines())


class _TensorBoard:
    def __init__(self, folder: Path, *, run: str, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("config", json.dumps(config))

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def table(self, step: int, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        rows = [list(lines[0]), ["---"] * len(lines[0]), *(list(line.values()) for line in lines)]
        text = "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, *, run: str, config: dict[str, Any]) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self._table = wandb.Table
        self._run = wandb.init(project="samestep", name=run, config=config, dir=str(folder))

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def table(self, step: int, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        self._run.log({name: self._table(*_columns_and_rows(lines))}, step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, folder: Path, *, run: str, config: dict[str, Any]) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(project="samestep", name=run, config=config)

    def write(self, step: int, values: dict[str, float]) -> None:
        self._trackio.log(values, step=step)

    def table(self, step: int, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        table = self._trackio.Table(*_columns_and_rows(lines))
        self._trackio.log({name: table}, step=step)

    def close(self) -> None:
        self._trackio.finish()


_TRACKERS: dict[str, type[_TensorBoard | _Wandb | _Trackio]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}
