"""Peak memory of a stretch of work, without what came before."""

import ctypes
import re
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def reset_peak_memory(device: torch.device) -> None:
    """Begin a stretch: free memory goes back to the system, the peak starts from what is left.

    Args:
        device: Where the work computes; for a CPU it is the memory of this process that counts.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        try:
            # proc(5): resets the peak resident set size
            _CLEAR_REFS.write_text("5", encoding="ascii")
        except OSError:
            return


def peak_memory_since_reset(device: torch.device) -> int | None:
    """The peak since `reset_peak_memory`.

    Args:
        device: Where the work computes.

    Returns:
        Bytes allocated on a CUDA device, or resident bytes of this process; None where the system
        does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not _STATUS.exists():
        return None
    match = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"))
    return int(match[1]) * 1024 if match else None
