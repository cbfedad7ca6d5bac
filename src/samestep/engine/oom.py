"""Running out of memory, told apart from other errors and named after the data that caused it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from samestep.engine.counts import input_tokens
from samestep.engine.targets import number_of_sequences
from samestep.engine.terms import MicroBatch
from samestep.errors import OutOfMemoryError, SequenceTooLargeError

SIGNS = ("can't allocate memory", "bad_alloc", "out of memory", "could not create a ")
"""What the CPU's allocators and oneDNN ("could not create a primitive") say in a RuntimeError."""

SHOWN = 8
"""How many rows a message names."""


@contextmanager
def memory_guard(micro: MicroBatch) -> Iterator[None]:
    """Turn an allocator's error into one that names the micro-batch.

    Args:
        micro: The micro-batch whose forward or backward the block runs.

    Raises:
        OutOfMemoryError: The block ran out of memory.
        SequenceTooLargeError: It did, on a single sequence.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        sequences, tokens = _sequences(micro), input_tokens(micro)
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if sequences == 1:
            raise SequenceTooLargeError(
                f"out of memory on one sequence of {tokens} tokens{row_numbers(micro)}: a step "
                "cannot be cut any finer. Cut or drop long rows (max_length), or use "
                f"gradient_checkpointing, a smaller dtype, or more memory ({reason})"
            ) from None
        raise OutOfMemoryError(
            f"out of memory on {tokens} tokens in {sequences} sequences{row_numbers(micro)} "
            f"({reason})"
        ) from None


def row_numbers(micro: MicroBatch) -> str:
    """The rows of the source that a micro-batch holds, for a message; empty if unknown."""
    if not isinstance(micro, Mapping) or "example_ids" not in micro:
        return ""
    rows = micro["example_ids"].tolist()
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return f" (row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:SHOWN]))}{more})"


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(sign in str(error) for sign in SIGNS)


def _sequences(micro: MicroBatch) -> int:
    if not isinstance(micro, Mapping) or "labels" not in micro or micro["labels"].dim() < 2:
        return 2  # unknown: it may be possible to cut it
    return number_of_sequences(micro)
