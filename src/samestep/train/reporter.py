"""What a run shows and writes down while it goes: rank 0 alone does it.

A bar on a terminal and in a notebook, plain lines elsewhere; and the run's logs.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as ProgressBar

from samestep.engine.collectives import gather_results, rank
from samestep.engine.evaluate import EvalReport
from samestep.engine.step import StepReport
from samestep.errors import CheckpointError
from samestep.train.callbacks import Callback
from samestep.train.log import RunLog
from samestep.train.notebook import NOTEBOOK_WIDTH, NotebookBar, in_notebook
from samestep.train.progress import Progress
from samestep.train.run_folder import RunFolder
from samestep.train.settings.base import TrainSettings
from samestep.utils.text import printable

_BAR_WIDTH = 10

_PATIENCE = 10.0
"""Seconds without a line after which a step that is under way gets one, where there is no bar."""


def fit_line(parts: Sequence[str], width: int) -> str:
    """As many parts as a line holds, those that come first before the others; never none.

    Args:
        parts: In the order of their worth.
        width: Of the line.

    Returns:
        The line.
    """
    line = parts[0]
    for part in parts[1:]:
        if len(line) + 2 + len(part) > width:
            break
        line += f"  {part}"
    return line


_LONGEST = timedelta(days=999)


def duration(seconds: float) -> str:
    """A duration in words; one that nobody waits for is not told to the second.

    Args:
        seconds: It.

    Returns:
        Such as "1:02:03".
    """
    if not seconds < _LONGEST.total_seconds():
        return f"over {_LONGEST.days} days"
    return str(timedelta(seconds=round(seconds)))


class RunConsole:
    """Shows a run on stderr, so that stdout stays free for results.

    Args:
        total: Steps of the whole run.
        done: Steps already done before this call.
        silent: Show nothing.
        console: Where; stderr by default.
        clock: Seconds.
    """

    def __init__(
        self,
        *,
        total: int,
        done: int,
        silent: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console(stderr=True, highlight=False, markup=False, quiet=silent)
        self._total, self._done = total, done
        self._seconds, self._steps, self._tokens = 0.0, 0, 0
        self._parts: list[str] = []
        self._clock, self._last_line = clock, clock()
        self._bar = ProgressBar(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=_BAR_WIDTH),
            TextColumn("{task.fields[state]}", markup=False),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=total, completed=done, state="starting")
        self._notebook: NotebookBar | None = None
        if console is None and not silent and in_notebook():
            self._notebook = NotebookBar(total=total, done=done, clock=clock)
            # What is said is text: a display for each line would be as many messages.
            self._console = Console(
                force_jupyter=False,
                width=NOTEBOOK_WIDTH,
                no_color=True,
                highlight=False,
                markup=False,
            )
        self._draws = self._notebook is not None or not self._bar.disable

    def __enter__(self) -> "RunConsole":
        """Start the bar."""
        (self._notebook or self._bar).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the bar."""
        if self._parts:
            self._update(self._parts)  # not the micro-batch that was shown last
        (self._notebook or self._bar).stop()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        with suppress(OSError):  # stderr on a full disk, or closed: the run itself goes on
            self._console.print(printable(text), soft_wrap=True)
        self._last_line = self._clock()

    def step(self, report: StepReport, *, lr: float) -> None:
        """Show a step that was done."""
        self._done += 1
        self._steps += 1
        self._seconds += report.seconds
        self._tokens += report.tokens
        left = (self._total - self._done) * self._seconds / self._steps
        self._parts = [
            *([f"skipped ({report.skipped})"] if report.skipped else []),
            *([f"reward {report.terms['reward']:.4f}"] if "reward" in report.terms else []),
            f"loss {report.loss:.4f}",
            f"eta {duration(left)}",
            f"{self._tokens / self._seconds:,.0f} tokens/s",
            f"norm {report.grad_norm:.3g}",
            f"lr {lr:.3g}",
            f"{report.micro_batches} micro-batches",
        ]
        self._update(self._parts)
        if not self._draws:
            first = f"step {self._done}/{self._total}  {self._parts[0]}"
            self.say(fit_line([first, *self._parts[1:]], self._console.width))

    def micro_batch(self, where: str, number: int, of: int) -> None:
        """Show that a step or an evaluation moves, where it takes long.

        Args:
            where: Such as "step 3".
            number: Of the micro-batch that begins, from 1.
            of: How many there are.
        """
        moving = f"micro-batch {number} of {of}"
        if self._draws:
            self._update([moving, *self._parts])
        elif self._clock() - self._last_line >= _PATIENCE:
            self.say(f"{where}: {moving}")

    def _update(self, parts: Sequence[str]) -> None:
        room = self._console.width - len(f"step {self._total}/{self._total}") - _BAR_WIDTH - 2
        state = fit_line(parts, room)
        if self._notebook is not None:
            self._notebook.update(completed=self._done, state=state)
        else:
            self._bar.update(self._task, completed=self._done, state=state)

    def evaluation(self, report: EvalReport, *, step: int, of: str = "") -> None:
        """Show an evaluation, with the name of its set."""
        metrics = "  ".join(f"{name} {value:.4f}" for name, value in report.terms.items())
        targets = report.counts.get("token", 0)
        parts = [
            f"evaluation{of and f' of {of}'} after step {step}: loss {report.loss:.4f}",
            f"({targets:,.0f} targets, {report.seconds:.1f} s)",
            metrics,
        ]
        self.say(fit_line(parts, self._console.width))


class RunReporter:
    """The log and the console of a run, on rank 0; silent on the others.

    Args:
        folder: The run's folder, open for writing.
        settings: The settings.
        total: Steps of the whole run.
        progress: How far it is.
        callbacks: The user's own, told of what is written down.

    Attributes:
        evaluated: The steps after which an evaluation is written down already.

    Raises:
        ConfigError: The package of a tracker is not installed.
        CheckpointError: The logs cannot be written.
    """

    def __init__(
        self,
        folder: RunFolder,
        settings: TrainSettings,
        *,
        total: int,
        progress: Progress,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self._callbacks = tuple(callbacks)
        done = progress.step
        self._console = RunConsole(total=total, done=done, silent=rank() > 0)
        self._folder = folder
        self._log: RunLog | None = None

        def start() -> list[int]:
            if rank() > 0:
                return []
            try:
                self._log = RunLog(folder, settings, progress=progress)
            except OSError as error:
                raise self._unwritable(error) from error
            return sorted(self._log.evaluated)

        self.evaluated = set(gather_results(start)[0])

    def __enter__(self) -> "RunReporter":
        """Start the bar."""
        self._console.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the bar, and close the files."""
        self._console.__exit__(kind, error, trace)
        if self._log is not None:
            self._log.close()

    def say(self, text: str) -> None:
        """Show a line."""
        self._console.say(text)

    def micro_batch(self, where: str, number: int, of: int) -> None:
        """Show that a step or an evaluation moves, where it takes long."""
        self._console.micro_batch(where, number, of)

    def step(
        self,
        report: StepReport,
        rollouts: Iterable[Mapping[str, Any]] = (),
        *,
        step: int,
        epoch: float,
        lr: float,
    ) -> None:
        """Write a step down with the rollouts that it learned from, and show it.

        Raises:
            CheckpointError: The log cannot be written.
        """
        if self._log is None:
            return
        try:
            self._log.rollouts(rollouts)
            record = self._log.step(report, step=step, epoch=epoch, lr=lr)
        except OSError as error:
            raise self._unwritable(error) from error
        self._console.step(report, lr=lr)
        for callback in self._callbacks:
            callback.on_step(deepcopy(record))

    def evaluation(self, report: EvalReport, *, step: int, of: str = "") -> None:
        """Write an evaluation down with the name of its set, and show it.

        Raises:
            CheckpointError: The log cannot be written.
        """
        if self._log is None:
            return
        try:
            record = self._log.evaluation(report, step=step, of=of)
        except OSError as error:
            raise self._unwritable(error) from error
        self._console.evaluation(report, step=step, of=of)
        for callback in self._callbacks:
            callback.on_evaluation(deepcopy(record))

    def saved(self, path: Path, *, step: int) -> None:
        """Tell of a checkpoint."""
        for callback in self._callbacks:
            callback.on_save({"step": step, "path": str(path)})

    def ended(self, summary: dict[str, Any]) -> None:
        """Tell of the end."""
        for callback in self._callbacks:
            callback.on_end(deepcopy(summary))

    def samples(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write answers down.

        Raises:
            CheckpointError: They cannot be written.
        """
        if self._log is None or not lines:
            return
        try:
            self._log.samples(lines)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"the logs in {self._folder.root} cannot be written ({error}): the run stops here. "
            "Fix that, and continue from the last checkpoint with --resume"
        )
