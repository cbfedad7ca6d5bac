"""When a run's checkpoints are due, and how one is written: at once, beside the steps, or never.

The last one is written beside the export where steps would be. With ``keep: 0`` it would be deleted
as soon as the model is written, so it is written only if the model cannot be.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from samestep.engine.collectives import on_rank_0, world_size
from samestep.errors import CheckpointError
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

log = logging.getLogger("samestep")

_KEPT_ON_THE_WAY = 2
"""Checkpoints kept while a run goes on, unless the settings say another number."""

_WRITERS = 4
"""Files of a checkpoint that are written at a time beside an accelerator, where the CPU's memory
has room: on two cores 0.8 GB took 3.6 s so, and 8.3 s one by one."""


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
        self._left_out: Callable[[], Path] | None = None
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

    def save(self, progress: Progress, *, before: Literal["step", "export", "stop"]) -> None:
        """Write a checkpoint.

        Args:
            progress: How far the run is.
            before: What follows. Before the run stops it waits until the checkpoint is written.

        Raises:
            CheckpointError: It cannot be written, or the one before it could not, or weights are
                not finite.
        """
        self.watchdog.begin("saving", f"saving step {progress.step}")
        on_rank_0(self.folder.check_held)
        self.background.wait()
        self._tell()
        meanwhile = before != "stop" and saves_in_background(self.setup.micro_batches.device)
        model, optimizer = self.setup.model, self.setup.optimizer
        stays = before == "export" and self._weights_stay(progress)
        if before == "export":  # before the model is written, whenever the checkpoint is
            checkpoint.check_finite(model, progress.step)
        average = self.setup.average.tensors if self.setup.average else None
        objective = self.setup.objective.state
        if meanwhile and not stays:
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
            writers=_WRITERS if saves_in_background(self.setup.micro_batches.device) else 1,
            origin=self.origin | kept,
            average=average,
            objective=objective,
        )
        # On several ranks a signal may end the export of one alone: there nothing is left out.
        left_out = stays and self.settings.keep == 0 and world_size() == 1
        if left_out:
            self._left_out = write
        elif meanwhile:
            self.background.begin(write)
        else:
            write()
        if self.bits is not None:
            self.bits.save(progress.step)
        self._saved = self.clock()
        self._untold = None if left_out else progress.step
        self._tell()
        self.watchdog.begin("micro-batch", f"after saving step {progress.step}")

    def _weights_stay(self, progress: Progress) -> bool:
        """Whether the export only reads the weights of the last step."""
        settings, chosen = self.settings, progress.choice.step
        is_best = settings.best is None or chosen in (None, progress.step)
        return is_best and self.setup.average is None and not settings.merge

    def finish(self) -> None:
        """Wait for the last checkpoint.

        Raises:
            CheckpointError: It could not be written; the model is.
        """
        self.background.wait()
        self._tell()

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Around the export: if that fails, a checkpoint that was left out is written."""
        try:
            yield
        except BaseException:
            if self._left_out is not None:
                try:
                    self._left_out()
                except CheckpointError as failed:
                    log.error("%s", failed)
            raise

    def _tell(self) -> None:
        """Tell callbacks of the last checkpoint, once it is whole."""
        step = self._untold
        if step is None or self.background.busy:
            return
        self._untold = None
        path = step_folder(self.folder.checkpoints, step)
        on_rank_0(lambda: self.reporter.saved(path, step=step))
