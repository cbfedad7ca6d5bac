"""`samestep verify`: take steps of a run again, and compare the bits that its log holds."""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samestep.engine.collectives import rank, run_or_fail_together
from samestep.engine.exact_sum import digest_of_all
from samestep.errors import ConfigError
from samestep.train.bitwise import BitRun, choose_threads, repeatable, shortened, state_digests
from samestep.train.checkpoint_files import all_checkpoints, damage, read_origin, step_of
from samestep.train.origin import differences
from samestep.train.precision import choose_precision
from samestep.train.progress import DataFingerprint, Progress
from samestep.train.reporter import RunConsole, RunReporter
from samestep.train.resume import current_origin, load_progress
from samestep.train.run_folder import RunFolder
from samestep.train.settings.base import TrainSettings
from samestep.train.setup import set_up
from samestep.train.signals import stop_signals
from samestep.train.trainer import Trainer
from samestep.train.watchdog import watch_ranks
from samestep.utils.files import open_regular

log = logging.getLogger("samestep")


@dataclass(frozen=True)
class Verdict:
    """What a replay found.

    Attributes:
        first: The first step that was compared.
        last: The last one: where they part, if they do.
        start: Where the replay began, in words.
        difference: The first weight that differs, in words; empty if all is equal.
    """

    first: int
    last: int
    start: str
    difference: str


class _Silent(RunReporter):
    """Writes and shows nothing: the run's own log stays as it is."""

    def __init__(self, total: int) -> None:
        self._console = RunConsole(total=total, done=0, silent=True)
        self._log = None
        self.evaluated = set()


class Record:
    """What ``digests.jsonl`` of a run says.

    Args:
        path: The file.

    Attributes:
        start: What the run started from.
        sums: The lines of steps, by step.
        states: The lines of whole states, by step.

    Raises:
        ConfigError: It is not there, or not readable.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise ConfigError(
                f"verify: there is no {path}: only runs with --bitwise write down their bits"
            )
        self.start: dict[str, Any] = {}
        self.sums: dict[int, dict[str, Any]] = {}
        self.states: dict[int, dict[str, Any]] = {}
        try:
            with open_regular(path) as file:
                lines = [json.loads(line) for line in file.read().decode().splitlines()]
            for line in lines:
                if "start" in line:
                    self.start = line["start"]
                else:
                    (self.sums if "sums" in line else self.states)[line["step"]] = line
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"verify: {path} cannot be read: {error}") from error
        if not self.start or not self.sums:
            raise ConfigError(f"verify: {path} holds no {'step' if self.start else 'beginning'}")

    def compare(self, step: int, bits: BitRun, trainer: Trainer) -> str:
        """What differs after a step, in words; empty if nothing does."""
        before = self.sums[step]
        if bits.sums.digest != before["digest"]:
            now = shortened(bits.sums.digests)
            return _first(before["sums"], now, "the gradient of") or "the gradient of all weights"
        state = self.states.get(step)
        if state is None:
            return ""
        each = state_digests(trainer.setup.model, trainer.setup.optimizer)
        if digest_of_all(list(each.items())) == state["state"]:
            return ""
        found = _first(state["weights"], shortened(each), "the value of")
        return found or "the value of all weights and moments"


def verify(settings: TrainSettings, *, steps: tuple[int, int] | None) -> Verdict:
    """Take steps of a run again, from a checkpoint or from its beginning, and compare.

    Nothing is written. On several ranks every one gets the verdict.

    Args:
        settings: The run's own, of its ``config.yaml``.
        steps: The first and the last to compare; None: all after the newest checkpoint that has
            any after it.

    Returns:
        The verdict.

    Raises:
        ConfigError: The steps cannot be taken here: another processor, library, number of threads,
            other files or rows; or the run holds nothing to compare.
    """
    folder = RunFolder(Path(settings.out))
    record = run_or_fail_together(lambda: Record(folder.digests))
    if not settings.bitwise:
        raise ConfigError(f"verify: the run in {folder.root} went on without --bitwise")
    first, last = _range(steps, record, folder)
    settings = run_or_fail_together(lambda: choose_precision(settings))
    settings = choose_threads(settings, folder)
    with repeatable(settings):
        level = log.level
        log.setLevel(logging.WARNING)
        try:
            setup = set_up(settings)
        finally:
            log.setLevel(level)
        origin = current_origin(setup, settings)
        bits = BitRun(setup, origin=origin)
        _check_start(record.start, bits.start)
        path = _before(first, folder)
        data = DataFingerprint.of(setup.train)
        progress = Progress(step=0, tokens=0, seconds=0.0, skipped=0, data=data)
        if path is not None:
            bits.restore(read_origin(path).get("bitwise"), path)
            progress = load_progress(path, setup)
        begun = progress.step + 1
        with (
            stop_signals() as signals,
            watch_ranks(settings.rank_timeout) as watchdog,
            signals.between_micro_batches(log.info),
        ):
            trainer = Trainer(
                settings=settings,
                folder=folder,
                setup=setup,
                reporter=_Silent(setup.steps),
                stop_signal=signals.number,
                watchdog=watchdog,
                progress=progress,
                origin=origin,
                bits=bits,
            )
            start = "the beginning" if path is None else f"checkpoint {path.name}"
            for step in trainer.steps(last):
                difference = record.compare(step, bits, trainer)
                if difference:
                    return Verdict(begun, step, start, difference)
    return Verdict(begun, last, start, "")


def _range(steps: tuple[int, int] | None, record: Record, folder: RunFolder) -> tuple[int, int]:
    """The steps to compare, all of which the log holds."""
    last = max(record.sums)
    if steps is None:
        saved = [number for number in _saved(folder) if number < last]
        steps = (max(saved, default=0) + 1, last)
    missing = sorted(set(range(steps[0], steps[1] + 1)) - record.sums.keys())
    if missing or steps[0] > steps[1]:
        what = f"step {missing[0]} is not there" if missing else "the last is before the first"
        raise ConfigError(
            f"verify: --steps {steps[0]}..{steps[1]}: {what}; {folder.digests} holds steps "
            f"{min(record.sums)} to {last}"
        )
    return steps


def _saved(folder: RunFolder) -> list[int]:
    return [step_of(path) for path in all_checkpoints(folder.checkpoints)]


def _before(first: int, folder: RunFolder) -> Path | None:
    """The newest whole checkpoint before a step; None: the run's beginning."""
    for path in reversed(all_checkpoints(folder.checkpoints)):
        if step_of(path) < first:
            problem = damage(path)
            if not problem:
                return path
            log.warning("%s is damaged: %s; starting before it", path, problem)
    return None


def _check_start(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to compare what another machine, library, file or row makes another."""
    changed = differences(before["environment"], now["environment"])
    changed += differences(before["files"], now["files"])
    if before["data"] != now["data"]:
        changed.append("the training rows: other content")
    if changed:
        lines = "\n  - ".join(["", *changed])
        raise ConfigError(f"verify: the run's steps cannot be taken again here:{lines}")


def _first(before: Mapping[str, str], now: Mapping[str, str], what: str) -> str:
    """The first weight whose digests differ, in words; empty if none does."""
    names: Iterable[str] = dict.fromkeys([*before, *now])
    for name in names:
        if before.get(name) != now.get(name):
            return f"{what} {name} (then {before.get(name, 'none')}, now {now.get(name, 'none')})"
    return ""


def report(verdict: Verdict, root: str) -> int:
    """Print a verdict on rank 0.

    Args:
        verdict: Of `verify`.
        root: The run's folder.

    Returns:
        The exit code: 0 equal, 1 not.
    """
    if verdict.difference:
        text = f"step {verdict.last} of {root} differs, first in {verdict.difference}"
    else:
        text = f"steps {verdict.first} to {verdict.last} of {root} are equal to the bit"
    if rank() == 0:
        print(f"{text}; replayed from {verdict.start}")
    return 1 if verdict.difference else 0
