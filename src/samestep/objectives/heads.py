"""What classifiers say of each sequence, in any layout of the micro-batch."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from samestep.lm_head import model_inputs
from samestep.targets import spans


def sequence_logits(model: Any, micro: Mapping[str, Any]) -> Tensor:
    """The class scores of each sequence [sequences, classes].

    Decoders of transformers score a sequence at its last token, which they look for by the pad id;
    here it is known from the layout, so packs work, and a pad token that is also the
    end-of-sequence token does no harm. Encoders are run as they are, a row a sequence.

    Args:
        model: A ``...ForSequenceClassification`` of transformers, plain or wrapped by PEFT.
        micro: A micro-batch of `samestep.data.collate.collate`, or ``input_ids`` alone.

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
    ends = [row * length + span.stop - 1 for row, span in spans(micro)]
    return torch.tensor(ends).to(ids.device, non_blocking=True)
