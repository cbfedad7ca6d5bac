"""Random numbers that are the same whenever a computation is repeated."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seed every generator that code may draw from: of PyTorch, NumPy and Python.

    Where no accelerator is there, ``torch.manual_seed`` would format the stack for each kind of
    device that is missing, to seed it once it appears: as slow as a small model's whole step.

    Args:
        seed: Of all of them.
    """
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@contextmanager
def same_random_numbers(seed: int = 0) -> Iterator[None]:
    """Draw the same random numbers every time, and leave the generators as they were.

    Args:
        seed: Other numbers for another seed.
    """
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        seed_all(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
