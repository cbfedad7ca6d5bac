"""The causal language model loss: next-token cross entropy through any transformers model."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from samestep.engine.counts import target_weights
from samestep.engine.targets import shifted_targets, target_positions
from samestep.engine.terms import Constant, Term, Unit
from samestep.errors import ConfigError
from samestep.losses.linear_cross_entropy import CrossEntropySums
from samestep.models.lm_head import UpToHead


class CausalLMLoss:
    """Next-token cross entropy as terms, without ever holding the whole logits.

    A callable ``(model, micro) -> {name: Term}`` for `samestep.step` and `samestep.evaluate`.
    The terms: "nll" (what is optimised; with smoothing or z-loss it is "regularised_nll", and
    "nll" a metric beside it) and "accuracy" (a metric: the most likely token is the target).

    The model runs once, with its head on one position only (see
    `samestep.models.lm_head.UpToHead`); the head is then applied to the targets alone, in chunks.

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
        self._up_to_head = UpToHead()

    def __call__(self, model: nn.Module, micro: Mapping[str, Any]) -> dict[str, Term]:
        """Sums over one micro-batch.

        Args:
            model: A causal language model of transformers, plain or wrapped by PEFT.
            micro: ``input_ids`` and ``labels`` [rows, length], and what else the model takes;
                see `samestep.engine.targets.shifted_targets` for how packs and padding are told.

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
        positions = target_positions(micro)
        return self._up_to_head(model, micro, at=positions).cross_entropy(
            shifted_targets(micro),
            target_weights=target_weights(micro, self.normalize),
            positions=positions,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
        )
