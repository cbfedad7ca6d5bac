"""The causal language model loss: next-token cross entropy through any transformers model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from samestep.errors import ConfigError
from samestep.losses.cross_entropy import logits_cross_entropy, module_cross_entropy
from samestep.losses.linear_cross_entropy import CrossEntropySums, linear_cross_entropy
from samestep.targets import shifted_targets
from samestep.terms import Constant, Term, Unit, target_weights

NOT_FOR_THE_MODEL = ("labels", "example_ids", "example_weights")


@dataclass(frozen=True)
class _LogitRule:
    """How a model makes logits of its head's output: scale, then soft cap."""

    scale: float = 1.0
    softcap: float | None = None


class CausalLMLoss:
    """Next-token cross entropy as terms, without ever holding the whole logits.

    A callable ``(model, micro) -> {name: Term}`` for `samestep.step` and `samestep.evaluate`.
    The terms: "nll" (what is optimised; with smoothing or z-loss it is "regularised_nll", and
    "nll" a metric beside it) and "accuracy" (a metric: the most likely token is the target).

    The model runs once, with its head on one position only; the head is then applied to the
    targets alone, in chunks. That one position shows on the first micro-batch whether the model
    does more than its head to make logits (a scale as in Granite, a soft cap as in Gemma 2); a
    model that does something else is run with whole logits instead.

    Args:
        normalize: "token", "sequence" or `constant`: the unit of the terms. Each example's
            ``example_weights`` [sequences] of the micro-batch are honoured.
        label_smoothing: From 0 up to 1.
        z_loss: Factor of the squared logsumexp.

    Raises:
        ConfigError: A value out of its range.
    """

    def __init__(
        self, *, normalize: Unit = "token", label_smoothing: float = 0.0, z_loss: float = 0.0
    ) -> None:
        if normalize not in ("token", "sequence") and not isinstance(normalize, Constant):
            raise ConfigError(
                f"normalize={normalize!r}: use 'token', 'sequence' or samestep.constant(k)"
            )
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"label_smoothing={label_smoothing}: from 0 up to, not with, 1")
        if z_loss < 0:
            raise ConfigError(f"z_loss={z_loss}: at least 0")
        self.normalize = normalize
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self._rules: WeakKeyDictionary[nn.Module, _LogitRule | None] = WeakKeyDictionary()

    def __call__(self, model: nn.Module, micro: Mapping[str, Any]) -> dict[str, Term]:
        """Sums over one micro-batch.

        Args:
            model: A causal language model of transformers, plain or wrapped by PEFT.
            micro: ``input_ids`` and ``labels`` [rows, length], and what else the model takes;
                see `samestep.targets.shifted_targets` for how packs and padding are told.

        Returns:
            The terms, in the unit ``normalize``.
        """
        sums = self._sums(model, micro)
        nll = Term(sums.nll, self.normalize, weight=0.0)
        accuracy = Term(sums.correct, self.normalize, weight=0.0)
        if self.label_smoothing or self.z_loss:
            loss = Term(sums.loss, self.normalize)
            return {"regularised_nll": loss, "nll": nll, "accuracy": accuracy}
        return {"nll": Term(sums.loss, self.normalize), "accuracy": accuracy}

    def _sums(self, model: nn.Module, micro: Mapping[str, Any]) -> CrossEntropySums:
        inputs = {key: micro[key] for key in micro if key not in NOT_FOR_THE_MODEL}
        inputs.setdefault("use_cache", False)  # keys and values kept for nothing
        head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        targets = shifted_targets(micro)
        options: dict[str, Any] = {
            "target_weights": target_weights(micro, self.normalize),
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
        }
        if head not in self._rules or self._rules[head] is not None:
            hidden, logits = _split_at_head(model, head, inputs)
            if head not in self._rules:
                self._rules[head] = _logit_rule(model, head, hidden, logits)
            rule = self._rules[head]
            if rule is not None:
                scaled = hidden if rule.scale == 1 else hidden * rule.scale
                return _through_head(head, scaled, targets, softcap=rule.softcap, **options)
        return logits_cross_entropy(model(**inputs).logits, targets, **options)


def _through_head(
    head: nn.Module, hidden: Tensor, targets: Tensor, **options: Any
) -> CrossEntropySums:
    if type(head) is nn.Linear:
        return linear_cross_entropy(hidden, head.weight, targets, bias=head.bias, **options)
    return module_cross_entropy(head, hidden, targets, **options)


def _split_at_head(
    model: nn.Module, head: nn.Module, inputs: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """The head's input [rows, length, width], and the model's logits at the first position."""
    seen: list[Tensor] = []

    def keep_one_position(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        seen.append(arguments[0])
        return (arguments[0][:, :1],)

    hook = head.register_forward_pre_hook(keep_one_position)
    try:
        logits = model(**inputs).logits
    finally:
        hook.remove()
    if len(seen) != 1:
        raise ConfigError(
            f"{type(model).__name__} calls its output embedding {len(seen)} times a forward; "
            "CausalLMLoss serves models that call it once"
        )
    return seen[0], logits


def _logit_rule(
    model: nn.Module, head: nn.Module, hidden: Tensor, logits: Tensor
) -> _LogitRule | None:
    """What turns the head's output into the model's logits; None if it is neither of the known."""
    with torch.no_grad():
        plain, logits = head(hidden[:, :1]).double(), logits.detach().double()
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(hidden.dtype, 2e-2)

    def fits(candidate: Tensor) -> bool:
        return bool((candidate - logits).norm() <= tolerance * logits.norm())

    if fits(plain):
        return _LogitRule()
    cap = model.config.get_text_config().to_dict().get("final_logit_softcapping")  # type: ignore
    if cap and fits(cap * torch.tanh(plain / cap)):
        return _LogitRule(softcap=cap)
    scale = float((plain * logits).sum() / (plain * plain).sum())
    return _LogitRule(scale=scale) if fits(plain * scale) else None
