"""Who is to blame, told by signs of life."""

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from runs import run_config
from torch import distributed

from samestep.engine import collectives
from samestep.train import evaluator, watchdog
from samestep.train.blame import blame, innermost_frame, line_of, waits_for_others
from samestep.train.trainer import train
from samestep.train.watchdog import LIMITS, Watchdog
from samestep.utils.waiting import doing, waiting


def sign(number: int, *, works: bool, at: str = "step 3, micro-batch 2") -> dict[str, Any]:
    return {"number": number, "works": works, "at": at}


@pytest.mark.parametrize(
    ("before", "now", "names"),
    [
        (
            [sign(1, works=False), sign(7, works=True)],
            [sign(4, works=False), sign(7, works=True)],
            "rank 1 died or was stopped, or hangs in compiled code (last seen at step 3, ",
        ),
        ([sign(1, works=False), None], [sign(4, works=False), None], "rank 1 died"),
        (
            [sign(1, works=True), sign(1, works=False), sign(2, works=False)],
            [sign(4, works=True), sign(4, works=False), sign(4, works=False)],
            "rank 0 hangs (last seen at step 3, micro-batch 2)",
        ),
        (
            [sign(1, works=False), sign(1, works=False)],
            [sign(3, works=False, at="saving"), sign(3, works=False)],
            "every rank waits for the others (last seen at saving and step 3, micro-batch 2)",
        ),
    ],
)
def test_the_rank_that_holds_the_others_up_is_named(before: Any, now: Any, names: str) -> None:
    assert names in blame(before, now)


def test_a_rank_that_works_is_seen_at_its_line() -> None:
    beats = [sign(1, works=False), sign(1, works=True) | {"line": "loss.py, line 3, in loss"}]
    now = [beat | {"number": 5} for beat in beats]
    named = "rank 1 hangs (last seen at step 3, micro-batch 2: loss.py, line 3, in loss)"
    assert blame(beats, now) == named


def frame_of(work: Callable[[], Any]) -> FrameType:
    """The innermost frame of a thread that runs the work, which blocks until `GATE` is set."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert ENTERED.wait(10)
    assert thread.ident is not None
    frame = innermost_frame(thread.ident)
    assert frame is not None
    return frame


ENTERED, GATE = threading.Event(), threading.Event()


@pytest.fixture
def _gate() -> Iterator[None]:
    ENTERED.clear()
    GATE.clear()
    yield
    GATE.set()


def blocked(*_: Any, **__: Any) -> None:
    ENTERED.set()
    GATE.wait()


@pytest.mark.usefixtures("_gate")
@pytest.mark.parametrize("through", [collectives.gather_results, collectives.on_rank_0])
def test_what_a_collective_runs_is_the_ranks_own_work(through: Any) -> None:
    """A loss, a collator or the log that hangs inside of one is no wait for other ranks."""
    frame = frame_of(lambda: through(blocked))
    assert not waits_for_others(frame)
    assert __file__ in line_of(frame)
    assert line_of(frame).endswith("in blocked")


def frame_at(file: Path) -> FrameType:
    """The frame of a function as if it stood in a file."""
    space: dict[str, Any] = {"sys": sys}
    exec(compile("def here():\n    return sys._getframe()\n", str(file), "exec"), space)
    frame: FrameType = space["here"]()
    return frame


def test_a_collective_is_a_wait_and_writing_a_checkpoint_is_none() -> None:
    folder = Path(distributed.__file__).parent
    assert waits_for_others(frame_at(folder / "distributed_c10d.py"))
    assert not waits_for_others(frame_at(folder / "checkpoint" / "filesystem.py"))
    assert not waits_for_others(frame_at(Path("/home/someone/loss.py")))
    assert not waits_for_others(None)


def test_one_rank_is_never_watched() -> None:
    Watchdog(1, None).begin("micro-batch", "step 1, micro-batch 1")


class Clock:
    """Stands for the module `time`: seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Ended(BaseException):
    """Stands for the end of a process."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watchdog, "time", clock)

    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(watchdog.os, "_exit", end)
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda *_, **__: None)
    return clock


def seconds_to_the_end(watched: Watchdog, clock: Clock, *, most: float = 1000) -> float:
    started = clock.now
    try:
        while clock.now - started < most:
            watched._post()
            watched._check()
            clock.now += 0.5
    except Ended:
        return clock.now - started
    return most


@pytest.mark.parametrize("phase", LIMITS)
def test_each_phase_ends_within_its_own_limit_by_its_name(
    phase: str, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    watched = Watchdog(10, distributed.HashStore())
    watched.begin(phase, f"{phase} 7")
    limit = 10 * LIMITS[phase]
    assert limit < seconds_to_the_end(watched, clock) < limit + 8
    text = capsys.readouterr().err
    assert f"{phase}: nothing has moved for {limit:g} s: rank 0 hangs" in text
    assert f"(last seen at {phase} 7: " in text


def test_what_follows_a_save_is_watched_by_a_limit_of_its_own(clock: Clock) -> None:
    watched = Watchdog(10, distributed.HashStore())
    watched.begin("saving", "saving step 3")
    watched._post()
    watched._check()
    watched.begin("micro-batch", "after saving step 3")
    assert seconds_to_the_end(watched, clock) < 10 + 8


def test_work_that_says_how_far_it_is_moves(clock: Clock) -> None:
    watched = Watchdog(1, distributed.HashStore())
    watched.begin("loading", "loading")
    with waiting("reading rows"):
        for rows in range(10):
            doing(f"{rows} rows")
            assert seconds_to_the_end(watched, clock, most=5) == 5
        assert seconds_to_the_end(watched, clock) < 6 + 8


def test_the_making_of_each_item_is_noted() -> None:
    watched = Watchdog(1, None)
    making = watched.each("ab", "micro-batch", "collating micro-batch")
    seen = [(item, watched._at) for item in making]
    assert seen == [("a", "collating micro-batch 1"), ("b", "collating micro-batch 2")]


def test_all_ranks_give_the_verdict_of_the_first(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    store = distributed.HashStore()
    store.set("verdict", "log: nothing has moved for 5 s: rank 1 hangs")
    with pytest.raises(Ended):
        Watchdog(10, store)._obey_verdict()
    assert "rank 1 hangs. --resume continues" in capsys.readouterr().err


def run_until_it_ends(watched: Watchdog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_INTERVAL", 0.001)
    with pytest.raises(Ended):
        watched.run()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_ends_when_its_launcher_is_gone(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ranks: int
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    watched = Watchdog(10, distributed.HashStore() if ranks > 1 else None)
    monkeypatch.setattr(watchdog.os, "getppid", lambda: 1)
    run_until_it_ends(watched, monkeypatch)
    assert "the launcher is gone: this rank ends too" in capsys.readouterr().err


class LostStore:
    """A store in a process that is gone."""

    def __getattr__(self, name: str) -> Any:
        def lost(*_: Any) -> None:
            raise distributed.DistNetworkError("connection reset")

        return lost


@pytest.mark.parametrize("of_launcher", [True, False])
def test_a_store_that_is_gone_tells_who_is_gone(
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    of_launcher: bool,
) -> None:
    """Ranks that no launcher has started keep the store on rank 0."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(of_launcher))
    watched: Any = Watchdog(10, LostStore())  # type: ignore[arg-type]
    watched.begin("micro-batch", "step 3, micro-batch 1")
    named = "the launcher is gone" if of_launcher else "rank 0 died or was stopped"
    assert named in watched.find_culprit()
    run_until_it_ends(watched, monkeypatch)
    assert named in capsys.readouterr().err


def test_an_evaluation_is_one_before_its_first_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases: list[str] = []
    seen: list[str] = []
    begin, real = Watchdog.begin, evaluator.evaluate

    def noted(watchdog: Watchdog, phase: str, at: str) -> None:
        phases.append(phase)
        begin(watchdog, phase, at)

    def evaluate(*given: Any, **options: Any) -> Any:
        seen.append(phases[-1])
        return real(*given, **options)

    monkeypatch.setattr(Watchdog, "begin", noted)
    monkeypatch.setattr(evaluator, "evaluate", evaluate)
    config = run_config(tmp_path, steps=1)
    train(config.model_copy(update={"eval_data": config.data}))
    assert seen == ["evaluation", "evaluation"]
