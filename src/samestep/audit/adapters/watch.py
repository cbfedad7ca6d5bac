"""Watches a step: what its optimizers are given, at which rates, and what it leaves behind."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, autograd, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from samestep.audit.adapters.instrument import kept, read_gradients, read_weights
from samestep.audit.gradients import (
    MAX_ELEMENTS,
    global_norm,
    linear_combination,
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
        self._before, self._held = read_weights(self._model), read_state(self._model)
        self._last: Gradient | None = None
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
            now = read_state(self._model)
            if self._last is not None:
                self.moves.append(frozenset(changed_names(now, self._last)))
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
        model, before = self._model, self._before
        rounding = torch.finfo(next(model.parameters()).dtype).eps
        moved = subtract(before, read_weights(model))
        # At most there and back again.
        still = global_norm(moved) <= 8 * rounding * global_norm(before)
        updates = max(Counter(name for step in self.steps for name in step).values(), default=0)
        if self.steps:
            gradient = linear_combination(self.steps, [1.0] * len(self.steps))
        elif still:
            gradient = read_gradients(model)
        else:
            gradient = moved
            rounding *= max(1.0, global_norm(before) / global_norm(moved))
        return Observation(
            gradient,
            reported=reported,
            rounding=rounding,
            updates=updates,
            left=self.left(),
            stepped=bool(self.steps) or not still,
            moves=tuple(self.moves),
            draws=self.draws,
        )

    def left(self) -> Left:
        """What the step leaves: how far everything moved, and the rates."""
        after, held = read_state(self._model), self._read_optimizers()
        moved = {
            name: value - self._held[name]
            for name, value in after.items()
            if name in self._held and value.shape == self._held[name].shape
        }
        rounding = {name: _rounding(self._model, name, value) for name, value in after.items()}
        return Left(
            moved={**moved, **kept(held, _fold(self._model))},
            rounding={**rounding, **{name: _rounding_of(state) for name, state in held.items()}},
            rates=tuple(self.rates),
            rates_after=tuple(map(_rates, self._optimizers.values())),
            trained=frozenset(n for n, w in self._model.named_parameters() if w.requires_grad),
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


def read_state(model: nn.Module) -> Gradient:
    """All weights, frozen ones too, and the buffers that a checkpoint would hold, if floating."""
    return kept(_floating(model), _fold(model))


def _fold(model: nn.Module) -> int:
    """How many elements are kept as one: of large models not all are."""
    elements = sum(tensor.numel() for tensor in _floating(model).values())
    return max(1, -(-elements // MAX_ELEMENTS))


def _floating(model: nn.Module) -> dict[str, Tensor]:
    """Caches that no checkpoint holds, such as rotations as long as the longest row, are left."""
    cached = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        name: tensor
        for name, tensor in named.items()
        if tensor.is_floating_point() and name not in cached
    }


def _rounding(model: nn.Module, name: str, kept_value: Tensor) -> float:
    """How far a tensor of this size may be off by the rounding of its own type."""
    tensor = _floating_type(model, name)
    return float(torch.finfo(tensor).eps * kept_value.norm())


def _rounding_of(tensor: Tensor) -> float:
    return float(torch.finfo(tensor.dtype).eps * tensor.norm())


def _floating_type(model: nn.Module, name: str) -> torch.dtype:
    path, _, attribute = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), attribute)
    return tensor.dtype


def _rates(optimizer: torch.optim.Optimizer) -> tuple[float, ...]:
    return tuple(float(group["lr"]) for group in optimizer.param_groups if "lr" in group)
