"""Can a model's sequences share a micro-batch without seeing each other? Asked of the model."""

from typing import Any, Literal

import torch
from torch import Tensor

from samestep.data.collate import Padding, collate, to_device
from samestep.data.examples import Example
from samestep.errors import ConfigError
from samestep.lm_head import model_inputs
from samestep.models import attention

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
LOW_PRECISION_TOLERANCE = 5e-2
"""Relative difference of logits above which a sequence has seen its neighbour."""


def choose_padding(model: Any, wanted: Literal["auto"] | Padding) -> Padding:
    """The layout of micro-batches for a model, and the model's attention set to serve it.

    Two short sequences are run together and each alone. Only a layout in which they agree is
    taken, so a model that leaks between sequences is never trained in that layout.

    Args:
        model: A transformers causal language model; its attention implementation is changed.
        wanted: The layout asked for; "auto" prefers none to right.

    Returns:
        The layout.

    Raises:
        ConfigError: The layout asked for, or every one, lets sequences see each other.
    """
    candidates: tuple[Padding, ...] = ("none", "right") if wanted == "auto" else (wanted,)
    reasons = []
    found = model.config._attn_implementation
    plain = "sdpa" if found == attention.NAME else found
    for padding in candidates:
        reason = _why_not(model, padding, plain)
        if reason is None:
            return padding
        reasons.append(f"padding {padding!r}: {reason}")
    raise ConfigError(
        f"{type(model).__name__} cannot hold several sequences in a micro-batch exactly: "
        + "; ".join(reasons)
        + (". Try padding 'auto'" if wanted != "auto" else ". Use micro_batch 1")
    )


@torch.no_grad()
def _why_not(model: Any, padding: Padding, plain: str) -> str | None:
    vocabulary = model.get_input_embeddings().num_embeddings
    sequences = [torch.tensor(ids) % vocabulary for ids in ([3, 1, 4], [1, 5, 9, 2, 6])]
    training = model.training
    model.eval()
    try:
        if model.config._attn_implementation != plain:
            model.set_attn_implementation(plain)
        alone = [model(input_ids=one[None].to(model.device)).logits[0] for one in sequences]
        if padding == "none":
            attention.register()
            model.set_attn_implementation(attention.NAME)
        together = _together(model, sequences, padding)
    except (ConfigError, TypeError, ValueError, RuntimeError) as error:
        return str(error).strip().split("\n")[0]
    finally:
        model.train(training)
    for one, joint in zip(alone, together, strict=True):
        difference = float((one - joint).norm() / one.norm())
        if not difference <= TOLERANCE.get(one.dtype, LOW_PRECISION_TOLERANCE):
            return f"logits change by {difference:.1e} beside a neighbour"
    return None


def _together(model: Any, sequences: list[Tensor], padding: Padding) -> list[Tensor]:
    """The logits of each sequence [length, vocabulary] when all run in one micro-batch."""
    micro = collate([Example(ids, ids) for ids in sequences], padding=padding)
    logits = model(**to_device(model_inputs(micro), model.device)).logits
    if padding == "none":
        return list(logits[0].split([len(ids) for ids in sequences]))
    mask = micro["attention_mask"].bool()
    return [row[kept] for row, kept in zip(logits, mask.to(logits.device), strict=True)]
