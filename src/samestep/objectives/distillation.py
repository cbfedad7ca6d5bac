"""Learning a teacher's distributions instead of single tokens."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from samestep.engine.counts import target_weights
from samestep.engine.targets import shifted_targets, target_positions
from samestep.engine.terms import Counter, Term, Unit
from samestep.losses.distillation import Divergence, divergences, top_k_divergences
from samestep.models.lm_head import HiddenStates, UpToHead
from samestep.objectives.units import field_at_targets


@dataclass(frozen=True)
class Distillation:
    """Divergence from a teacher at every target, and cross entropy beside it.

    Terms in the unit ``normalize``: "divergence", "nll", and the metric "accuracy". The sources of
    the divergences are those of `samestep.losses.distillation.divergences`.

    Attributes:
        teacher: A frozen language model with the student's vocabulary.
        kind: Which divergence.
        temperature: Of both distributions; "divergence" is multiplied by its square, so that its
            gradient keeps its size.
        nll_weight: Weight of "nll"; "divergence" has the rest of 1.
        normalize: As for `samestep.CausalLMLoss`.

    Examples:
        >>> import copy
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1))
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> loss = Distillation(copy.deepcopy(model), "reverse_kl")
        >>> terms = loss(model, {"input_ids": ids, "labels": ids})
        >>> round(terms["divergence"].total.item(), 4)  # the student is the teacher still
        0.0
    """

    teacher: nn.Module = field(repr=False)
    kind: Divergence = "forward_kl"
    _: KW_ONLY
    temperature: float = 1.0
    nll_weight: float = 0.0
    normalize: Unit = "token"
    up_to_head: UpToHead = field(default_factory=UpToHead, repr=False, compare=False)
    counters: ClassVar[Mapping[str, Counter]] = {}

    def __post_init__(self) -> None:
        self.teacher.eval().requires_grad_(False)

    def __call__(self, model: nn.Module, micro_batch: Mapping[str, Any]) -> dict[str, Term]:
        """Sums over the targets of one micro-batch."""
        positions = target_positions(micro_batch)
        student = self.up_to_head(model, micro_batch, positions=positions)
        with torch.no_grad():
            teacher = self.up_to_head(self.teacher, micro_batch, positions=positions)
        losses = divergences(
            student.states.flatten(0, 1).index_select(0, positions),
            teacher.states.flatten(0, 1).index_select(0, positions),
            student_logits=student.logits,
            teacher_logits=teacher.logits,
            kind=self.kind,
            temperature=self.temperature,
            vocabulary=student.vocabulary,
        )
        return _terms(
            student,
            micro_batch,
            losses=losses,
            normalize=self.normalize,
            divergence_weight=(1 - self.nll_weight) * self.temperature**2,
            nll_weight=self.nll_weight,
        )


@dataclass(frozen=True)
class TopKDistillation:
    """Divergence from precomputed teacher top-k log-probabilities at every target.

    Terms as of `Distillation`. The fields of a micro-batch are ``top_ids`` and ``top_logps``
    [rows, length, k], at the place of the token that they are predictions of.

    Attributes:
        kind: Which divergence.
        nll_weight: Weight of "nll"; "divergence" has the rest of 1.
        normalize: As for `samestep.CausalLMLoss`.
    """

    kind: Divergence = "forward_kl"
    nll_weight: float = 0.0
    _: KW_ONLY
    normalize: Unit = "token"
    up_to_head: UpToHead = field(default_factory=UpToHead, repr=False, compare=False)
    counters: ClassVar[Mapping[str, Counter]] = {}

    def __call__(self, model: nn.Module, micro_batch: Mapping[str, Any]) -> dict[str, Term]:
        """Sums over the targets of one micro-batch."""
        positions = target_positions(micro_batch)
        student = self.up_to_head(model, micro_batch, positions=positions)
        losses = top_k_divergences(
            student.states.flatten(0, 1).index_select(0, positions),
            top_ids=field_at_targets(micro_batch, "top_ids").long(),
            top_logps=field_at_targets(micro_batch, "top_logps"),
            student_logits=student.logits,
            kind=self.kind,
            vocabulary=student.vocabulary,
        )
        return _terms(
            student,
            micro_batch,
            losses=losses,
            normalize=self.normalize,
            divergence_weight=1 - self.nll_weight,
            nll_weight=self.nll_weight,
        )


def _terms(
    student: HiddenStates,
    micro_batch: Mapping[str, Any],
    *,
    losses: Tensor,
    normalize: Unit,
    divergence_weight: float,
    nll_weight: float,
) -> dict[str, Term]:
    """The sum of the divergences ``losses`` [targets], and of cross entropy beside it."""
    weights, positions = target_weights(micro_batch, normalize), target_positions(micro_batch)
    sums = student.cross_entropy(
        shifted_targets(micro_batch), target_weights=weights, positions=positions
    )
    divergence = (weights.flatten()[positions].to(losses) * losses).sum()
    return {
        "divergence": Term(divergence, normalize, divergence_weight),
        "nll": Term(sums.loss, normalize, nll_weight),
        "accuracy": Term(sums.correct, normalize, weight=0.0),
    }
