"""What samestep knows of other ranks: the sums, gathers and agreements that a step needs.

With no process group, or one rank, everything here is the identity and costs nothing.

Small facts (counts, totals, errors) travel as JSON in one all-gather of a fixed number of bytes and
are added up by every rank in the same order: the result is the same on all of them, names need no
agreement beforehand (a rank that holds no example does not know which units the others count), and
nothing is unpickled.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from samestep import errors
from samestep.errors import SamestepError, StepError

ENVELOPE = 1024
"""Bytes that each rank sends in the one collective of `all_gather_object`; longer ones take two."""

Result = TypeVar("Result")
"""Something that JSON holds."""

Anything = TypeVar("Anything")


def world_size() -> int:
    """The number of ranks; 1 without a process group."""
    return dist.get_world_size() if _is_distributed() else 1


def rank() -> int:
    """The number of this rank, from 0."""
    return dist.get_rank() if _is_distributed() else 0


def all_gather_object(value: Any) -> list[Any]:
    """What each rank gave, in the order of the ranks, on every rank.

    Args:
        value: Anything small that JSON holds; floats arrive to the last bit.
    """
    if world_size() == 1:
        return [value]
    message = json.dumps(value).encode()
    sizes_and_heads = _gather_bytes(len(message).to_bytes(8, "little") + message, ENVELOPE)
    sizes = [int.from_bytes(part[:8], "little") for part in sizes_and_heads]
    longest = max(sizes)
    if longest > ENVELOPE - 8:
        bodies = _gather_bytes(message, longest)
    else:
        bodies = [part[8:] for part in sizes_and_heads]
    return [json.loads(body[:size]) for body, size in zip(bodies, sizes, strict=True)]


def gather_results(work: Callable[[], Result]) -> list[Result]:
    """Do something on every rank, and share the results; fail on all ranks if it fails on one.

    Without this, a rank that fails would leave the others waiting in their next collective.

    Args:
        work: Returns anything small that JSON holds.

    Returns:
        The results in the order of the ranks, on every rank.

    Raises:
        Exception: What the first rank that failed has raised. On the other ranks it is of the same
            class if that is one of samestep's own errors, else a `StepError`; it names that rank.
    """
    if world_size() == 1:
        return [work()]
    own: Exception | None = None
    try:
        outcome: dict[str, Any] = {"result": work()}
    except Exception as error:
        own, outcome = error, {"error": type(error).__name__, "message": str(error)}
    outcomes = all_gather_object(outcome)
    failed = [number for number, found in enumerate(outcomes) if "error" in found]
    if failed and failed[0] == rank() and own is not None:
        raise own
    if failed:
        raise _of_another_rank(failed[0], **outcomes[failed[0]])
    return [found["result"] for found in outcomes]


def _of_another_rank(number: int, *, error: str, message: str) -> SamestepError:
    kind = getattr(errors, error, None)
    if isinstance(kind, type) and issubclass(kind, SamestepError):
        return kind(f"rank {number}: {message}")
    return StepError(f"rank {number}: {error}: {message}")


def run_or_fail_together(work: Callable[[], Anything]) -> Anything:
    """Do something on every rank; fail on all of them if it fails on one.

    Args:
        work: Anything that uses no other collective.

    Returns:
        This rank's own result.

    Raises:
        Exception: As for `gather_results`.
    """
    results: list[Anything] = []
    gather_results(lambda: results.append(work()))
    return results[0]


def on_rank_0(work: Callable[[], None]) -> None:
    """Do something on rank 0 alone, while the others wait; fail on all if it fails.

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
    """The sum of a tensor over the ranks, in its own dtype; ranks must agree on the shape.

    Args:
        tensor: Any shape; not changed, and no gradient flows through the sum.
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
    numbers = all_gather_object(len(rows))
    padded = rows.new_zeros((max(numbers), *rows.shape[1:]))
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in numbers]
    dist.all_gather(parts, padded)
    return torch.cat([part[:number] for part, number in zip(parts, numbers, strict=True)])


def row_offset(number: int) -> int:
    """How many rows lower ranks hold together, if this one holds ``number``."""
    return sum(all_gather_object(number)[: rank()])


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _gather_bytes(message: bytes, size: int) -> list[bytes]:
    """The first ``size`` bytes of every rank's message, filled up with zeros."""
    device = _control_device()
    own = torch.frombuffer(bytearray(message[:size].ljust(size, b"\0")), dtype=torch.uint8)
    own = own.to(device)
    parts = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(parts, own)
    return [part.cpu().numpy().tobytes() for part in parts]


def _control_device() -> torch.device:
    """Where small messages travel: the CPU, unless the group serves an accelerator alone."""
    if "cpu" in dist.get_backend_config():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")
