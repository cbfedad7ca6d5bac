"""Collectives over the ranks: the sums, gathers and joint failures that a step needs.

With no process group, or one rank, everything here is the identity and costs nothing.

Small objects (counts, totals, errors) travel as JSON in one all-gather of a fixed number of bytes
and are added up by every rank in the same order: the result is the same on all of them, names need
no agreement beforehand (a rank that holds no example does not know which units the others count),
and nothing is unpickled.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from samestep import errors
from samestep.errors import SamestepError, StepError

ENVELOPE_BYTES = 1024
"""Bytes that each rank sends in the collective of `all_gather_object`; longer objects take two."""

Result = TypeVar("Result")
"""Something that JSON holds."""

T = TypeVar("T")


def world_size() -> int:
    """The number of ranks; 1 without a process group."""
    return dist.get_world_size() if _is_distributed() else 1


def rank() -> int:
    """The number of this rank, from 0."""
    return dist.get_rank() if _is_distributed() else 0


def all_gather_object(value: Any) -> list[Any]:
    """Share a small object of every rank with every rank.

    Args:
        value: Anything small that JSON holds; floats arrive to the last bit.

    Returns:
        The objects in the order of the ranks, the same on every rank.
    """
    if world_size() == 1:
        return [value]
    message = json.dumps(value).encode()
    envelopes = _gather_bytes(len(message).to_bytes(8, "little") + message, ENVELOPE_BYTES)
    sizes = [int.from_bytes(envelope[:8], "little") for envelope in envelopes]
    longest = max(sizes)
    if longest > ENVELOPE_BYTES - 8:
        bodies = _gather_bytes(message, longest)
    else:
        bodies = [envelope[8:] for envelope in envelopes]
    return [json.loads(body[:size]) for body, size in zip(bodies, sizes, strict=True)]


def gather_results(work: Callable[[], Result]) -> list[Result]:
    """Run a function on every rank, and share the results; fail on all ranks if it fails on one.

    Without this, a rank that fails would leave the others waiting in their next collective.

    Args:
        work: Returns anything small that JSON holds.

    Returns:
        The results in the order of the ranks, on every rank.

    Raises:
        Exception: The error of the first rank that failed. On the other ranks it is of the same
            class if that is one of samestep's own errors, else a `StepError`; it names that rank.
    """
    if world_size() == 1:
        return [work()]
    local_error: Exception | None = None
    try:
        outcome: dict[str, Any] = {"result": work()}
    except Exception as error:
        local_error, outcome = error, {"error": type(error).__name__, "message": str(error)}
    outcomes = all_gather_object(outcome)
    failed = [number for number, outcome in enumerate(outcomes) if "error" in outcome]
    if failed and failed[0] == rank() and local_error is not None:
        try:
            raise local_error
        finally:
            del local_error  # else this frame and the error would hold each other
    if failed:
        raise _remote_error(failed[0], **outcomes[failed[0]])
    return [outcome["result"] for outcome in outcomes]


def _remote_error(number: int, *, error: str, message: str) -> SamestepError:
    """The error of another rank, from the name of its class and its message."""
    error_class = getattr(errors, error, None)
    if isinstance(error_class, type) and issubclass(error_class, SamestepError):
        return error_class(f"rank {number}: {message}")
    return StepError(f"rank {number}: {error}: {message}")


def run_or_fail_together(work: Callable[[], T]) -> T:
    """Run a function on every rank; fail on all of them if it fails on one.

    Args:
        work: Anything that uses no other collective.

    Returns:
        This rank's own result.

    Raises:
        Exception: As for `gather_results`.
    """
    results: list[T] = []
    gather_results(lambda: results.append(work()))
    return results[0]


def on_rank_0(work: Callable[[], None]) -> None:
    """Run a function on rank 0 alone, while the others wait; fail on all if it fails.

    Args:
        work: Anything that uses no other collective.

    Raises:
        Exception: As for `gather_results`.
    """
    gather_results(work if rank() == 0 else lambda: None)


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    return any(all_gather_object(flag))


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor over the ranks.

    Args:
        tensor: Of the same shape and dtype on every rank; not changed, and no gradient flows
            through the sum.

    Returns:
        Of the same shape and dtype, the same on every rank.
    """
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone().contiguous()
    dist.all_reduce(total)
    return total


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all ranks, in the order of the ranks.

    Args:
        rows: [rows, ...]; the number of rows may differ between ranks, and be 0. No gradient
            flows through.

    Returns:
        [all rows, ...]; this rank's start at `row_offset`.
    """
    if world_size() == 1:
        return rows
    num_rows = all_gather_object(len(rows))
    padded = rows.new_zeros((max(num_rows), *rows.shape[1:]))
    padded[: len(rows)] = rows.detach()
    gathered = [torch.empty_like(padded) for _ in num_rows]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:number] for part, number in zip(gathered, num_rows, strict=True)])


def row_offset(num_rows: int) -> int:
    """Where this rank's rows start in `gather_rows`.

    Args:
        num_rows: How many rows this rank holds.

    Returns:
        How many rows all lower ranks hold together.
    """
    return sum(all_gather_object(num_rows)[: rank()])


_here = threading.local()


@contextmanager
def alone() -> Iterator[None]:
    """A block that this rank runs by itself, as if there were no others; for this thread alone.

    For measurements of replicated models: a rank that measures must not wait for the others.
    """
    before = getattr(_here, "alone", False)
    _here.alone = True
    try:
        yield
    finally:
        _here.alone = before


def _is_distributed() -> bool:
    by_itself = getattr(_here, "alone", False)
    return not by_itself and dist.is_available() and dist.is_initialized()


def _gather_bytes(message: bytes, size: int) -> list[bytes]:
    """The first ``size`` bytes of every rank's message, filled up with zeros."""
    device = _control_device()
    buffer = torch.frombuffer(bytearray(message[:size].ljust(size, b"\0")), dtype=torch.uint8)
    buffer = buffer.to(device)
    gathered = [torch.empty_like(buffer) for _ in range(world_size())]
    dist.all_gather(gathered, buffer)
    return [part.cpu().numpy().tobytes() for part in gathered]


def _control_device() -> torch.device:
    """Where small messages travel: the CPU, unless the group serves an accelerator alone."""
    if "cpu" in dist.get_backend_config():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")


COMMUNICATING = frozenset(
    function.__code__ for function in (_gather_bytes, all_reduce_sum, gather_rows)
)
"""The code of the functions here that wait for other ranks themselves, and run nothing else."""
