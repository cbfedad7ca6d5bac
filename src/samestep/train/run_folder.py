"""The folder of a run: what stands where, and who may write there. No PyTorch."""

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from samestep.errors import CheckpointError, ConfigError
from samestep.train.checkpoint_files import all_checkpoints, read_origin
from samestep.train.settings.base import (
    TrainSettings,
    resume_may_change,
    with_current_names,
)
from samestep.train.settings.paths import texts_of
from samestep.utils.files import remove, replaced_name, user_path, write_atomically
from samestep.utils.messages import read_yaml

log = logging.getLogger("samestep")

_LENGTH = ("  - steps:", "  - epochs:")


class RunFolder:
    """Paths under ``--out``.

    Attributes:
        root: The folder itself.
        config: ``config.yaml``, the settings.
        log: ``log.jsonl``, a line a step.
        evaluations: ``eval.jsonl``, a line an evaluation.
        digests: ``digests.jsonl``, under ``bitwise`` a line a step.
        samples: ``samples.jsonl``, a line an answer that is shown.
        rollouts: ``rollouts.jsonl``, a line a completion that was generated to learn from.
        summary: ``summary.json``, written at the end.
        checkpoints: ``checkpoints/``.
        model: ``model/``, the trained model or adapter.
        tracking: ``tracking/``, what optional writers keep on disk.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"
        self.log = root / "log.jsonl"
        self.evaluations = root / "eval.jsonl"
        self.digests = root / "digests.jsonl"
        self.samples = root / "samples.jsonl"
        self.rollouts = root / "rollouts.jsonl"
        self.summary = root / "summary.json"
        self.checkpoints = root / "checkpoints"
        self.model = root / "model"
        self.tracking = root / "tracking"
        self._lock_file = root / ".lock"
        self._lock = FileLock(self._lock_file)
        self._held: os.stat_result | None = None
        self._made: list[Path] = []

    def holds_a_run(self) -> bool:
        """Whether a run has written here."""
        return any(path.exists() for path in self._contents())

    def hold(self, settings: TrainSettings) -> None:
        """Let no other run write here, then refuse a folder that this run must not write to.

        If it ends before `open`, `close` leaves no trace of it.

        Raises:
            ConfigError: Another run writes there, or nobody can; it holds another run, or one
                with other settings than those to resume; an input lies where a run writes.
        """
        self._refuse_file()
        try:
            self._lock_folder()
            self.check(settings)
        except OSError as error:
            self.close()
            raise self._unwritable(error) from error
        except ConfigError:
            self.close()
            raise

    def check(self, settings: TrainSettings) -> None:
        """Refuse a folder that this run must not write to; writes nothing.

        Raises:
            ConfigError: It holds another run, or one with other settings than those to resume; an
                input lies where a run writes; something there is a link.
        """
        self._refuse_file()
        self._refuse_links()
        self._refuse_inputs_inside(settings)
        if not self.holds_a_run() or settings.overwrite:
            return
        if not settings.resume:
            raise ConfigError(
                f"out: {self.root} already holds a run. Continue it with --resume, replace it "
                "with --overwrite, or choose another folder"
            )
        self._check_same(settings)
        if self.summary.exists() and not all_checkpoints(self.checkpoints):
            raise ConfigError(
                f"resume: the run in {self.root} is finished, and kept no checkpoint (--keep 0). "
                f"Train on from its model: --model {self.model} --out ANOTHER-FOLDER"
            )

    def _refuse_file(self) -> None:
        if self.root.exists() and not self.root.is_dir():
            raise ConfigError(f"out: {self.root} is a file, not a folder")

    def _refuse_links(self) -> None:
        """What a run writes must land in the folder, not where a link in it points to."""
        own = (*self._contents(), self._lock_file, *self._children(self.tracking))
        links = [path for path in own if path.is_symlink()]
        if links:
            raise ConfigError(
                f"out: {', '.join(map(str, links))}: links are not written through. Make out "
                "itself another folder, or remove them"
            )

    def _refuse_inputs_inside(self, settings: TrainSettings) -> None:
        """Overwriting deletes what the folder holds, and the end of a run replaces the model."""
        own = [path.resolve() for path in self._contents()]
        problems = []
        saved = settings.saved().items()
        given = [(name, text) for name, value in saved for text in texts_of(value)]
        for name, value in given:
            if name == "out" or "\0" in value:
                continue
            with suppress(OSError, RuntimeError):
                path = user_path(value)
                within = [part for part in own if path.resolve().is_relative_to(part)]
                if within and path.exists():
                    problems.append(
                        f"{name}: {value} lies in {within[0]}, which a run with this out replaces: "
                        "choose another out, or copy it first"
                    )
        if problems:
            raise ConfigError("\n".join(problems))

    def _check_same(self, settings: TrainSettings) -> None:
        before = self.settings_before()
        if before is None:
            return
        now, defaults = settings.saved(), type(settings).model_fields
        free = resume_may_change(before, settings)
        kept = free & now.keys()
        unknown = now.keys() - before.keys() - free
        changed = [
            f"  - {name}: was {before.get(name)!r}, is {now.get(name)!r}"
            for name in sorted({*before, *now} - free - unknown)
            if before.get(name) != now.get(name)
        ]
        lengths = {"steps", "epochs"} & before.keys()  # damaged settings may lack them
        longer = {name for name in lengths if before[name] != now[name]}
        if longer and settings.schedule == "constant" and not 0 < settings.warmup < 1:
            # The rate of a step does not depend on how many there are.
            changed = [line for line in changed if not line.startswith(_LENGTH)]
            longer = set()
        if longer:
            changed.append(self._about_length(settings))
        if changed:
            raise ConfigError(
                f"resume: the run in {self.root} had other settings:\n"
                + "\n".join(changed)
                + "\nGive the same ones (only "
                + ", ".join(sorted(kept))
                + " may change), or start anew with --overwrite"
            )
        lost = sorted(name for name in unknown if getattr(settings, name) != defaults[name].default)
        if lost:
            log.warning(
                "resume: what the run in %s had for %s is not known: not compared",
                *(self.root, ", ".join(lost)),
            )

    def settings_before(self) -> dict[str, Any] | None:
        """The settings that the run had: the newest checkpoint's copy, else config.yaml."""
        for checkpoint in reversed(all_checkpoints(self.checkpoints)):
            with suppress(CheckpointError):
                saved = read_origin(checkpoint).get("settings")
                if isinstance(saved, dict) and saved:
                    return with_current_names(saved)
        if not self.config.exists() and not all_checkpoints(self.checkpoints):
            return None
        try:
            return with_current_names(read_yaml(self.config))
        except ConfigError as error:
            log.warning("resume: %s: the settings are not compared with those of the run", error)
            return None

    def _about_length(self, settings: TrainSettings) -> str:
        """Why a run cannot be made longer, and what can be done instead."""
        return (
            f"    The learning rate of every step ({settings.schedule}, warm-up "
            f"{settings.warmup:g}) follows from the number of steps: another number is another "
            f"run. To train on from this one, finish it and start anew from its model: --model "
            f"{self.model} --out ANOTHER-FOLDER. Runs with --schedule constant may get longer"
        )

    def open(self, settings: TrainSettings) -> None:
        """Hold the folder, clear it if asked, and save the settings.

        Raises:
            ConfigError: Another run writes there, or nobody can.
        """
        try:
            if self._held is None:
                self._lock_folder()
            self._start(settings)
        except OSError as error:
            raise self._unwritable(error) from error
        self._made = []

    def close(self) -> None:
        """Let other runs write here. The system does it for a process that was killed."""
        if self._held is not None and self._made:
            with suppress(OSError):
                self._lock_file.unlink()
        self._lock.release()
        self._held = None
        for folder in reversed(self._made):
            with suppress(OSError):  # not empty: somebody else's too by now
                folder.rmdir()
        self._made = []

    def check_held(self) -> None:
        """Make sure that this is still the folder that the run holds, before it is written to.

        Raises:
            CheckpointError: It was deleted or replaced meanwhile; another run may be in it.
        """
        with suppress(OSError):
            now = self._lock_file.lstat()
            if self._held is not None and os.path.samestat(now, self._held):
                return
        raise CheckpointError(
            f"{self.root} was deleted or replaced while the run went, and another run may be "
            "writing there: this one writes no more"
        )

    def _lock_folder(self) -> None:
        if self._lock_file.is_symlink():
            raise ConfigError(f"out: {self._lock_file} is a link: remove it")
        self._make_root()
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            self._made = []
            raise ConfigError(
                f"out: another run is writing to {self.root}: wait for it, or choose another folder"
            ) from None
        self._held = self._lock_file.lstat()

    def _make_root(self) -> None:
        missing = [path for path in (self.root, *self.root.parents) if not path.exists()]
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            self._made.append(path)

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(f"out: {self.root} cannot be written ({error})")

    @staticmethod
    def _children(folder: Path) -> list[Path]:
        return list(folder.iterdir()) if folder.is_dir() else []

    def _start(self, settings: TrainSettings) -> None:
        if settings.overwrite:
            for path in (*self._contents(), *unfinished_model(self.model)):
                remove(path)
        text = yaml.safe_dump(settings.saved(), sort_keys=False, allow_unicode=True)
        write_atomically(self.config, text)

    def _contents(self) -> tuple[Path, ...]:
        return (
            self.config,
            self.log,
            self.evaluations,
            self.digests,
            self.samples,
            self.rollouts,
            self.summary,
            self.checkpoints,
            self.model,
            self.tracking,
        )


def unfinished_model(folder: Path) -> tuple[Path, Path]:
    """Where a new model is written, and where the former one waits for it."""
    return folder.with_name(f".{folder.name}.tmp"), replaced_name(folder)
