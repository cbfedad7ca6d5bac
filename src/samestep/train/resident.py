"""How much memory this process takes, and how much more it could have."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

INTERVAL = 0.002
"""Seconds between two looks at the resident memory."""

STATM = Path("/proc/self/statm")
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


@dataclass
class Peak:
    """The most bytes that were taken; None where the system does not say."""

    bytes: float | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Watch the memory of a block.

    Args:
        device: Where the block computes: on the CPU the resident memory of the process is
            watched, on CUDA what PyTorch allocated.

    Yields:
        The peak, set when the block ends.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    if device.type != "cpu" or not STATM.is_file():
        yield peak
        return
    ended = threading.Event()

    def look() -> None:
        while True:
            peak.bytes = max(peak.bytes or 0.0, _resident())
            if ended.wait(INTERVAL):
                return

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()


def _resident() -> float:
    pages = int(STATM.read_text(encoding="ascii").split()[1])
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


def memory_to_have(device: torch.device) -> float | None:
    """Bytes that the process could take in all: what it has and what is free; None if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device))
    if device.type != "cpu" or not MEMINFO.is_file() or not STATM.is_file():
        return None
    lines = MEMINFO.read_text(encoding="ascii").splitlines()
    found = dict(line.split(":", 1) for line in lines)
    room = [int(found["MemAvailable"].split()[0]) * 1024]
    limit, taken = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.is_file() and taken.is_file():
        most = limit.read_text(encoding="ascii").strip()
        if most != "max":
            room.append(int(most) - int(taken.read_text(encoding="ascii")))
    return _resident() + max(0, min(room))
