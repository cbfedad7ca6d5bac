"""Where the activations of a forward are until its backward: kept, recomputed, or offloaded.

None of these changes a number: what is recomputed or moved has the same bits.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import samestep.kernels.long_attention  # noqa: F401 (defines the operator named below)
from samestep.errors import ConfigError

Checkpointing = Literal["none", "selective", "full"]
"""What `checkpoint_activations` keeps."""

_ATEN = torch.ops.aten
_ATTENTION_KERNELS = frozenset(
    {
        _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
        _ATEN._scaled_dot_product_flash_attention.default,
        _ATEN._scaled_dot_product_efficient_attention.default,
        _ATEN._scaled_dot_product_cudnn_attention.default,
        torch.ops.samestep.causal_attention.default,
    }
)
_VARLEN_KERNELS = (
    ("aten", "_efficient_attention_forward"),
    ("aten", "_flash_attention_forward"),
    ("torch_attn", "_varlen_attn"),
)
"""Kernels of attention over packs, by name: not every version of PyTorch has all of them."""

_MIN_SAVED_INNER_SIZE = 128
"""Inner size of a matrix product below which recomputing its result is cheaper than keeping it: the
result of a LoRA adapter is as large as its layer's, for a hundredth of the work."""

_MIN_OFFLOAD_BYTES = 2**16
"""Bytes below which a tensor is not offloaded: the copy would cost more than it saves."""


def checkpoint_activations(model: Any, mode: Checkpointing) -> None:
    """Choose what each layer keeps for its backward; the rest is recomputed there.

    Args:
        model: A transformers model; changed in place.
        mode: "none" keeps everything that autograd saves. "selective" keeps what is expensive, the
            results of matrix products and attention, and recomputes norms, rotations, activation
            functions and adapters. "full" keeps each layer's input alone: the least memory, for one
            more forward.

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
    """What selective checkpointing does with the result of an operation."""
    expensive = (
        operation in _ATTENTION_KERNELS
        or (operation.namespace, str(operation).split(".")[1]) in _VARLEN_KERNELS
        or _inner_size(operation, arguments) >= _MIN_SAVED_INNER_SIZE
    )
    return CheckpointPolicy.MUST_SAVE if expensive else CheckpointPolicy.PREFER_RECOMPUTE


def _inner_size(operation: Any, arguments: Sequence[Any]) -> int:
    """The size that a matrix product sums over; 0 for other operations."""
    if operation is _ATEN.addmm.default:
        return int(arguments[1].shape[-1])
    if operation is _ATEN.mm.default or operation.namespace == "mkldnn":
        return int(arguments[0].shape[-1])
    return 0


class ActivationOffload(saved_tensors_hooks):
    """Context in which tensors that autograd saves for the backward are moved to CPU memory.

    Weights are not moved. On CUDA, copies are pinned and overlap with the computation, as those of
    `torch.autograd.graph.save_on_cpu`.

    Args:
        model: Its weights, and views of them, are not moved.

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> with ActivationOffload(model):
        ...     loss = model(torch.ones(1, 2)).square().sum()
        >>> loss.backward()
        >>> model.weight.grad.shape
        torch.Size([1, 2])
    """

    def __init__(self, model: nn.Module) -> None:
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

        def pack(tensor: Tensor) -> tuple[Tensor, bool]:
            small = tensor.numel() * tensor.element_size() < _MIN_OFFLOAD_BYTES
            if small or tensor.untyped_storage().data_ptr() in weights:
                return tensor, False
            pinned = tensor.device.type == "cuda"
            copy = tensor.new_empty(tensor.shape, device="cpu", pin_memory=pinned)
            copy.copy_(tensor, non_blocking=pinned)
            return copy, True

        def unpack(packed: tuple[Tensor, bool]) -> Tensor:
            tensor, moved = packed
            if not moved:
                return tensor
            return tensor.to(next(model.parameters()).device, non_blocking=True)

        super().__init__(pack, unpack)
