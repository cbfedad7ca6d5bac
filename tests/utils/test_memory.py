"""Large tensors come from the heap and stay there; limits of control groups are read."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from samestep.utils import memory
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


@pytest.mark.thorough
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


def group(folder: Path, names: tuple[str, str], limit: str, taken: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(names, (limit, taken), strict=True):
        (folder / name).write_text(f"{text}\n", encoding="ascii")


V1, V2 = ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")


@pytest.mark.parametrize(
    ("own", "folder", "names"),
    [
        ("0::/\n", "", V2),
        ("0::/user/job\n", "user/job", V2),
        ("0::/user/job\n", "user", V2),
        ("0::/elsewhere\n", "", V2),
        ("5:devices:/\n4:memory:/\n0::/\n", "memory", V1),
        ("4:memory:/slurm/job\n", "memory/slurm/job", V1),
        ("4:cpu,memory:/slurm/job\n", "memory/slurm", V1),
    ],
)
def test_the_limit_of_a_control_group_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, folder: str, names: tuple[str, str]
) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_OWN_CGROUP", tmp_path / "own")
    (tmp_path / "own").write_text(own, encoding="ascii")
    free = memory.available_memory(torch.device("cpu"))
    group(tmp_path / "cgroup" / folder, names, "9000000", "8000000")
    limited = memory.available_memory(torch.device("cpu"))
    assert free is not None
    assert limited is not None
    assert limited - memory._resident() < 2**24 < free - memory._resident()


@pytest.mark.parametrize("limit", ["max", "9223372036854771712", "", "no number"])
def test_a_group_without_a_limit_limits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_OWN_CGROUP", tmp_path / "nothing")
    group(tmp_path / "memory", V1, limit, "8000000")
    group(tmp_path, V2, limit, "8000000")
    free = memory.available_memory(torch.device("cpu"))
    assert free is not None
    assert free - memory._resident() > 2**24
