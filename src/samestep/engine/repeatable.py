"""Operations that give the same bits each time, or an error that names the one that does not.

On a CPU the kernels of a step give the same bits each time. On a GPU some add up in whatever order
their threads arrive (the backward of attention, of look-ups). PyTorch has another kernel for most
of those; it is asked for here, and what has none ends the run by its name.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from samestep.errors import ConfigError
from samestep.utils.cublas import SETTING, VALUE, let_cublas_repeat

_NO_WAY = "does not have a deterministic implementation"
"""What PyTorch says of an operation that it cannot repeat."""


@contextmanager
def repeatable_operations(setting: str, *, on_gpu: bool = True) -> Iterator[None]:
    """A block in which every operation gives the same bits each time, or raises.

    Args:
        setting: What asks for it, for messages.
        on_gpu: Whether the block may multiply on a GPU; then cuBLAS is asked at once.

    Raises:
        ConfigError: An operation has no repeatable form, or cuBLAS was not asked for one in time.
    """
    let_cublas_repeat()
    filled: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        filled.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
    )
    torch.use_deterministic_algorithms(True)
    # Every operation writes all that is read of its result: filling it first would only cost time.
    filled.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    try:
        # Where CUDA is not used yet nothing was multiplied, and the setting is in time.
        if on_gpu and torch.cuda.is_initialized():
            multiply_on_gpu()
        yield
    except RuntimeError as error:
        problem = _explained(str(error))
        if not problem:
            raise
        raise ConfigError(f"{setting}: {problem}") from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        filled.fill_uninitialized_memory, torch.backends.cudnn.benchmark = before[2:]


def multiply_on_gpu() -> None:
    """The smallest product: it fails at once where all products of this process would."""
    one = torch.ones(1, 1, device="cuda")
    torch.mm(one, one)


def _explained(problem: str) -> str:
    """What to do about an error of PyTorch; empty if it is about something else."""
    if SETTING in problem:
        return (
            "cuBLAS does not repeat its results in this process. PyTorch reads "
            f"{SETTING} once, at the first product on a GPU, which came before it was set (it is "
            f"{os.environ.get(SETTING, 'not set')} now). Set it to {VALUE} where the process "
            "starts: in a shell before the command, in a notebook after a restart of the kernel "
            f"by os.environ[{SETTING!r}] = {VALUE!r} in the first cell"
        )
    if _NO_WAY in problem:
        operation = problem.strip().split(_NO_WAY)[0].split("\n")[-1].strip()
        return f"{operation} {_NO_WAY} on this device; leave it out"
    return ""
