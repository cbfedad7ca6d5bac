"""How the C library hands out memory for large tensors."""

import ctypes
import platform

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
