"""The folder of a run: what stands where, and who may write there. No PyTorch."""

import shutil
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from samestep.errors import ConfigError
from samestep.train.settings.base import RESUME_MAY_CHANGE, TrainSettings, with_current_names
from samestep.utils.files import write_atomically


class RunFolder:
    """Paths under ``--out``.

    Attributes:
        root: The folder itself.
        config: ``config.yaml``, the settings.
        log: ``log.jsonl``, a line a step.
        evaluations: ``eval.jsonl``, a line an evaluation.
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
        self.summary = root / "summary.json"
        self.checkpoints = root / "checkpoints"
        self.model = root / "model"
        self.tracking = root / "tracking"
        self._lock = FileLock(root / ".lock")

    def holds_a_run(self) -> bool:
        """Whether a run has written here."""
        return any(path.exists() for path in self._contents())

    def check(self, settings: TrainSettings) -> None:
        """Refuse a folder that this run must not write to; writes nothing.

        Raises:
            ConfigError: It holds another run, or one with other settings than those to resume.
        """
        if self.root.exists() and not self.root.is_dir():
            raise ConfigError(f"out: {self.root} is a file, not a folder")
        if self.root.exists():
            self._hold()
            self.close()
        if not self.holds_a_run() or settings.overwrite:
            return
        if not settings.resume:
            raise ConfigError(
                f"out: {self.root} already holds a run. Continue it with --resume, replace it "
                "with --overwrite, or choose another folder"
            )
        if self.config.exists():
            self._check_same(settings)

    def _check_same(self, settings: TrainSettings) -> None:
        saved: dict[str, Any] = yaml.safe_load(self.config.read_text(encoding="utf-8")) or {}
        before = with_current_names(saved)
        now = settings.saved()
        changed = [
            f"  - {name}: was {before.get(name)!r}, is {now.get(name)!r}"
            for name in sorted({*before, *now} - RESUME_MAY_CHANGE)
            if before.get(name) != now.get(name)
        ]
        if changed:
            raise ConfigError(
                f"resume: the run in {self.root} had other settings:\n"
                + "\n".join(changed)
                + "\nGive the same ones (only "
                + ", ".join(sorted(RESUME_MAY_CHANGE))
                + " may change), or start anew with --overwrite"
            )

    def open(self, settings: TrainSettings) -> None:
        """Hold the folder, clear it if asked, and save the settings.

        Raises:
            ConfigError: Another run writes there, or nobody can.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._hold()
            self._start(settings)
        except OSError as error:
            raise ConfigError(f"out: {self.root} cannot be written ({error})") from error

    def close(self) -> None:
        """Let other runs write here. The system does it for a process that was killed."""
        self._lock.release()

    def _hold(self) -> None:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"out: another run is writing to {self.root}: wait for it, or choose another folder"
            ) from None

    def _start(self, settings: TrainSettings) -> None:
        if settings.overwrite:
            for path in self._contents():
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        text = yaml.safe_dump(settings.saved(), sort_keys=False, allow_unicode=True)
        write_atomically(self.config, text)

    def _contents(self) -> tuple[Path, ...]:
        return (
            self.config,
            self.log,
            self.evaluations,
            self.summary,
            self.checkpoints,
            self.model,
            self.tracking,
        )
