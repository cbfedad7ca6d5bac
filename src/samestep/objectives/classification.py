"""What classifiers say of each sequence, in any layout of the micro-batch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from samestep.engine.targets import IGNORE, sequence_ids, sequence_spans
from samestep.engine.terms import Counter, Term
from samestep.losses.per_example import class_losses, is_correct, squared_errors
from samestep.losses.preference import reward_loss
from samestep.models.lm_head import model_inputs
from samestep.objectives.preference import pair_weights


def sequence_logits(model: Any, micro: Mapping[str, Any]) -> Tensor:
    """The class scores of each sequence [sequences, classes].

    Decoders of transformers score a sequence at its last token, which they look for by the pad id;
    here it is known from the layout, so packs work, and a pad token that is also the
    end-of-sequence token does no harm. Encoders are run as they are, a row a sequence.

    Args:
        model: A ``...ForSequenceClassification`` of transformers, plain or wrapped by PEFT.
        micro: A micro-batch of `samestep.data.collate.collate_examples`, or ``input_ids`` alone.

    Returns:
        Scores.
    """
    bare = without_wrapper(model)
    score = dict(bare.named_children()).get("score")
    if score is None:
        logits: Tensor = model(**model_inputs(micro)).logits
        return logits
    hidden = backbone_states(bare, micro)
    scores: Tensor = score(hidden.flatten(0, 1)[last_positions(micro)])
    return scores


def backbone_states(bare: Any, micro: Mapping[str, Any]) -> Tensor:
    """The last hidden states of a model without its head [rows, length, width]."""
    prefix: str = bare.base_model_prefix
    # AutoModel gives the backbone itself, which has no child of its own prefix.
    backbone = dict(bare.named_children()).get(prefix, bare)
    states: Tensor = backbone(**model_inputs(micro)).last_hidden_state
    return states


def without_wrapper(model: nn.Module) -> Any:
    """The model of transformers inside a PEFT model (its adapters stay active)."""
    inner = dict(model.named_children()).get("base_model")
    return model if inner is None else inner.model


def last_positions(micro: Mapping[str, Any]) -> Tensor:
    """Where each sequence ends, in the flattened rows [sequences]."""
    ids: Tensor = micro["input_ids"]
    length = ids.shape[1]
    ends = [row * length + span.stop - 1 for row, span in sequence_spans(micro)]
    return torch.tensor(ends).to(ids.device, non_blocking=True)


@dataclass(frozen=True)
class QuestionAnswering:
    """Cross entropy of the answer's two ends; fields: ``start``, ``end`` [sequences], int64.

    The softmax goes over the tokens of the sequence alone. (transformers lets it go over padding
    too, so that its loss changes with the length of the neighbours.) Terms in the unit "example":
    "cross_entropy", the mean of both ends', and the metric "exact" (both ends are right).
    """

    def __call__(self, model: nn.Module, micro: Mapping[str, Any]) -> dict[str, Term]:
        """Sums over the sequences of one micro-batch."""
        ends = end_logits(model, micro)
        ends = ends if ends.dtype == torch.float64 else ends.float()
        wanted = torch.stack([micro["fields"]["start"], micro["fields"]["end"]], dim=1)
        losses, exact = [], []
        for (row, span), places in zip(sequence_spans(micro), wanted, strict=True):
            scores = ends[row, span].t()
            found = scores.log_softmax(dim=1).gather(1, places[:, None])
            losses.append(-found.sum() / 2)
            exact.append((scores.argmax(dim=1) == places).all())
        weights = example_weights(micro).to(ends)
        right = (weights * torch.stack(exact)).sum()
        return {
            "cross_entropy": Term((weights * torch.stack(losses)).sum(), "example"),
            "exact": Term(right, "example", weight=0.0),
        }


def end_logits(model: nn.Module, micro: Mapping[str, Any]) -> Tensor:
    """The scores of each token as start and as end [rows, length, 2]."""
    outputs = model(**model_inputs(micro))
    return torch.stack([outputs.start_logits, outputs.end_logits], dim=-1)


def example_weights(micro: Mapping[str, Any]) -> Tensor:
    """The weight of each sequence [sequences], float64."""
    weights: Tensor | None = micro.get("example_weights")
    if weights is None:
        sequences, device = len(micro["example_ids"]), micro["input_ids"].device
        return torch.ones(sequences, dtype=torch.float64, device=device)
    return weights


EXAMPLE_COUNTERS: dict[str, Counter] = {
    "example": lambda micro: float(example_weights(micro).sum())
}
"""An example of weight w counts w times."""


@dataclass(frozen=True)
class Classification:
    """Cross entropy over the classes of sequences; fields: ``class`` [sequences], int64.

    Terms in the unit "example": "cross_entropy", and the metric "accuracy".

    Attributes:
        label_smoothing: Share of the target probability that is spread over the classes.
    """

    label_smoothing: float = 0.0

    def __call__(self, model: nn.Module, micro: Mapping[str, Any]) -> dict[str, Term]:
        """Sums over the sequences of one micro-batch."""
        logits, classes = sequence_logits(model, micro), micro["fields"]["class"]
        losses = class_losses(logits, classes, label_smoothing=self.label_smoothing)
        weights = example_weights(micro).to(losses)
        right = (weights * is_correct(logits, classes)).sum()
        return {
            "cross_entropy": Term((weights * losses).sum(), "example"),
            "accuracy": Term(right, "example", weight=0.0),
        }


@dataclass(frozen=True)
class Regression:
    """Squared error of one number a sequence; fields: ``value`` [sequences], float64.

    Terms in the unit "example": "squared_error", and the metric "absolute_error".
    """

    def __call__(self, model: nn.Module, micro: Mapping[str, Any]) -> dict[str, Term]:
        """Sums over the sequences of one micro-batch."""
        values, wanted = sequence_logits(model, micro), micro["fields"]["value"][:, None]
        losses = squared_errors(values, wanted)
        weights = example_weights(micro).to(losses)
        apart = (values.detach() - wanted.to(values)).abs().squeeze(1)
        return {
            "squared_error": Term((weights * losses).sum(), "example"),
            "absolute_error": Term((weights * apart).sum(), "example", weight=0.0),
        }


def token_weights(micro: Mapping[str, Any]) -> Tensor:
    """The weight of each labelled token [rows, length], float64; 0 where there is no class."""
    labelled: Tensor = micro["fields"]["classes"] != IGNORE
    return example_weights(micro)[sequence_ids(micro)] * labelled


TOKEN_COUNTERS: dict[str, Counter] = {
    "token": lambda micro: float(token_weights(micro).sum()),
}
"""Labelled tokens: nothing is shifted."""


@dataclass(frozen=True)
class TokenClassification:
    """Cross entropy over the classes of tokens; fields: ``classes`` [rows, length], int64.

    Terms in the unit "token" (labelled tokens): "cross_entropy", and the metric "accuracy".
    """

    def __call__(self, model: nn.Module, micro: Mapping[str, Any]) -> dict[str, Term]:
        """Sums over the labelled tokens of one micro-batch."""
        logits = model(**model_inputs(micro)).logits
        classes = micro["fields"]["classes"]
        losses = class_losses(logits, classes)
        weights = token_weights(micro).to(losses)
        right = (weights * is_correct(logits, classes)).sum()
        return {
            "cross_entropy": Term((weights * losses).sum(), "token"),
            "accuracy": Term(right, "token", weight=0.0),
        }


@dataclass(frozen=True)
class Reward:
    """Reward modelling over pairs; fields: optionally ``margin`` [pairs].

    Terms in the unit "pair": "bradley_terry", "centring" ((reward_w + reward_l)²), and the metrics
    "accuracy", "margin", "reward_chosen", "reward_rejected".

    Attributes:
        centring: Weight of "centring" (arXiv:2312.09244); 0 leaves it out.
    """

    centring: float = 0.0

    def __call__(self, model: nn.Module, micro: Mapping[str, Any]) -> dict[str, Term]:
        """Sums over the pairs of one micro-batch."""
        rewards = sequence_logits(model, micro).squeeze(1)
        rewards = rewards if rewards.dtype == torch.float64 else rewards.float()
        chosen, rejected = rewards[::2], rewards[1::2]
        weights = pair_weights(micro).to(rewards)
        margin = micro.get("fields", {}).get("margin")
        margin = None if margin is None else margin.to(rewards)
        losses = reward_loss(chosen, rejected, margin=margin)
        terms = {"bradley_terry": Term((weights * losses).sum(), "pair")}
        if self.centring:
            total = (weights * (chosen + rejected).square()).sum()
            terms["centring"] = Term(total, "pair", self.centring)
        metrics = {
            "accuracy": (chosen > rejected).to(rewards),
            "margin": chosen - rejected,
            "reward_chosen": chosen,
            "reward_rejected": rejected,
        }
        for name, values in metrics.items():
            terms[name] = Term((weights * values.detach()).sum(), "pair", weight=0.0)
        return terms
