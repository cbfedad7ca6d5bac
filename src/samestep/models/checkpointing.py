"""Activation checkpointing: which results of the forward are kept for the backward."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from samestep.errors import ConfigError

Checkpointing = Literal["none", "selective", "full"]

_ATEN = torch.ops.aten
ATTENTION = frozenset(
    {
        _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
        _ATEN._scaled_dot_product_flash_attention.default,
        _ATEN._scaled_dot_product_efficient_attention.default,
        _ATEN._scaled_dot_product_cudnn_attention.default,
        torch.ops.samestep.causal_attention.default,
    }
)
"""Kernels of attention."""

NARROW = 128
"""Inner size of a matrix product below which its result is sooner computed again than kept: that of
a LoRA adapter is as large as its layer's, for a hundredth of the work."""


def checkpoint_activations(model: Any, mode: Checkpointing) -> None:
    """Choose what each layer keeps for its backward; the rest is computed again there.

    What is computed again gives the same numbers, so no mode changes the step.

    Args:
        model: A transformers model; changed in place.
        mode: "none" keeps everything that autograd wants. "selective" keeps what is costly, the
            results of matrix products and attention, and computes norms, rotations, activation
            functions and adapters again. "full" keeps each layer's input alone: the least memory,
            for one more forward.

    Raises:
        ConfigError: The model has no layers that can be checkpointed.
    """
    if mode == "none":
        return
    if not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"gradient_checkpointing: {type(model).__name__} does not support it: use none"
        )
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    model.activation_checkpointing_enable(options)


def _policy(_: Any, operation: Any, *arguments: Any, **__: Any) -> CheckpointPolicy:
    if operation in ATTENTION or _inner_size(operation, arguments) >= NARROW:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _inner_size(operation: Any, arguments: Sequence[Any]) -> int:
    """The size that a matrix product sums over; 0 for other operations."""
    if operation is _ATEN.addmm.default:
        return int(arguments[1].shape[-1])
    if operation is _ATEN.mm.default or operation.namespace == "mkldnn":
        return int(arguments[0].shape[-1])
    return 0
