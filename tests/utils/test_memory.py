"""Large tensors come from the heap, and stay there when they are freed."""

import platform
import subprocess
import sys

import pytest

from samestep.utils.memory import keep_large_blocks

MAPPED = """
import ctypes, torch
from samestep.utils.memory import keep_large_blocks
class Info(ctypes.Structure):  # mallinfo2(3)
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split())]
info = ctypes.CDLL(None).mallinfo2
info.restype = Info
if {wanted}:
    assert keep_large_blocks()
before = info()
tensor = torch.ones(2**24)
during = info()
del tensor
print(during.hblkhd - before.hblkhd, info().arena - before.arena)
"""


def bytes_of_a_tensor(wanted: bool) -> tuple[int, int]:
    """What 64 MB take from the system while they live, and what the heap has grown by after."""
    done = subprocess.run(
        [sys.executable, "-c", MAPPED.format(wanted=wanted)],
        check=True,
        capture_output=True,
        text=True,
    )
    mapped, kept = done.stdout.split()
    return int(mapped), int(kept)


@pytest.mark.skipif(
    platform.libc_ver() < ("glibc", "2.33"), reason="another C library, or one without mallinfo2"
)
def test_a_large_tensor_comes_from_the_heap_and_its_memory_stays() -> None:
    size = 0.9 * 2**26
    mapped, kept = bytes_of_a_tensor(wanted=False)
    assert mapped >= size > 10 * kept
    mapped, kept = bytes_of_a_tensor(wanted=True)
    assert kept >= size > 10 * mapped


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_large_blocks()
