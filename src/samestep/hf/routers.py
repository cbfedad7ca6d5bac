"""A router loss of the whole window: its statistic in a first pass, its gradient in the second.

The model computes it by `load_balancing_loss_func` of its own module: experts x sum of f P, over
the tokens of a micro-batch. Here that function is stood in for while a loss is computed, so that
its statistic can be read, and the micro-batch gets its share of the window's value.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from samestep.engine.collectives import all_reduce_sum
from samestep.engine.terms import Coupled
from samestep.engine.two_pass import GatheredTerms, TwoPass, first_pass
from samestep.errors import ConfigError, StepError
from samestep.hf.proof import loss_of, select_rows, undisturbed
from samestep.hf.units import Batch, base_model, num_rows
from samestep.losses.logits import at_least_float32
from samestep.losses.router import batch_balance, load_statistic
from samestep.utils.agreement import FACTOR, relative_differences, rounding_noise

FUNCTION = "load_balancing_loss_func"
_TERM = "router loss"
_PARAMETERS = ("gate_logits", "num_experts", "top_k", "attention_mask")

Answer = Callable[["Call"], Tensor]


class Call:
    """One call of a model's `load_balancing_loss_func`.

    Args:
        function: It.
        values: Its arguments by name.
        rows: The rows of the micro-batch, and how many of them are not repeats.

    Attributes:
        own: What it returned, the value over the micro-batch alone.
        statistic: [1, 2, experts]: choices and shares of the experts, added up over tokens and
            layers, with a graph.
    """

    def __init__(
        self, function: Callable[..., Tensor], values: dict[str, Any], rows: tuple[int, int]
    ) -> None:
        self._function, self._values = function, values
        self._top_k = int(values["top_k"])
        self.own: Tensor = function(**values)
        self.statistic = self._statistic(rows)

    def _statistic(self, rows: tuple[int, int] | None = None) -> Tensor:
        gates, mask = self._values["gate_logits"], self._values["attention_mask"]
        device = gates[0].device
        weights = gates[0].new_ones(gates[0].shape[0])
        if mask is not None:
            weights = mask.reshape(-1).to(weights)
        if rows is not None and rows[1] < rows[0]:
            weights = weights.reshape(rows[0], -1).clone()
            weights[rows[1] :] = 0
        parts = []
        for gate in gates:
            shares = gate.to(device).softmax(-1)
            choices = shares.topk(self._top_k, dim=-1).indices
            wide = at_least_float32(shares)
            parts.append(load_statistic(wide, choices, weights=weights.reshape(-1)))
        return torch.stack(parts).sum(0)[None]

    def value(self, statistic: Tensor) -> Tensor:
        """The router loss of a statistic, as `load_balancing_loss_func` defines it."""
        return batch_balance(statistic, self._top_k)

    def check(self) -> None:
        """Compare the value of the statistic with the model's own.

        Raises:
            ConfigError: It is another function.
        """
        noise = max(rounding_noise(lambda: [self._function(**self._values)]))
        mine = self.value(self._statistic())
        (difference,) = relative_differences([self.own], [mine]).tolist()
        if not difference <= FACTOR * max(noise, torch.finfo(self.own.dtype).eps):
            raise ConfigError(
                f"two_pass=True: {FUNCTION} gives {float(self.own):.8g}, and experts x sum of f P "
                f"over the same tokens {float(mine):.8g}: this model balances in another way. Set "
                "model.config.output_router_logits = False"
            )


def balance_function(model: nn.Module) -> Callable[..., Tensor] | None:
    """The function by which a model balances its routers; None if it is not the usual one."""
    for kind in type(model).__mro__:
        function = getattr(sys.modules.get(kind.__module__), FUNCTION, None)
        if function is not None:
            known = tuple(inspect.signature(function).parameters)
            return function if known == _PARAMETERS else None
    return None


@contextmanager
def _answered(model: nn.Module, answer: Answer, *, rows: tuple[int, int]) -> Iterator[list[Call]]:
    """Let a model's router loss be what is answered to each call, within the block."""
    function = balance_function(model)
    if function is None:
        raise StepError(f"{type(model).__name__} has no {FUNCTION} that balances its routers")
    signature, calls = inspect.signature(function), list[Call]()

    def stand_in(*args: Any, **options: Any) -> Any:
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        if not isinstance(bound.arguments["gate_logits"], tuple):
            return function(*args, **options)
        calls.append(Call(function, dict(bound.arguments), rows))
        return answer(calls[-1])

    module = sys.modules[function.__module__]
    setattr(module, FUNCTION, stand_in)
    try:
        yield calls
    finally:
        setattr(module, FUNCTION, function)


class RouterBalance:
    """The router loss of a trainer's model, taken over each window, and over each evaluation.

    Args:
        trainer: One that `samestep.hf.refusals` lets pass.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._model = base_model(trainer)
        self._weight: float | None = None
        self._gathered = GatheredTerms()
        self._schedule: list[tuple[Any, int | None]] = []
        self._rows: list[tuple[int, int]] = []
        self._at = 0
        self._evaluated: list[tuple[Tensor, Callable[[Tensor], Tensor]]] = []

    def count(self, batches: Sequence[Batch], *, keep: int) -> None:
        """The first pass over a window: without gradients, with the dropout of the second.

        Args:
            batches: This rank's micro-batches.
            keep: How many rows of the last are not repeats.
        """
        self._schedule = [(batch, at) for at, batch in enumerate(batches)]
        rows = [num_rows(batch) for batch in batches]
        kept = [*rows[:-1], min(keep, rows[-1])] if rows else []
        self._rows, self._at = list(zip(rows, kept, strict=True)), 0
        with _drawn_again():
            self._gathered = first_pass(
                self._trainer.model, self._schedule, loss_fn=TwoPass(self._term)
            )

    def _term(self, _: nn.Module, batch: Any) -> dict[str, Coupled]:
        index = next(at for one, at in self._schedule if one is batch)
        call = self._run(batch, rows=self._rows[index or 0])
        return {_TERM: Coupled(call.statistic, call.value)}

    def _run(self, batch: Batch, *, rows: tuple[int, int]) -> Call:
        """Run a micro-batch, in the mode of a step, for its statistic."""
        _check_mask(batch, self._model)
        if self._weight is None:
            self._weight = self._measured_weight(batch)
        with (
            undisturbed(self._trainer, training=True),
            _answered(self._model, _own, rows=rows) as calls,
        ):
            loss_of(self._trainer, batch, balanced=True)
        return _only(calls)

    def _measured_weight(self, batch: Batch) -> float:
        """How much of its router loss a loss holds, by its derivative; asked of one row."""
        leaf = torch.zeros((), requires_grad=True)
        row = select_rows(batch, [0], paired=False)
        with (
            undisturbed(self._trainer),
            _drawn_again(),
            _answered(self._model, lambda call: leaf.to(call.own), rows=(1, 1)) as calls,
        ):
            loss = loss_of(self._trainer, row, balanced=True, with_graph=True)
            _only(calls).check()
            (weight,) = torch.autograd.grad(loss, leaf, allow_unused=True)
        if weight is None or not float(weight):
            raise ConfigError(
                "two_pass=True: the loss does not hold the model's router loss: set "
                "model.config.output_router_logits = False, or a router_aux_loss_coef"
            )
        return float(weight)

    @contextmanager
    def in_step(self) -> Iterator[Callable[[Tensor], tuple[Tensor, Tensor]]]:
        """The second pass of the next micro-batch.

        Yields:
            Takes a loss apart: into what it is without its router loss, and the micro-batch's
            share of that of the window.
        """
        value = self._gathered.value_of(_TERM)
        at, self._at = self._at, self._at + 1

        def split(loss: Tensor) -> tuple[Tensor, Tensor]:
            assert self._weight is not None
            (call,) = calls
            term = self._gathered.resolve({_TERM: Coupled(call.statistic, call.value)}, at)
            assert isinstance(term, dict)
            share = self._weight * term[_TERM].total.to(call.own)
            return loss - self._weight * value.to(loss), share

        with _answered(self._model, lambda call: value.to(call.own), rows=self._rows[at]) as calls:
            yield split
        if at + 1 == len(self._schedule):
            self._gathered.check_repeated(
                self._trainer.model, self._schedule, loss_fn=TwoPass(self._term)
            )

    @contextmanager
    def in_evaluation(self, batch: Batch, *, keep: int) -> Iterator[Callable[[float], float]]:
        """A batch of an evaluation; its statistic is kept for `end_evaluation`.

        Yields:
            What a loss is without its router loss.
        """
        rows = (num_rows(batch), keep)
        if self._weight is None:
            self._weight = self._measured_weight(batch)

        def without(loss: float) -> float:
            return loss - (self._weight or 0.0) * float(calls[0].own)

        with _answered(self._model, _own, rows=rows) as calls:
            yield without
        self._evaluated += [(call.statistic, call.value) for call in calls[:1]]

    def end_evaluation(self) -> tuple[float, float]:
        """The router loss over all that was evaluated, on all ranks, and its weight in the loss."""
        statistic = all_reduce_sum(torch.stack([one.double() for one, _ in self._evaluated]).sum(0))
        _, value = self._evaluated[0]
        self._evaluated = []
        return float(value(statistic)), self._weight or 0.0

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Losses without a router loss, within the block."""
        with _answered(self._model, lambda call: torch.zeros_like(call.own), rows=(1, 1)):
            yield


def _drawn_again() -> AbstractContextManager[None]:
    """Whatever is drawn within the block is drawn again after it."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    return torch.random.fork_rng(devices)


def _own(call: Call) -> Tensor:
    """The micro-batch's own router loss."""
    return call.own


def _only(calls: Sequence[Call]) -> Call:
    """The one call that a loss should have made."""
    if len(calls) != 1:
        raise ConfigError(
            f"two_pass=True: {FUNCTION} is called {len(calls)} times in a loss, where once can be "
            "served: set model.config.output_router_logits = False"
        )
    return calls[0]


def _check_mask(batch: Batch, model: nn.Module) -> None:
    """Refuse padding that the router loss would count as tokens."""
    ids, config = batch.get("input_ids"), getattr(model, "config", None)
    pad = getattr(config, "pad_token_id", None)
    known = "attention_mask" in batch or "position_ids" in batch
    if not known and ids is not None and pad is not None and bool((ids == pad).any()):
        raise StepError(
            "a micro-batch without attention_mask, with padding: the router loss would count it as "
            "tokens. Return the attention_mask from the data collator"
        )
