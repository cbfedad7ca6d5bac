"""Computing a language model's last layer and its head at the targets alone.

What follows attention works on each position by itself, and of the last layer's positions a loss
reads the targets alone. So its queries, its output projection and its MLP are computed for them;
the other positions hold zeros there, which nothing reads. Keys and values are computed for all.

The model's own code stays as it is: hooks select the rows of an input and scatter those of an
output. The positions come as an argument of the model, ``target_positions``, which transformers
hands down to its attention. That comes first in a layer, also where gradient checkpointing runs
the layer again, so every run of the layer receives them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from samestep.engine.targets import shifted_targets, target_positions
from samestep.errors import ConfigError
from samestep.losses.cross_entropy import logits_cross_entropy, module_cross_entropy
from samestep.losses.likelihood import (
    NOTHING_ELSE,
    Extras,
    Likelihoods,
    linear_likelihoods,
    logits_likelihoods,
    module_likelihoods,
)
from samestep.losses.linear_cross_entropy import CrossEntropySums, linear_cross_entropy
from samestep.losses.logits import columns_of, soft_cap
from samestep.models.outputs import model_inputs
from samestep.utils.agreement import LOW_PRECISION, compare_in_one_precision


@dataclass(frozen=True)
class LogitRule:
    """How a model turns its head's output into logits: scale, then soft cap.

    Attributes:
        scale: Factor of the head's output.
        softcap: c of c * tanh(logits / c), or None.
    """

    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class HiddenStates:
    """What a language model computed for one micro-batch, short of the logits.

    Where the model was run with ``positions``, ``states`` mean nothing elsewhere.

    Attributes:
        head: The output embedding.
        states: The head's input [rows, length, width]; or the logits [rows, length, vocabulary] of
            a model that does more than a head, a scale and a soft cap to make them.
        rule: What turns the head's output into logits; None if ``states`` are logits.
        outputs: What the model returned.
    """

    head: nn.Module
    states: Tensor
    rule: LogitRule | None
    outputs: Any

    def tempered(self, temperature: float) -> "HiddenStates":
        """The same, of which all logits are divided by a temperature.

        Args:
            temperature: Above 0.

        Returns:
            Itself for 1.
        """
        if temperature == 1:
            return self
        if self.rule is None:
            return replace(self, states=self.states / temperature)
        # c tanh(x / c) / t is (c / t) tanh((x / t) / (c / t)).
        cap = self.rule.softcap
        softcap = None if cap is None else cap / temperature
        return replace(self, rule=LogitRule(self.rule.scale / temperature, softcap))

    @property
    def vocabulary(self) -> int:
        """Columns of the logits."""
        return self.states.shape[-1] if self.rule is None else columns_of(self.head)

    def cross_entropy(self, targets: Tensor, **options: Any) -> CrossEntropySums:
        """Sums of cross entropy over the targets.

        Args:
            targets: [rows, length], int64; ``IGNORE`` where there is none.
            **options: Those of `samestep.linear_cross_entropy`.

        Returns:
            The sums; the loss has a graph.
        """
        if self.rule is None:
            return logits_cross_entropy(self.states, targets, **options)
        hidden, options["softcap"] = _scaled(self.states, self.rule), self.rule.softcap
        if type(self.head) is nn.Linear:
            weight, options["bias"] = self.head.weight, self.head.bias
            return linear_cross_entropy(hidden, weight, targets, **options)
        return module_cross_entropy(self.head, hidden, targets, **options)

    def logits(self, states: Tensor) -> Tensor:
        """The logits of some positions.

        Args:
            states: Rows of ``self.states`` [positions, width].

        Returns:
            [positions, vocabulary], with a graph.
        """
        if self.rule is None:
            return states
        return soft_cap(self.head(_scaled(states, self.rule)), self.rule.softcap)

    def likelihoods(
        self, targets: Tensor, positions: Tensor, *, extras: Extras = NOTHING_ELSE
    ) -> Likelihoods:
        """The likelihood of each target by itself.

        Args:
            targets: [rows, length], int64; ``IGNORE`` where there is none.
            positions: Of the targets in the flattened rows [targets], int64.
            extras: What else is wanted.

        Returns:
            Vectors [targets], in reading order.
        """
        options: dict[str, Any] = {"positions": positions, "extras": extras}
        if self.rule is None:
            return logits_likelihoods(self.states, targets, **options)
        hidden, options["softcap"] = _scaled(self.states, self.rule), self.rule.softcap
        if type(self.head) is nn.Linear:
            weight, options["bias"] = self.head.weight, self.head.bias
            return linear_likelihoods(hidden, weight, targets, **options)
        return module_likelihoods(self.head, hidden, targets, **options)


def _scaled(states: Tensor, rule: LogitRule) -> Tensor:
    return states if rule.scale == 1 else states * rule.scale


class UpToHead:
    """Runs language models of transformers with their head on one position only.

    On a model's first micro-batch that one position shows what the model does to its head's output
    to make logits: nothing, a scale (as Granite), or a soft cap (as Gemma 2). A model that does
    something else is run with all of its logits instead.
    """

    def __init__(self) -> None:
        self._rules: WeakKeyDictionary[nn.Module, LogitRule | None] = WeakKeyDictionary()

    def __call__(
        self,
        model: nn.Module,
        micro_batch: Mapping[str, Any],
        *,
        positions: Tensor | None = None,
        **kwargs: Any,
    ) -> HiddenStates:
        """Run a model.

        Args:
            model: A causal language model of transformers, plain or wrapped by PEFT.
            micro_batch: ``input_ids`` [rows, length], and what else the model takes.
            positions: Where in the flattened rows the states are needed [positions], int64;
                elsewhere they may be anything (see `samestep.models.lm_head`). None: everywhere.
            **kwargs: Further arguments of the model.

        Returns:
            Its states.

        Raises:
            ConfigError: The model calls its output embedding more than once.
        """
        inputs = model_inputs(micro_batch) | kwargs
        inputs.setdefault("use_cache", False)  # nothing is generated
        head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        inputs |= position_kwargs(head, positions)
        if head not in self._rules or self._rules[head] is not None:
            found = _split_at_head(model, head, inputs)
            hidden, outputs = found.states, found.outputs
            if head not in self._rules:
                self._rules[head] = _logit_rule(model, found.product, outputs.logits)
            rule = self._rules[head]
            if rule is not None:
                return HiddenStates(head, hidden, rule, outputs)
        outputs = model(**inputs)
        return HiddenStates(head, outputs.logits, None, outputs)

    def target_likelihoods(
        self,
        model: nn.Module,
        micro_batch: Mapping[str, Any],
        *,
        extras: Extras = NOTHING_ELSE,
        temperature: float = 1.0,
    ) -> Likelihoods:
        """Run a model and take the likelihood of each target by itself.

        Args:
            model: As for a call.
            micro_batch: As for a call, with ``labels`` [rows, length].
            extras: What else is wanted.
            temperature: What logits are divided by.

        Returns:
            Vectors [targets], in reading order.

        Raises:
            ConfigError: As for a call.
        """
        positions = target_positions(micro_batch)
        states = self(model, micro_batch, positions=positions).tempered(temperature)
        return states.likelihoods(shifted_targets(micro_batch), positions, extras=extras)


@dataclass(frozen=True)
class _Split:
    """A forward whose head saw the first position only.

    Attributes:
        states: The head's input [rows, length, width].
        product: Its output [rows, 1, vocabulary], in float32 at least.
        outputs: What the model made of that.
    """

    states: Tensor
    product: Tensor
    outputs: Any


def _split_at_head(model: nn.Module, head: nn.Module, inputs: Mapping[str, Any]) -> _Split:
    seen: list[Tensor] = []
    products: list[Tensor] = []

    def keep_one_position(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        seen.append(arguments[0])
        return (arguments[0][:, :1],)

    def widen(_: nn.Module, __: Any, product: Tensor) -> Tensor:
        # What the model makes of it then shows without the rounding of a low precision.
        products.append(product.float() if product.dtype in LOW_PRECISION else product)
        return products[-1]

    hooks = [head.register_forward_pre_hook(keep_one_position), head.register_forward_hook(widen)]
    try:
        outputs = model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if len(seen) != 1:
        raise ConfigError(
            f"{type(model).__name__} calls its output embedding {len(seen)} times a forward; "
            "this loss serves models that call it once"
        )
    return _Split(seen[0], products[0], outputs)


def _logit_rule(model: nn.Module, product: Tensor, logits: Tensor) -> LogitRule | None:
    """What turns the head's output into the model's logits; None if it is neither of the known.

    Args:
        model: The model.
        product: The head's output.
        logits: What the model made of it.
    """
    product, logits = product.detach(), logits.detach()

    def fits(candidate: Callable[[], Tensor]) -> bool:
        return compare_in_one_precision(
            lambda: [candidate().to(logits.dtype)], lambda: [logits]
        ).holds

    if fits(lambda: product * 1.0):
        return LogitRule()
    cap = model.config.get_text_config().to_dict().get("final_logit_softcapping")  # type: ignore
    if cap and fits(lambda: soft_cap(product, cap)):
        return LogitRule(softcap=cap)
    wide, wanted = product.double(), logits.double()
    scale = float((wide * wanted).sum() / (wide * wide).sum())
    return LogitRule(scale=scale) if fits(lambda: product * scale) else None


ARGUMENT = "target_positions"
"""The model's argument that holds the positions [targets] in its flattened rows, int64."""

ATTENTION = "self_attn"
"""What comes first in a layer, after a norm."""

_ROW_WISE = ("self_attn.q_proj", "self_attn.o_proj", "mlp")
"""Parts of a layer whose input is one tensor [rows, length, width], each position by itself."""

_hooked_heads: WeakSet[nn.Module] = WeakSet()
"""The heads of the models whose last layer has the hooks."""

_pending: WeakKeyDictionary[nn.Module, tuple[Tensor, torch.Size]] = WeakKeyDictionary()
"""For each module that is to run next: the positions, and the shape of all of them."""


def row_wise_modules(layer: nn.Module) -> list[nn.Module]:
    """The modules of a layer that can be computed for some positions only.

    Args:
        layer: A decoder layer of transformers.

    Returns:
        Empty if it is built otherwise.
    """
    return [module for name, module in layer.named_modules() if name in _ROW_WISE]


def install_hooks(layer: nn.Module, head: nn.Module) -> Callable[[], None]:
    """Make a model's last layer compute only the positions of ``target_positions``.

    Args:
        layer: The last layer. A forward without the argument computes every position.
        head: The model's output embedding, by which `position_kwargs` recognises the model.

    Returns:
        A function that removes the hooks.
    """
    modules = row_wise_modules(layer)

    def take_positions(
        _: nn.Module, args: Any, kwargs: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        remaining = dict(kwargs)
        positions = remaining.pop(ARGUMENT, None)
        for module in modules:
            if positions is None:
                _pending.pop(module, None)  # left by a run that failed
            else:
                _pending[module] = positions, torch.Size()
        return args, remaining

    attention = layer.get_submodule(ATTENTION)
    hooks = [attention.register_forward_pre_hook(take_positions, with_kwargs=True)]
    for module in modules:
        hooks.append(module.register_forward_pre_hook(_select))
        hooks.append(module.register_forward_hook(_scatter))
    _hooked_heads.add(head)

    def remove() -> None:
        for hook in hooks:
            hook.remove()
        _hooked_heads.discard(head)

    return remove


def position_kwargs(head: nn.Module, positions: Tensor | None) -> dict[str, Tensor]:
    """The argument that tells a model which positions its last layer has to compute.

    Args:
        head: The model's output embedding.
        positions: [targets] in the flattened rows, int64; None: all of them.

    Returns:
        Further keyword arguments of the model; empty unless its last layer has the hooks.
    """
    return {} if positions is None or head not in _hooked_heads else {ARGUMENT: positions}


def _select(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
    """Keep the rows of the positions: [rows, length, width] to [1, targets, width]."""
    if module not in _pending:
        return None
    (states,) = args
    positions, _ = _pending[module]
    _pending[module] = positions, states.shape[:-1]
    return (states.flatten(0, -2).index_select(0, positions)[None],)


def _scatter(module: nn.Module, _: Any, output: Tensor) -> Tensor | None:
    """Put the rows back in their places, with zeros elsewhere: [rows, length, width]."""
    if module not in _pending:
        return None
    positions, shape = _pending.pop(module)
    zeros = output.new_zeros(shape.numel(), output.shape[-1])
    return zeros.index_copy(0, positions, output[0]).view(*shape, -1)
