"""The sum of a weight's gradients as integers on a grid, in few passes over memory.

A float is rounded to an integer by adding 1.5 * 2**52 to it in float64, whose last bit is then
worth one: the bits of the result are those of that constant plus the integer. All that is done to a
piece is done while it is in the processor's cache.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch import distributed as dist

from samestep.engine.collectives import world_size
from samestep.engine.fold import LANES, Fold
from samestep.engine.gradients import BUCKET_ELEMENTS

_ROUNDER = torch.tensor(1.5 * 2.0**52, dtype=torch.float64)

_ROUNDER_BITS = 0x4338 << 48
"""The bits of `_ROUNDER`."""

_PIECE = 2 * LANES
"""Elements at a time for each thread of a CPU: with what is between they fit into its cache."""

_PIECE_ELSEWHERE = 128 * LANES

_TOGETHER = 2**20
"""Elements of small weights that one all-reduce carries, at most."""

_FLOAT32_SHIFTS = range(-126, 128)
"""Powers of two that float32 multiplies by exactly."""


class GridSum:
    """The sum of one weight's gradients over the micro-batches of a rank, then over all ranks.

    The first gradient is kept as it is: with the second both become integers in one pass.

    Args:
        shift: Each element of a gradient is rounded once to a multiple of ``2**-shift``, halves to
            even; None: it is only looked at.

    Example:
        >>> import torch
        >>> def add(*gradients):
        ...     total = GridSum(shift=40)
        ...     for gradient in gradients:
        ...         total.add(torch.tensor(gradient))
        ...     return total.finish()[0].tolist()
        >>> add([0.1, 3.0], [0.2, 1e-9], [-0.3, -3.0]) == add([-0.3, -3.0], [0.1, 3.0], [0.2, 1e-9])
        True
    """

    def __init__(self, shift: int | None) -> None:
        self._shift = shift
        self._first: Tensor | None = None
        self._total: Tensor | None = None
        self._surplus: int | None = None  # how many times `_ROUNDER_BITS` the total is too large
        self._least: Tensor | None = None
        self._most: Tensor | None = None

    @torch.no_grad()
    def add(self, gradient: Tensor) -> None:
        """Add a gradient, which is not to be changed afterwards.

        Args:
            gradient: Floats. Where an element times ``2**shift`` exceeds 2**51 the sum is garbage,
                which `largest` tells.
        """
        if self._shift is None:
            self._look(gradient)
        elif self._total is not None:
            self._add_rounded(self._total, gradient)
        elif self._first is None:
            self._first = gradient
        else:
            self._total = self._sum_of(self._first, gradient)

    def _sum_of(self, *gradients: Tensor) -> Tensor:
        self._first = None
        shape, device = gradients[0].shape, gradients[0].device
        total = torch.empty(shape, dtype=torch.int64, device=device)
        self._add_rounded(total, *gradients)
        return total

    def _add_rounded(self, total: Tensor, *gradients: Tensor) -> None:
        """Add gradients and their `_ROUNDER_BITS`, or subtract their opposites with those."""
        assert self._shift is not None
        factor, room, surplus = 2.0**self._shift, _room(total), self._surplus
        for into, *parts in _pieces(total, *gradients):
            surplus = self._surplus
            for part in parts:
                self._look(part)
                if surplus is None:
                    _rounder_plus(part, factor, room, into=into.view(torch.float64))
                elif surplus:
                    into.sub_(_rounder_plus(part, -factor, room))
                else:
                    into.add_(_rounder_plus(part, factor, room))
                surplus = 0 if surplus else 1
        self._surplus = surplus

    def _look(self, gradient: Tensor) -> None:
        """Nothing is kept of a piece: small tensors between large ones would break up the heap."""
        if not gradient.numel():
            return
        least, most = torch.aminmax(gradient.detach())
        if self._least is None or self._most is None:
            self._least, self._most = least, most
        else:
            torch.minimum(self._least, least, out=self._least)
            torch.maximum(self._most, most, out=self._most)

    def largest(self) -> Tensor:
        """The largest absolute value of any gradient so far, 0-d float64.

        Exact; infinite if one is not finite.
        """
        if self._first is not None and self._most is None:
            self._look(self._first)
        if self._least is None or self._most is None:
            return torch.zeros((), dtype=torch.float64)
        found = torch.maximum(self._least.abs(), self._most.abs()).double()
        return torch.where(found.isfinite(), found, torch.inf)

    def integers(self) -> Tensor:
        """The sum in units of the grid, which may be changed in place: int64."""
        if self._first is not None:
            self._total = self._sum_of(self._first)
        assert self._total is not None
        if self._surplus:
            self._total.sub_(_ROUNDER_BITS)
            self._surplus = 0
        return self._total

    @torch.no_grad()
    def finish(self) -> tuple[Tensor, Tensor]:
        """Leave the grid; there is nothing to add to afterwards.

        Returns:
            The sum rounded to float32, and what `samestep.engine.fold` leaves of the integers.
        """
        assert self._shift is not None
        first, total = self._first, self._total
        source = total if first is None else first
        assert source is not None
        self._first = self._total = None
        gradient = source  # in its own place: each piece is read before it is written
        if source.dtype != torch.float32 or not source.is_contiguous():
            gradient = torch.empty(source.shape, dtype=torch.float32, device=source.device)
        fold, room = Fold(source.numel(), source.device), _room(source)
        for into, part in _pieces(gradient, source):
            if first is not None:
                part = _rounder_plus(part, 2.0**self._shift, room).sub_(_ROUNDER_BITS)
            elif self._surplus:
                part.sub_(_ROUNDER_BITS)
            fold.add(part)
            _from_grid(into, part, self._shift)
        return gradient, fold.lanes()


def zero_sum(shape: torch.Size, shift: int | None, device: torch.device) -> GridSum:
    """The sum of nothing: of a rank that no gradient of a weight reached.

    Args:
        shape: Of the weight.
        shift: As for `GridSum`.
        device: Of the weight.

    Returns:
        A sum of zeros.
    """
    found = GridSum(shift or 0)
    found.add(torch.zeros(shape, device=device))
    return found


def all_reduce_buckets(weights: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Neighbours that go over the ranks together: large ones alone, small ones not too many.

    Args:
        weights: In the same order on every rank.

    Returns:
        All of them, in that order.
    """
    buckets: list[list[nn.Parameter]] = []
    free = 0
    for weight in weights:
        if weight.numel() > free or weight.device != buckets[-1][0].device:
            buckets.append([])
            free = _TOGETHER
        buckets[-1].append(weight)
        free -= weight.numel()
    return buckets


def add_over_ranks(sums: Sequence[GridSum]) -> None:
    """Add sums up over the ranks: integers, whose order does not matter.

    Args:
        sums: Of the same weights on every rank, on one device.
    """
    if world_size() == 1:
        return
    integers = [each.integers().view(-1) for each in sums]
    flat = integers[0] if len(integers) == 1 else torch.cat(integers)
    for piece in flat.split(BUCKET_ELEMENTS):
        dist.all_reduce(piece)
    if len(integers) > 1:
        parts = flat.split([len(each) for each in integers])
        for each, total in zip(integers, parts, strict=True):
            each.copy_(total)


def _rounder_plus(
    values: Tensor, factor: float, room: Tensor, into: Tensor | None = None
) -> Tensor:
    """The bits of ``1.5 * 2**52 + values * factor`` as int64, in ``room`` if nowhere else."""
    wide = room[: values.numel()].copy_(values)
    into = wide if into is None else into
    torch.add(_ROUNDER, wide, alpha=factor, out=into)
    return into.view(torch.int64)


def _from_grid(into: Tensor, whole: Tensor, shift: int) -> None:
    """``whole * 2**-shift``, rounded to float32."""
    if -shift in _FLOAT32_SHIFTS:
        into.copy_(whole).mul_(2.0**-shift)
    else:
        into.copy_(whole.double() * 2.0**-shift)


def _length(tensor: Tensor) -> int:
    on_cpu = tensor.device.type == "cpu"
    return _PIECE * torch.get_num_threads() if on_cpu else _PIECE_ELSEWHERE


def _room(tensor: Tensor) -> Tensor:
    size = min(_length(tensor), tensor.numel())
    return torch.empty(size, dtype=torch.float64, device=tensor.device)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Neighbouring elements of each, a piece at a time."""
    length = _length(tensors[0])
    return zip(*(each.detach().reshape(-1).split(length) for each in tensors), strict=True)
