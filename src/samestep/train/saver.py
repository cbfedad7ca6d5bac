"""When a run's checkpoints are due, and how one is written: at once, or beside the next steps."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from samestep.engine.collectives import on_rank_0
from samestep.train import checkpoint
from samestep.train.background_save import (
    BackgroundSave,
    copied,
    saves_in_background,
    snapshot,
)
from samestep.train.bitwise import BitRun
from samestep.train.checkpoint_files import step_folder
from samestep.train.decisions import NAME, decisions_of
from samestep.train.progress import Progress
from samestep.train.reporter import RunReporter
from samestep.train.run_folder import RunFolder
from samestep.train.settings.base import TrainSettings
from samestep.train.setup import TrainingSetup
from samestep.train.watchdog import Watchdog

_KEPT_ON_THE_WAY = 2
"""Checkpoints kept while a run goes on, unless the settings say another number."""


@dataclass(kw_only=True)
class Saver:
    """Saves a run, on all ranks together.

    Attributes:
        settings: ``save_every``, ``save_minutes``, ``keep``.
        folder: Where the checkpoints are.
        setup: The model, its optimizer, its average.
        reporter: Tells callbacks.
        watchdog: Is told what begins.
        origin: What checkpoints keep of what the run depends on.
        bits: Under ``bitwise``: what carries and writes them.
        clock: Seconds.
        background: Writes beside the steps, on accelerators.
    """

    settings: TrainSettings
    folder: RunFolder
    setup: TrainingSetup
    reporter: RunReporter
    watchdog: Watchdog
    origin: dict[str, Any]
    bits: BitRun | None
    clock: Callable[[], float] = time.monotonic
    background: BackgroundSave = field(default_factory=BackgroundSave)

    def __post_init__(self) -> None:
        self._untold: int | None = None
        self.start()

    def start(self) -> None:
        """Count the minutes from now on."""
        self._saved = self.clock()

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due after a step, by its number or by this rank's clock.

        Args:
            step: Steps done.

        Returns:
            Whether; ranks whose clocks differ must take that of one of them.
        """
        every, minutes = self.settings.save_every, self.settings.save_minutes
        late = minutes is not None and self.clock() - self._saved >= 60 * minutes
        return late or (every is not None and step % every == 0)

    def check(self) -> None:
        """Look, without waiting, at what is being written.

        Raises:
            Exception: What writing it raised.
        """
        self.background.check()
        self._tell()

    def save(self, progress: Progress, *, ends: bool) -> None:
        """Write a checkpoint.

        Args:
            progress: How far the run is.
            ends: Whether no step follows: then the run waits until it is written.

        Raises:
            CheckpointError: It cannot be written, or the one before it could not.
        """
        self.watchdog.begin("saving", f"saving step {progress.step}")
        on_rank_0(self.folder.check_held)
        self.background.wait()
        self._tell()
        meanwhile = not ends and saves_in_background(self.setup.micro_batches.device)
        model, optimizer = self.setup.model, self.setup.optimizer
        average = self.setup.average.tensors if self.setup.average else None
        objective = self.setup.objective.state
        if meanwhile:
            model, optimizer = snapshot(model, optimizer)
            average, objective = copied(average), copied(dict(objective))
        kept = {NAME: decisions_of(self.setup)}
        if self.bits is not None:
            kept["bitwise"] = self.bits.state()
        write = partial(
            checkpoint.save,
            self.folder.checkpoints,
            model,
            optimizer=optimizer,
            progress=progress,
            keep=self.settings.keep or _KEPT_ON_THE_WAY,
            origin=self.origin | kept,
            average=average,
            objective=objective,
        )
        if meanwhile:
            self.background.begin(write)
        else:
            write()
        if self.bits is not None:
            self.bits.save(progress.step)
        self._saved = self.clock()
        self._untold = progress.step
        self._tell()
        self.watchdog.begin("micro-batch", f"after saving step {progress.step}")

    def _tell(self) -> None:
        """Tell callbacks of the last checkpoint, once it is whole."""
        step = self._untold
        if step is None or self.background.busy:
            return
        self._untold = None
        path = step_folder(self.folder.checkpoints, step)
        on_rank_0(lambda: self.reporter.saved(path, step=step))
