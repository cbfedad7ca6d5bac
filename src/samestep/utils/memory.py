"""Memory that this process takes, at its peak and at most, and how the C library hands it out.

Three peaks are of use: of a block of code, sampled while it runs (`peak_memory`); of a stretch
between two calls, from the system's own counter, which must be set back (`reset_peak_memory`,
`peak_memory_since_reset`); and of the whole process (`process_peak`).
"""

import ctypes
import gc
import os
import platform
import re
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_SHARE = 0.8
"""Share of what the process could have that is taken if no limit is given."""

_INTERVAL = 0.002
"""Seconds between two looks at the resident memory."""

_STATM = Path("/proc/self/statm")

_STATUS = Path("/proc/self/status")

_CLEAR_REFS = Path("/proc/self/clear_refs")

_MEMINFO = Path("/proc/meminfo")

_CGROUP = Path("/sys/fs/cgroup")

_OWN_CGROUP = Path("/proc/self/cgroup")

_CGROUP_FILES = (
    ("memory.max", "memory.current"),  # version 2
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),  # version 1
)
"""The files that hold a group's limit, and what it takes."""


@dataclass
class Peak:
    """The most bytes that were taken; None where the system does not say."""

    bytes: float | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Sample the memory of a block.

    Args:
        device: Where the block computes: on the CPU the resident memory of the process is
            sampled, on CUDA it is what PyTorch allocated.

    Yields:
        The peak, set when the block ends.
    """
    peak = Peak()
    if device.type == "cuda":
        reset_peak_memory(device)
        yield peak
        peak.bytes = peak_memory_since_reset(device)
        return
    if device.type != "cpu" or not _STATM.is_file():
        yield peak
        return
    ended = threading.Event()

    def sample() -> None:
        while True:
            peak.bytes = max(peak.bytes or 0.0, _resident())
            if ended.wait(_INTERVAL):
                return

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        ended.set()
        sampler.join()


def reset_peak_memory(device: torch.device) -> None:
    """Begin a stretch: free memory goes back to the system, the peak starts from what is left.

    Args:
        device: As for `peak_memory`.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        try:
            _CLEAR_REFS.write_text("5", encoding="ascii")  # proc(5): resets the peak resident size
        except OSError:
            return


def peak_memory_since_reset(device: torch.device) -> int | None:
    """The peak since `reset_peak_memory`: resident bytes of this process, or those of a GPU.

    Args:
        device: As for `peak_memory`.

    Returns:
        Bytes; None where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not _STATUS.exists():
        return None
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"))
    return int(found[1]) * 1024 if found else None


def release_memory() -> None:
    """Give back what nothing holds any longer, after an attempt that ran out of memory."""
    gc.collect()  # its frames may hold each other, and the tensors in them
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def process_peak() -> int:
    """The most resident bytes of this process since it started."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_peak(device: torch.device) -> int | None:
    """The most bytes that PyTorch has allocated on an accelerator.

    Args:
        device: As for `peak_memory`.

    Returns:
        Bytes; None on a CPU, and where PyTorch does not count.
    """
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def device_reserved(device: torch.device) -> int | None:
    """The most bytes that PyTorch has held of an accelerator: what it allocated, and fragments.

    Args:
        device: As for `peak_memory`.

    Returns:
        Bytes; None as for `device_peak`.
    """
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def describe_device(device: torch.device) -> list[str | int]:
    """What a device is, for files that hold for it alone: its kind, model and memory."""
    if device.type != "cuda":
        return [str(device)]
    found = torch.cuda.get_device_properties(device)
    return [str(device), found.name, found.total_memory]


def available_memory(device: torch.device) -> float | None:
    """Bytes that the process could take in all: what it has and what is free.

    Args:
        device: As for `peak_memory`.

    Returns:
        Bytes; None where the system does not say.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device))
    if device.type != "cpu" or not _MEMINFO.is_file() or not _STATM.is_file():
        return None
    lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    free_bytes = [int(fields["MemAvailable"].split()[0]) * 1024]
    free_bytes += [most - taken for most, taken in _cgroup_limits()]
    return _resident() + max(0, min(free_bytes))


def memory_limit(device: torch.device, gigabytes: float | None) -> float | None:
    """Bytes that the process may take: a limit that was given, or most of what there is.

    Args:
        device: As for `peak_memory`.
        gigabytes: The limit; None: none was given.

    Returns:
        Bytes; None if that is unknown.
    """
    if gigabytes is not None:
        return gigabytes * 1e9
    available = available_memory(device)
    return None if available is None else _SHARE * available


def _cgroup_limits() -> list[tuple[int, int]]:
    """The limit of each control group that holds this process, and what the group takes.

    Version 2 and version 1 of the kernel's interface. A container sees its own group at the root;
    a process outside of one finds its group's path, and those above it, in /proc/self/cgroup.
    """
    limits = []
    for folder in _cgroup_folders():
        for most, taken in _CGROUP_FILES:
            try:
                limit = (folder / most).read_text(encoding="ascii").strip()
                used = (folder / taken).read_text(encoding="ascii").strip()
            except (OSError, ValueError):
                continue
            # Without a limit version 2 says "max", version 1 a number beyond any memory.
            if limit.isdecimal() and used.isdecimal():
                limits.append((int(limit), int(used)))
    return limits


def _cgroup_folders() -> list[Path]:
    folders = {_CGROUP, _CGROUP / "memory"}
    try:
        lines = _OWN_CGROUP.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        lines = []
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", "", ""][:3]
        root = _CGROUP / "memory" if "memory" in controllers.split(",") else _CGROUP
        if controllers and root == _CGROUP:
            continue  # of version 1, for something else than memory
        own = root / path.strip("/")
        folders |= {own, *(folder for folder in own.parents if folder.is_relative_to(root))}
    return sorted(folders)


def _resident() -> float:
    pages = int(_STATM.read_text(encoding="ascii").split()[1])
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


_LARGE = 2**28
"""Bytes up to which a tensor comes from the heap."""

_KEPT = 2**31 - 1
"""Bytes at the heap's end that are kept when they fall free: all that the parameter can say."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)


def keep_large_blocks() -> bool:
    """Let what one micro-batch frees serve the next, also tensors of more than 32 MB.

    glibc asks the system for each of them anew, which clears every page, and gives it back at once:
    for a head's gradients that is a few percent of a step, and memory beside what the heap holds
    free at that time. What the process keeps in the end is what it needed at its peak.

    Returns:
        Whether the C library took it; False where it is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGE) and mallopt(_M_TRIM_THRESHOLD, _KEPT))
