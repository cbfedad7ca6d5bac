"""Language modelling through any model of transformers: causal, masked, encoder-decoder."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from samestep.engine.counts import target_weights
from samestep.engine.targets import IGNORE, class_positions, shifted_targets, target_positions
from samestep.engine.terms import Constant, Counter, Term, Unit
from samestep.errors import ConfigError
from samestep.losses.preference import dft_losses
from samestep.models.lm_head import UpToHead
from samestep.objectives.units import (
    LABELLED_TOKEN_COUNTERS,
    example_weights,
    labelled_token_weights,
    weights_at_targets,
)


class CausalLMLoss:
    """Next-token cross entropy as terms, without ever holding the whole logits.

    A callable ``(model, micro_batch) -> {name: Term}`` for `samestep.step` and `samestep.evaluate`.
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

    Examples:
        >>> from samestep import CausalLMLoss
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1))
        >>> micro_batch = {
        ...     "input_ids": torch.tensor([[1, 2, 3, 4]]),
        ...     "labels": torch.tensor([[-100, -100, 3, 4]]),
        ... }
        >>> terms = CausalLMLoss()(model, micro_batch)
        >>> {name: (term.unit, term.weight) for name, term in terms.items()}
        {'nll': ('token', 1.0), 'accuracy': ('token', 0.0)}

        The sum is over two targets; the step divides it by the targets of the effective batch:

        >>> loss = model(**micro_batch).loss  # transformers divides by this micro-batch's own
        >>> bool(torch.isclose(terms["nll"].total, 2 * loss, rtol=1e-4))
        True
    """

    counters: ClassVar[Mapping[str, Counter]] = {}

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

    def __call__(self, model: nn.Module, micro_batch: Mapping[str, Any]) -> dict[str, Term]:
        """Sums over one micro-batch.

        Args:
            model: A causal language model of transformers, plain or wrapped by PEFT.
            micro_batch: ``input_ids`` and ``labels`` [rows, length], and what else the model takes;
                see `samestep.engine.targets.shifted_targets` for packs and padding.

        Returns:
            The terms, in the unit ``normalize``.
        """
        positions = target_positions(micro_batch)
        sums = self._up_to_head(model, micro_batch, positions=positions).cross_entropy(
            shifted_targets(micro_batch),
            target_weights=target_weights(micro_batch, self.normalize),
            positions=positions,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
        )
        accuracy = Term(sums.correct, self.normalize, weight=0.0)
        if self.label_smoothing or self.z_loss:
            return {
                "regularised_nll": Term(sums.loss, self.normalize),
                "nll": Term(sums.nll, self.normalize, weight=0.0),
                "accuracy": accuracy,
            }
        return {"nll": Term(sums.loss, self.normalize), "accuracy": accuracy}


@dataclass(frozen=True)
class DFT:
    """Dynamic fine-tuning: each target's cross entropy times its own probability, detached.

    Terms in the unit ``normalize``: "dft", and the metrics "nll" and "accuracy". The source is
    that of `samestep.losses.preference.dft_losses`.

    Attributes:
        normalize: As for `samestep.CausalLMLoss`.
    """

    normalize: Unit = "token"
    up_to_head: UpToHead = field(default_factory=UpToHead, repr=False, compare=False)
    counters: ClassVar[Mapping[str, Counter]] = {}

    def __call__(self, model: nn.Module, micro_batch: Mapping[str, Any]) -> dict[str, Term]:
        """Sums over the targets of one micro-batch."""
        likelihoods = self.up_to_head.target_likelihoods(model, micro_batch)
        nll = likelihoods.nll
        weights = weights_at_targets(micro_batch, self.normalize).to(nll)
        return {
            "dft": Term((weights * dft_losses(nll)).sum(), self.normalize),
            "nll": Term((weights * nll.detach()).sum(), self.normalize, weight=0.0),
            "accuracy": Term((weights * likelihoods.correct).sum(), self.normalize, weight=0.0),
        }


@dataclass(frozen=True)
class MaskedLM:
    """Cross entropy of masked tokens (arXiv:1810.04805).

    The field ``classes`` [rows, length] holds the tokens that were masked, ``IGNORE`` elsewhere.
    Terms in the unit "token" (masked tokens): "nll", and the metric "accuracy".
    """

    up_to_head: UpToHead = field(default_factory=UpToHead, repr=False, compare=False)
    counters: ClassVar[Mapping[str, Counter]] = LABELLED_TOKEN_COUNTERS

    def __call__(self, model: nn.Module, micro_batch: Mapping[str, Any]) -> dict[str, Term]:
        """Sums over the masked tokens of one micro-batch."""
        sums = self.up_to_head(model, micro_batch).cross_entropy(
            micro_batch["fields"]["classes"],
            target_weights=labelled_token_weights(micro_batch),
            positions=class_positions(micro_batch, "classes"),
        )
        return {"nll": Term(sums.loss), "accuracy": Term(sums.correct, weight=0.0)}


def _decoder_token_weights(micro_batch: Mapping[str, Any]) -> Tensor:
    """The weight of each target of a decoder [sequences, length], float64."""
    targets: Tensor = micro_batch["fields"]["targets"] != IGNORE
    return example_weights(micro_batch)[:, None] * targets


SEQ2SEQ_COUNTERS: dict[str, Counter] = {
    "token": lambda micro_batch: float(_decoder_token_weights(micro_batch).sum()),
    "example": lambda micro_batch: float(example_weights(micro_batch).sum()),
}
"""Of `Seq2Seq`: targets of the decoder, and sequences."""


@dataclass(frozen=True)
class Seq2Seq:
    """Cross entropy of a decoder's tokens; fields: ``targets`` [sequences, length], int64.

    Terms in the unit "token": "nll" (with smoothing "regularised_nll", and "nll" a metric), and
    the metric "accuracy".

    Attributes:
        label_smoothing: Share of the target probability that is spread over the vocabulary.
    """

    label_smoothing: float = 0.0
    up_to_head: UpToHead = field(default_factory=UpToHead, repr=False, compare=False)
    counters: ClassVar[Mapping[str, Counter]] = SEQ2SEQ_COUNTERS

    def __call__(self, model: Any, micro_batch: Mapping[str, Any]) -> dict[str, Term]:
        """Sums over the decoder's tokens of one micro-batch."""
        targets = micro_batch["fields"]["targets"]
        shifted = model.prepare_decoder_input_ids_from_labels(labels=targets)
        sums = self.up_to_head(model, micro_batch, decoder_input_ids=shifted).cross_entropy(
            targets,
            target_weights=_decoder_token_weights(micro_batch),
            positions=class_positions(micro_batch, "targets"),
            label_smoothing=self.label_smoothing,
        )
        accuracy = Term(sums.correct, weight=0.0)
        if self.label_smoothing:
            return {
                "regularised_nll": Term(sums.loss),
                "nll": Term(sums.nll, weight=0.0),
                "accuracy": accuracy,
            }
        return {"nll": Term(sums.loss), "accuracy": accuracy}
