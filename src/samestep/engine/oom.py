"""Out-of-memory errors: recognised among others, and raised with the data that caused them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from samestep.engine.counts import input_tokens
from samestep.engine.targets import num_sequences
from samestep.engine.terms import MicroBatch
from samestep.errors import NotFiniteError, OutOfMemoryError, SequenceTooLargeError, StepError

_ALLOCATOR_MESSAGES = (
    *("can't allocate memory", "bad_alloc", "out of memory", "could not create a "),
    # CUDA's libraries allocate beside PyTorch: what it holds in reserve they cannot have.
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUSOLVER_STATUS_ALLOC_FAILED"),
    *("CUSPARSE_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED"),
)
"""How the CPU's allocators, oneDNN ("could not create a primitive") and the libraries of CUDA word
a RuntimeError. cuBLAS fails to be set up only where its workspace finds no memory."""

_MAX_ROWS_SHOWN = 8
"""How many rows a message names."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def without_failed_frames(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function of whose errors those that are made up for do not keep what it has in memory.

    An error holds the frames that it came through, in its own traceback and in that of the
    allocator's error before it; and the frames of a step hold activations and gradients. Who
    catches an `OutOfMemoryError` and tries less, or a `NotFiniteError` and looks for its rows, even
    while it is being handled, needs their memory.

    Args:
        function: Runs micro-batches.

    Returns:
        It. The traceback of such an error begins at it; the message says the rest.
    """

    @wraps(function)
    def releasing(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        except (OutOfMemoryError, NotFiniteError) as error:
            failed: StepError = error
        failed.__context__ = failed.__cause__ = None
        try:
            raise failed.with_traceback(None)
        finally:
            del failed  # else this frame and the error would hold each other

    return releasing


@contextmanager
def memory_guard(micro_batch: MicroBatch) -> Iterator[None]:
    """Turn an allocator's error into one that names the micro-batch.

    Args:
        micro_batch: The micro-batch whose forward or backward the block runs.

    Raises:
        OutOfMemoryError: The block ran out of memory.
        SequenceTooLargeError: It did, on a single sequence.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        sequences, tokens = _num_sequences(micro_batch), input_tokens(micro_batch)
        rows = describe_rows(micro_batch)
        reason = _first_line(error)
        if sequences == 1:
            raise SequenceTooLargeError(
                f"out of memory on one sequence of {tokens} tokens{rows}: a step "
                "cannot be cut any finer. Cut or drop long rows (max_length), or use "
                f"gradient_checkpointing, a smaller dtype, or more memory ({reason})"
            ) from None
        raise OutOfMemoryError(
            f"out of memory on {tokens} tokens in {sequences} sequences{rows} ({reason})"
        ) from None


@contextmanager
def clipping_guard() -> Iterator[None]:
    """Name the memory that runs out in the gradient's norm and clipping; nothing is updated then.

    Raises:
        OutOfMemoryError: The block ran out of memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise _after_backward(
            f"out of memory in clipping the gradient ({_first_line(error)})"
        ) from None


@contextmanager
def update_guard(weights: Iterable[Tensor], optimizer: Optimizer) -> Iterator[None]:
    """Name the memory that runs out in an optimizer's update, and say whether anything changed.

    Optimizers make their state in the first update, which is when memory runs out: before any
    weight has changed. What they had begun is then taken back, and the step can be run again.

    Args:
        weights: Those that the optimizer updates.
        optimizer: The block runs its ``step``.

    Raises:
        OutOfMemoryError: The block ran out of memory, and has changed nothing.
        StepError: It did, and some weights or moments are updated while others are not.
    """
    tensors = [*weights, *_state_tensors(optimizer)]
    versions = [tensor._version for tensor in tensors]
    begun = {weight: set(state) for weight, state in optimizer.state.items()}
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = _first_line(error)
        if versions != [tensor._version for tensor in tensors]:
            raise StepError(
                f"out of memory in the middle of the update ({reason}): some weights are updated "
                "and others are not. Go back to a checkpoint, and give the run more memory or an "
                "optimizer with less state"
            ) from None
        for weight, state in list(optimizer.state.items()):
            for name in state.keys() - begun.get(weight, set()):
                del state[name]
        raise _after_backward(f"out of memory in the update ({reason})") from None


def _state_tensors(optimizer: Optimizer) -> list[Tensor]:
    values = (value for state in optimizer.state.values() for value in state.values())
    return [value for value in values if isinstance(value, Tensor)]


def _after_backward(problem: str) -> OutOfMemoryError:
    error = OutOfMemoryError(f"{problem}; nothing was updated")
    error.after_backward = True
    return error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def describe_rows(micro_batch: MicroBatch) -> str:
    """The rows of the source that a micro-batch holds, for a message.

    Args:
        micro_batch: Any; ``example_ids`` [sequences] are read where it has them.

    Returns:
        " (row 3)" or " (rows 3, 5 and 20 more)"; empty without ``example_ids``.
    """
    if not isinstance(micro_batch, Mapping) or "example_ids" not in micro_batch:
        return ""
    rows = micro_batch["example_ids"].tolist()
    more = f" and {len(rows) - _MAX_ROWS_SHOWN} more" if len(rows) > _MAX_ROWS_SHOWN else ""
    shown = ", ".join(map(str, rows[:_MAX_ROWS_SHOWN]))
    return f" (row{'s' if len(rows) > 1 else ''} {shown}{more})"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocator found no memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(message in str(error) for message in _ALLOCATOR_MESSAGES)


def _num_sequences(micro_batch: MicroBatch) -> int:
    if not isinstance(micro_batch, Mapping) or "labels" not in micro_batch:
        return 2  # unknown: it may be possible to cut it
    return num_sequences(micro_batch) if micro_batch["labels"].dim() > 1 else 2
