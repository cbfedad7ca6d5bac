"""Who is to blame, told by signs of life."""

import threading
from typing import Any

import pytest

from samestep.train.watchdog import Watchdog, blame


def sign(number: int, *, works: bool, at: str = "step 3, micro-batch 2") -> dict[str, Any]:
    return {"number": number, "works": works, "at": at}


@pytest.mark.parametrize(
    ("before", "now", "names"),
    [
        (
            [sign(1, works=False), sign(7, works=True)],
            [sign(4, works=False), sign(7, works=True)],
            "rank 1 died or was stopped (last seen at step 3, micro-batch 2)",
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


def test_waiting_is_told_from_working_by_the_stack() -> None:
    from samestep.engine import collectives
    from samestep.train import watchdog

    gate = threading.Event()
    thread = threading.Thread(target=collectives.gather_results, args=(gate.wait,))
    thread.start()
    try:
        assert thread.ident is not None
        assert watchdog._waits_for_others(thread.ident)
        assert not watchdog._waits_for_others(threading.get_ident())
    finally:
        gate.set()
        thread.join()


def test_one_rank_is_never_watched() -> None:
    Watchdog(1, None).heartbeat("step 1, micro-batch 1")
