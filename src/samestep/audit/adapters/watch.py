"""Watches a step: what its optimizers are given, at which rates, and what it leaves behind."""

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, autograd, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from samestep.audit.adapters.instrument import has_gradients, kept, read_gradients
from samestep.audit.gradients import (
    fold_of,
    global_norm,
    linear_combination,
    norms,
    sketch_fold,
    subtract,
)
from samestep.audit.subject import Gradient, Left, Observation


class StepWatch:
    """What one step does to a model.

    Args:
        model: The user's own, before the step.
        moves: Whether to look at weights and buffers at every backward.

    Attributes:
        steps: The gradient that each step of an optimizer was given.
        rates: The learning rates of each of these steps.
        moves: For each backward but the first, what moved since the one before.
        draws: Backwards during which random numbers were drawn; counted with ``moves``.
    """

    def __init__(self, model: nn.Module, *, moves: bool = False) -> None:
        self._model = model
        self._names = {id(weight): name for name, weight in model.named_parameters()}
        self._watches_moves = moves
        self.restart()

    def restart(self) -> None:
        """Forget what was seen: the step begins here."""
        self._before = _State(self._model)
        self._last: _State | None = None
        self._optimizers: dict[int, torch.optim.Optimizer] = {}
        self._waiting: set[int] = set()
        self.steps: list[Gradient] = []
        self.rates: list[tuple[float, ...]] = []
        self.moves: list[frozenset[str]] = []
        self.draws = 0

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Watch while the loop runs."""
        handles = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        try:
            with self._at_every_backward() if self._watches_moves else contextlib.nullcontext():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, options: Any) -> Any:
        """Keep the gradient, or let the step's closure make it first."""
        if not any(id(w) in self._names for g in optimizer.param_groups for w in g["params"]):
            return None
        self._optimizers[id(optimizer)] = optimizer
        self._waiting.add(id(optimizer))
        closure = options.get("closure") if len(args) < 2 else args[1]
        if not callable(closure):
            self._record(optimizer)
            return None
        watched = self._recording(optimizer, closure)
        if len(args) < 2:
            return args, {**options, "closure": watched}
        return (args[0], watched, *args[2:]), options

    def _recording(
        self, optimizer: torch.optim.Optimizer, closure: Callable[..., Any]
    ) -> Callable[..., Any]:
        """The closure; its first call leaves the gradient of the weights that the step began at."""

        def watched(*args: Any, **options: Any) -> Any:
            result = closure(*args, **options)
            self._record(optimizer)
            return result

        return watched

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if id(optimizer) in self._optimizers:
            self._record(optimizer)  # of a closure that was never called

    def _record(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep what the optimizer is given, once a step."""
        if id(optimizer) not in self._waiting:
            return
        self._waiting.discard(id(optimizer))
        own = [weight for group in optimizer.param_groups for weight in group["params"]]
        held = {
            self._names[id(w)]: w.grad for w in own if id(w) in self._names and w.grad is not None
        }
        if held:
            self.steps.append(kept(held, sketch_fold(self._model)))
            self.rates.append(_rates(optimizer))

    @contextlib.contextmanager
    def _at_every_backward(self) -> Iterator[None]:
        engine = vars(autograd)
        run_backward = engine["_engine_run_backward"]

        def looked_at(*args: Any, **options: Any) -> Any:
            now = _State(self._model)
            if self._last is not None:
                self.moves.append(frozenset(changed_names(now.kept, self._last.kept)))
            self._last = now
            state = torch.get_rng_state()
            result = run_backward(*args, **options)
            self.draws += not torch.equal(state, torch.get_rng_state())
            return result

        engine["_engine_run_backward"] = looked_at
        try:
            yield
        finally:
            engine["_engine_run_backward"] = run_backward

    def observation(self, reported: dict[str, float]) -> Observation:
        """What the step did.

        Args:
            reported: What the loop said.

        Returns:
            The gradient that the optimizers were given, added up over their steps; without one,
            the difference of the weights; if they did not move, what is left in ``.grad``.
        """
        model, after = self._model, _State(self._model)
        rounding = torch.finfo(next(model.parameters()).dtype).eps
        updates = max(Counter(name for step in self.steps for name in step).values(), default=0)
        stepped = bool(self.steps)
        if self.steps:
            gradient = linear_combination(self.steps, [1.0] * len(self.steps))
        else:
            before = self._before.read_trained()
            moved = subtract(before, after.read_trained())
            size, distance = global_norm(before), global_norm(moved)
            stepped = not distance <= 8 * rounding * size  # at most there and back again
            gradient = moved if stepped else read_gradients(model)
            rounding *= max(1.0, size / distance) if stepped else 1.0
        return Observation(
            gradient,
            reported=reported,
            rounding=rounding,
            updates=updates,
            left=self._left(after),
            leaves_gradients=has_gradients(model),
            stepped=stepped,
            moves=tuple(self.moves),
            draws=self.draws,
        )

    def left(self) -> Left:
        """What the step leaves: how far everything moved, and the rates."""
        return self._left(_State(self._model))

    def _left(self, after: "_State") -> Left:
        before, held = self._before.kept, self._read_optimizers()
        moved = {
            name: value - before[name]
            for name, value in after.kept.items()
            if name in before and value.shape == before[name].shape
        }
        of_optimizers = {name: _rounding_of(state) for name, state in held.items()}
        return Left(
            moved={**moved, **kept(held, after.fold)},
            rounding={**after.rounding(), **of_optimizers},
            rates=tuple(self.rates),
            rates_after=tuple(map(_rates, self._optimizers.values())),
            trained=frozenset(after.trained),
        )

    def _read_optimizers(self) -> dict[str, Tensor]:
        """What the optimizers hold of each weight, as "exp_avg of layer.weight"."""
        return {
            f"{key} of {self._names[id(weight)]}": value.detach()
            for optimizer in self._optimizers.values()
            for weight, state in optimizer.state.items()
            if id(weight) in self._names
            for key, value in state.items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }


def changed_names(now: Gradient, before: Gradient) -> list[str]:
    """Those whose values are others than before."""
    return [
        name
        for name, value in now.items()
        if name in before
        and (value.shape != before[name].shape or not torch.equal(value, before[name]))
    ]


class _State:
    """What a model holds, found in one walk over its modules, and what is kept of it.

    All weights, frozen ones too, and the buffers that a checkpoint would hold, if floating. Caches
    that no checkpoint holds, such as rotations as long as the longest row, are left out.

    Args:
        model: Read at once: it may move afterwards.

    Attributes:
        kept: By name; of large models not all elements, see `fold`.
        fold: How many elements are kept as one.
        trained: The trainable weights.
    """

    def __init__(self, model: nn.Module) -> None:
        tensors = _floating(model)
        self.fold = fold_of(tensors.values())
        self.kept = kept(tensors, self.fold)
        self.trained = {
            name: tensor
            for name, tensor in tensors.items()
            if tensor.requires_grad and isinstance(tensor, nn.Parameter)
        }
        fold = fold_of(self.trained.values())
        # Weights that are folded otherwise than all together have to be read before they move.
        self._trained = {} if fold == self.fold else kept(self.trained, fold)
        self._types = {name: tensor.dtype for name, tensor in tensors.items()}

    def read_trained(self) -> Gradient:
        """The trainable weights, folded as their gradient is."""
        return self._trained or {name: self.kept[name] for name in self.trained}

    def rounding(self) -> dict[str, float]:
        """How far each may be off by the rounding of its own type."""
        sizes = norms(self.kept)
        return {name: torch.finfo(self._types[name]).eps * size for name, size in sizes.items()}


def _floating(model: nn.Module) -> dict[str, Tensor]:
    """Each tensor once, under its first name."""
    found: dict[int, tuple[str, Tensor]] = {}
    for prefix, module in model.named_modules():
        cached = module._non_persistent_buffers_set
        for name, tensor in itertools.chain(module._parameters.items(), module._buffers.items()):
            if tensor is not None and tensor.is_floating_point() and name not in cached:
                found.setdefault(id(tensor), (f"{prefix}.{name}" if prefix else name, tensor))
    return dict(found.values())


def _rounding_of(tensor: Tensor) -> float:
    return float(torch.finfo(tensor.dtype).eps * tensor.norm())


def _rates(optimizer: torch.optim.Optimizer) -> tuple[float, ...]:
    return tuple(float(group["lr"]) for group in optimizer.param_groups if "lr" in group)
