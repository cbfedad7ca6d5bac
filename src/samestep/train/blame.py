"""Who is to blame for a run that does not move: from the heartbeats and stacks of its ranks."""

import os
import sys
import sysconfig
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

import torch
from torch import distributed as dist

from samestep.engine.collectives import COMMUNICATING

Heartbeat: TypeAlias = dict[str, Any]
"""Its number, how often the rank has moved, where it is in words ("at"), whether it works or waits
for others ("works"), and the line of code that it is in ("line")."""

_DISTRIBUTED = str(Path(dist.__file__).parent) + os.sep
_CHECKPOINT = str(Path(dist.__file__).parent / "checkpoint") + os.sep
_TORCH = str(Path(torch.__file__).parent) + os.sep
_STANDARD = sysconfig.get_path("stdlib") + os.sep
_INSTALLED = tuple({sysconfig.get_path(name) + os.sep for name in ("purelib", "platlib")})


def innermost_frame(thread: int) -> FrameType | None:
    """The innermost function of Python's that a thread is in; None if it has ended."""
    return sys._current_frames().get(thread)


def waits_for_others(frame: FrameType | None) -> bool:
    """Whether a thread is inside of a collective, by the function of Python's that it is in.

    Only the innermost counts: what a collective of ours runs on one rank (a loss, the log) is that
    rank's own work. PyTorch's code for checkpoints waits for disks, too.

    Args:
        frame: As `innermost_frame` gives it.

    Returns:
        Whether it waits.
    """
    if frame is None:
        return False
    name = frame.f_code.co_filename
    if frame.f_code in COMMUNICATING:
        return True
    return name.startswith(_DISTRIBUTED) and not name.startswith(_CHECKPOINT)


def line_of(frame: FrameType | None) -> str:
    """The line that a thread is in, of the innermost code that is neither PyTorch's nor Python's.

    Args:
        frame: As `innermost_frame` gives it.

    Returns:
        Such as "loss.py, line 12, in my_loss"; empty without a frame.
    """
    own = frame
    while own is not None and _is_of_others(own.f_code.co_filename):
        own = own.f_back
    own = own or frame
    if own is None:
        return ""
    return f"{own.f_code.co_filename}, line {own.f_lineno}, in {own.f_code.co_name}"


def _is_of_others(name: str) -> bool:
    if name.startswith((_TORCH, "<")):
        return True
    return name.startswith(_STANDARD) and not name.startswith(_INSTALLED)


def blame(before: list[Heartbeat | None], now: list[Heartbeat | None]) -> str:
    """Which rank holds the others up, inferred from their heartbeats at two times.

    Args:
        before: The last heartbeats of all ranks; None of one that has posted none yet.
        now: The last ones some seconds later.

    Returns:
        A sentence that names the ranks.
    """
    silent = [
        number
        for number, (earlier, later) in enumerate(zip(before, now, strict=True))
        if later is None or (earlier is not None and earlier["number"] == later["number"])
    ]
    if silent:
        reason = "died or was stopped, or hangs in compiled code"
        return f"{_names(silent)} {reason}{_last_seen(now, silent)}"
    working = [number for number, beat in enumerate(now) if beat is not None and beat["works"]]
    if not working:
        return f"every rank waits for the others{_last_seen(now, list(range(len(now))))}"
    return f"{_names(working)} hangs{_last_seen(now, working)}"


def _names(numbers: list[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _last_seen(beats: list[Heartbeat | None], numbers: list[int]) -> str:
    places = {_place(beat) for beat in (beats[number] for number in numbers) if beat is not None}
    return f" (last seen at {' and '.join(sorted(places))})" if places else ""


def _place(beat: Heartbeat) -> str:
    line = beat.get("line", "")
    return f"{beat['at']}: {line}" if line else str(beat["at"])
