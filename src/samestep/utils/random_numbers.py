"""Random numbers that are the same whenever a computation is repeated."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def same_random_numbers(seed: int = 0) -> Iterator[None]:
    """Draw the same random numbers every time, and leave the generators as they were.

    Args:
        seed: Other numbers for another seed.
    """
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
