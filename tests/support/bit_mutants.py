"""Wrong versions of bit-equal steps, each of which the comparison of runs must catch."""

from typing import Any

import bit_runs
import pytest
import torch
from bit_runs import Draw, run
from torch import Tensor, nn
from torch import distributed as dist

from samestep.engine import bitwise as bitwise_module
from samestep.engine import grid_sum
from samestep.engine.bitwise import GridSums
from samestep.engine.collectives import rank, world_size
from samestep.engine.grid_sum import GridSum


class FloatSum(GridSum):
    """Gradients added up in float32, in the order in which they come."""

    def add(self, gradient: Tensor) -> None:
        self._look(gradient)
        if self._shift is None:
            return
        if self._total is None:
            self._total = torch.zeros(gradient.shape, dtype=torch.int64)
        total = self._total.view(torch.float64)
        total.copy_(total.add_(gradient).float())

    def finish(self) -> tuple[Tensor, Tensor]:
        total = self.integers()
        return total.view(torch.float64).float(), total.view(-1)


def add_floats(patch: pytest.MonkeyPatch) -> None:
    """A float sum."""
    patch.setattr(bitwise_module, "GridSum", FloatSum)
    patch.setattr(grid_sum, "GridSum", FloatSum)

    def over_ranks(sums: Any) -> None:
        if world_size() > 1:
            for each in sums:
                dist.all_reduce(each.integers().view(torch.float64))

    patch.setattr(bitwise_module, "add_over_ranks", over_ranks)


def cut_by_rank(patch: pytest.MonkeyPatch) -> None:
    """Packs that depend on the rank: what a rank holds is one pack."""

    def deal(parts: Any, ranks: int, draw: Any) -> Any:
        whole = deal_packs(parts, ranks, draw)
        return [[_joined(own)] if own else [] for own in whole]

    deal_packs = bit_runs.deal
    patch.setattr(bit_runs, "deal", deal)


def _joined(packs: Any) -> Any:
    length = max(pack["labels"].shape[1] for pack in packs)

    def padded(pack: Any, fill: int) -> Tensor:
        rows = pack["input_ids"] if fill == 0 else pack["labels"]
        return nn.functional.pad(rows, (0, length - rows.shape[1]), value=fill)

    return {
        "input_ids": torch.cat([padded(pack, 0) for pack in packs]),
        "labels": torch.cat([padded(pack, -100) for pack in packs]),
        "example_weights": torch.cat([pack["example_weights"] for pack in packs]),
    }


def clip_in_rank_order(patch: pytest.MonkeyPatch) -> None:
    """A norm over the weights that begins with another one on each rank."""

    def reduce(self: GridSums, without_grad: Any) -> Any:
        pairs = list(reduce_in_order(self, without_grad).items())
        return dict(pairs[rank() :] + pairs[: rank()])

    reduce_in_order = GridSums.reduce
    patch.setattr(GridSums, "reduce", reduce)


def local_grid(patch: pytest.MonkeyPatch) -> None:
    """A grid from the largest element of this rank alone."""

    def of_this_rank(self: GridSums, reached: Any) -> dict[str, float]:
        with pytest.MonkeyPatch.context() as alone:
            alone.setattr(bitwise_module, "world_size", lambda: 1)
            return over_ranks(self, reached)

    over_ranks = GridSums._largest_over_ranks
    patch.setattr(GridSums, "_largest_over_ranks", of_this_rank)


MUTANTS = {
    "a float sum": add_floats,
    "packs that depend on the rank": cut_by_rank,
    "a clip in rank order": clip_in_rank_order,
    "a grid from the local maximum": local_grid,
}
"""By name; each takes what patches it in."""


def shows(draw: Draw, alone: Any) -> bool:
    """Whether a run differs from another, or its ranks from each other: what they send, even."""
    try:
        return bool(run(draw) != alone)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        return "ranks part" in str(error) or not isinstance(error, AssertionError)
