"""Peak memory of a stretch of work, without what came before."""

import ctypes
import re
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def reset_peak(device: torch.device) -> None:
    """Begin a stretch: free memory goes back to the system, the peak starts from what is left."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        try:
            _CLEAR.write_text("5", encoding="ascii")  # proc(5): resets the peak resident set size
        except OSError:
            return


def peak_bytes(device: torch.device) -> int | None:
    """The peak since `reset_peak`: resident bytes of this process, or bytes of a CUDA device.

    Returns:
        None where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not _STATUS.exists():
        return None
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"))
    return int(found[1]) * 1024 if found else None
