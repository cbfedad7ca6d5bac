"""``deterministic``: the same bits whenever a run is repeated or resumed, on an accelerator too.

On a CPU the kernels of a step give the same bits each time. On a GPU some add up in whatever order
their threads arrive (the backward of attention, of look-ups). PyTorch has another kernel for most
of those; it is asked for here, and what has none ends the run by its name.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from samestep.errors import ConfigError

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
"""What cuBLAS needs. It reads that once, so it stays set; another value of the user's stays too."""


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """A block in which every operation gives the same bits each time, or raises.

    Args:
        wanted: Whether; the block is as without it otherwise.

    Raises:
        ConfigError: An operation has no deterministic kernel.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault(*_CUBLAS)
    before = torch.get_deterministic_debug_mode()
    benchmark, filled = torch.backends.cudnn.benchmark, torch.utils.deterministic
    fill = filled.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    # Every operation writes all that is read of its result: filling it first would only cost time.
    filled.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        first = str(error).strip().split(", but")[0].split("\n")[0]
        raise ConfigError(f"deterministic: {first} on this device; leave it out") from error
    finally:
        torch.set_deterministic_debug_mode(before)
        filled.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = benchmark
