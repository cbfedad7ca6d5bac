"""The same bits on any ranks and in any order: what bit-equal steps carry, and how they add up.

A micro-batch is computed alone, so its gradient depends on the weights and on it. `GridSums` adds
those gradients up as integers on a grid (`samestep.engine.grid_sum`), which is the same on all
ranks because it comes from the step before; `Bitwise` carries it from step to step. Where an
element does not fit on the grid, or the grid is too coarse, the step is taken again on one that its
own largest elements give, on all ranks alike.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.amp.grad_scaler import GradScaler

from samestep.engine.collectives import world_size
from samestep.engine.exact_sum import digest_of_all, exponent_of, fits, grid_bits
from samestep.engine.fold import digest_of_lanes
from samestep.engine.grid_sum import GridSum, add_over_ranks, all_reduce_buckets, zero_sum
from samestep.engine.normalize import TermSum
from samestep.engine.parallel import Schedule, is_sharded, unwrap
from samestep.engine.repeatable import repeatable_operations
from samestep.errors import ConfigError, StepError

T = TypeVar("T")

_ATTEMPTS = 3
"""How often a step is taken: on the grid of the last step, and on its own. A third time says that
the gradient is another one each time."""


class Bitwise:
    """What bit-equal steps carry from one to the next; one object for all steps of a run.

    The micro-batches then are part of the run's definition: the same ones give the same bits, in
    any order and dealt to any ranks. `state_dict` belongs in a checkpoint.

    Attributes:
        digest: Of the summed gradient of the last step (`samestep.engine.fold`); empty before the
            first, and after one that failed.
        digests: The same of each weight, by name.
        retaken: How many steps were taken again on another grid; the first one always is.

    Example:
        >>> import torch, samestep
        >>> rows = torch.rand(7, 1)
        >>> def loss_fn(model, rows):
        ...     return samestep.Term((model(rows) - 1).square().sum(), unit="row")
        >>> def train(order):
        ...     model = torch.nn.Linear(1, 1)
        ...     torch.nn.init.ones_(model.weight), torch.nn.init.zeros_(model.bias)
        ...     optimizer, bitwise = torch.optim.Adam(model.parameters()), samestep.Bitwise()
        ...     for _ in range(3):
        ...         micro_batches = [rows[2 * at : 2 * at + 2] for at in order]
        ...         _ = samestep.step(
        ...             model,
        ...             optimizer,
        ...             micro_batches,
        ...             loss_fn,
        ...             counters={"row": len},
        ...             bitwise=bitwise,
        ...         )
        ...     return bitwise.digest, model.weight.item()
        >>> train([0, 1, 2, 3]) == train([3, 1, 0, 2])
        True
    """

    def __init__(self) -> None:
        self.digest = ""
        self.digests: dict[str, str] = {}
        self.retaken = 0
        self._exponents: dict[str, int] = {}
        self._repeats_checked = False

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {"exponents": dict(self._exponents)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Args:
            state: Of `state_dict`.
        """
        self._exponents = {str(name): int(value) for name, value in state["exponents"].items()}

    def sum_exactly(
        self,
        accumulate: Callable[["GridSums"], T],
        model: nn.Module,
        *,
        packs: int,
        scaler: GradScaler | None = None,
    ) -> T:
        """Run a step's micro-batches, again on another grid where the first does not fit.

        Args:
            accumulate: Runs them, adding up in what it is given.
            model: The model.
            packs: How many micro-batches there are, over all ranks.
            scaler: Refused.

        Returns:
            What ``accumulate`` returned on a grid that fits.

        Raises:
            ConfigError: Something that has no bits to keep: FSDP2, a gradient scaler, float64
                weights, an operation that PyTorch cannot repeat.
            StepError: A micro-batch that ran twice gave another gradient the second time.
        """
        names = _named_weights(model, scaler)
        self.digest, self.digests = "", {}
        on_gpu = any(weight.is_cuda for weight in names)
        with repeatable_operations("bitwise", on_gpu=on_gpu):
            for _ in range(_ATTEMPTS):
                sums = GridSums(
                    names, self._exponents, packs=packs, try_repeats=not self._repeats_checked
                )
                result = accumulate(sums)
                self._repeats_checked = True
                self._exponents = self._exponents | sums.exponents()
                if sums.fit:
                    self.digests = sums.digests
                    self.digest = digest_of_all(list(sums.digests.items()))
                    return result
                self.retaken += 1
        raise StepError(
            "bitwise: the step was taken three times, and its gradient was larger each time than "
            "the time before: something in the loss or the model is drawn anew in each forward"
        )


class GridSums:
    """The sums of one attempt at a step, and what was measured on the way.

    Args:
        names: The weights that train, in the model's order, and their names.
        exponents: Of the grid of each, by name; those without one take nothing but zeros.
        packs: How many micro-batches there are, over all ranks.
        try_repeats: Run this rank's first micro-batch twice, and compare.

    Attributes:
        fit: After `reduce`: whether every weight's grid held what was added.
        digests: After `reduce`: that of each weight's sum, by name.
    """

    def __init__(
        self,
        names: Mapping[nn.Parameter, str],
        exponents: Mapping[str, int],
        *,
        packs: int,
        try_repeats: bool,
    ) -> None:
        self._names = dict(names)
        self._bits = grid_bits(packs)
        self._before = {name: exponents.get(name) for name in names.values()}
        self._try_repeats = try_repeats
        self._on_trial = False
        self._first: dict[str, Any] | None = None
        self._checksums: dict[str, int] = {}
        self._seen: set[nn.Parameter] = set()
        self._sums: dict[nn.Parameter, GridSum] = {}
        self._measured: dict[str, float] = {}
        self.fit = True
        self.digests: dict[str, str] = {}

    @contextmanager
    def adding(self) -> Iterator[dict[nn.Parameter, Any]]:
        """Add each gradient to its sum as soon as it is complete.

        Yields:
            The weights that a gradient has reached so far, and their sums.
        """
        for weight in self._names:
            weight.grad = None
        hooks = [
            weight.register_post_accumulate_grad_hook(self._add_gradient) for weight in self._names
        ]
        try:
            yield self._sums
        finally:
            for hook in hooks:
                hook.remove()
            for weight in self._names:
                weight.grad = None

    def _add_gradient(self, weight: Tensor) -> None:
        assert isinstance(weight, nn.Parameter)
        gradient, weight.grad = weight.grad, None
        name = self._names[weight]
        assert gradient is not None
        if weight in self._seen or gradient.layout != torch.strided:
            raise ConfigError(
                f"bitwise: the gradient of {name} came "
                + ("in several parts of one backward" if weight in self._seen else "sparse")
                + ": turn off reentrant checkpointing or sparse gradients"
            )
        self._seen.add(weight)
        if self._first is not None or self._on_trial:
            self._checksums[name] = int(_bits_of(gradient).sum(dtype=torch.int64))
        if self._on_trial:
            return
        if weight not in self._sums:
            self._sums[weight] = GridSum(self._shift(name))
        self._sums[weight].add(gradient)

    def _shift(self, name: str) -> int | None:
        exponent = self._before[name]
        return None if exponent is None else self._bits - exponent

    def with_trial(self, schedule: Schedule) -> Schedule:
        """The micro-batches of this rank, before them the first once more if it is to be tried."""
        self._on_trial = self._try_repeats and bool(schedule)
        return schedule[:1] * self._on_trial + schedule

    def end_pack(self, sums: Mapping[str, TermSum]) -> bool:
        """Say that a micro-batch has been run.

        Args:
            sums: Its terms.

        Returns:
            Whether it counts: not the first time of one that is run twice.

        Raises:
            StepError: It was run twice, and gave something else the second time.
        """
        self._seen.clear()
        if not self._on_trial and self._first is None:
            return True
        totals = {f"term {name!r}": float(term.total.detach()) for name, term in sums.items()}
        found = self._checksums | totals
        self._checksums = {}
        if self._on_trial:
            self._on_trial, self._first = False, found
            return False
        assert self._first is not None
        before, self._first = self._first, None
        names = (*self._names.values(), *totals)
        differ = [n for n in names if repr(before.get(n)) != repr(found.get(n))]
        if differ:
            raise StepError(
                "bitwise: the same micro-batch gave another result the second time, for "
                f"{len(differ)} weights and terms, the first of them {differ[0]}: an operation of "
                f"this model is not repeatable here (PyTorch {torch.__version__}, "
                f"{torch.get_num_threads()} threads). Random numbers must be keyed to the examples"
            )
        return True

    @torch.no_grad()
    def reduce(self, without_grad_by_rank: Sequence[Sequence[int]]) -> dict[nn.Parameter, Tensor]:
        """Add up over the ranks, and leave the grid.

        Args:
            without_grad_by_rank: `samestep.engine.gradients.params_without_grad` of each rank.

        Returns:
            The gradient of each weight that got one, in the model's order; nothing if the grid did
            not fit. Where a gradient was not finite, all of it is NaN.
        """
        unreached = set.intersection(*map(set, without_grad_by_rank))
        reached = [weight for at, weight in enumerate(self._names) if at not in unreached]
        self._measured = self._largest_over_ranks(reached)
        self.fit = all(
            fits(self._before[name], largest) or largest == float("inf")
            for name, largest in self._measured.items()
        )
        if not self.fit:
            self._sums.clear()
            return {}
        gradients: dict[nn.Parameter, Tensor] = {}
        lanes: dict[str, Tensor] = {}
        for bucket in all_reduce_buckets(reached):
            sums = [self._sum_of(weight) for weight in bucket]
            add_over_ranks(sums)
            for weight, total in zip(bucket, sums, strict=True):
                name = self._names[weight]
                gradients[weight], left = total.finish()
                if self._measured[name] == float("inf"):
                    gradients[weight].fill_(float("nan"))
                else:
                    lanes[name] = left
        self.digests = self._digests(gradients, lanes)
        return gradients

    def _sum_of(self, weight: nn.Parameter) -> GridSum:
        """The sum of a weight; of nothing but zeros where it has no grid, or no gradient here."""
        found, shift = self._sums.pop(weight, None), self._shift(self._names[weight])
        if found is None or shift is None:
            return zero_sum(weight.shape, shift, weight.device)
        return found

    def _digests(
        self, gradients: Mapping[nn.Parameter, Tensor], lanes: Mapping[str, Tensor]
    ) -> dict[str, str]:
        """Of each weight's sum; all of them leave a GPU at once."""
        if not lanes:
            return {}
        device = next(iter(lanes.values())).device
        together = torch.cat([each.to(device) for each in lanes.values()]).cpu()
        parts = together.split([len(each) for each in lanes.values()])
        shapes = {self._names[weight]: tuple(weight.shape) for weight in gradients}
        return {
            name: digest_of_lanes(part, f"{shapes[name]} {self._shift(name)}")
            for name, part in zip(lanes, parts, strict=True)
        }

    def _largest_over_ranks(self, reached: Sequence[nn.Parameter]) -> dict[str, float]:
        if not reached:
            return {}
        device, zero = reached[0].device, torch.zeros((), dtype=torch.float64)
        found = torch.stack(
            [
                (self._sums[weight].largest() if weight in self._sums else zero).to(device)
                for weight in reached
            ]
        )
        if world_size() > 1:
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return dict(zip([self._names[weight] for weight in reached], found.tolist(), strict=True))

    def exponents(self) -> dict[str, int]:
        """The grid that the next attempt, or the next step, takes: of what was measured here."""
        found = {
            name: exponent_of(largest)
            for name, largest in self._measured.items()
            if largest != float("inf")
        }
        return {name: exponent for name, exponent in found.items() if exponent is not None}


def _bits_of(gradient: Tensor) -> Tensor:
    """A gradient's bits as integers, of which any sum is exact."""
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return gradient.contiguous().view(sizes[gradient.element_size()])


def _named_weights(model: nn.Module, scaler: GradScaler | None) -> dict[nn.Parameter, str]:
    """The weights that train and their names; refuses what cannot keep its bits."""
    if is_sharded(model):
        raise ConfigError(
            "bitwise: FSDP2 sums gradients by itself, in an order that depends on the ranks: keep "
            "the weights on every rank (a plain module, DistributedDataParallel; --parallel ddp)"
        )
    if scaler is not None:
        raise ConfigError("bitwise: a gradient scaler changes the gradient's bits: use bfloat16")
    names = {w: name for name, w in unwrap(model).named_parameters() if w.requires_grad}
    wide = [name for weight, name in names.items() if weight.dtype == torch.float64]
    if wide:
        raise ConfigError(
            f"bitwise: {wide[0]} is float64, and sums of integers of 64 bits keep some 46 of its "
            "53: use float32"
        )
    return names
