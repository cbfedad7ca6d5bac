"""Where the activations of a forward are until its backward: kept, recomputed, or offloaded.

None of these changes a number: what is recomputed or moved has the same bits.
"""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, Literal
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import samestep.kernels.long_attention  # noqa: F401 (defines the operator named below)
from samestep.errors import ConfigError
from samestep.models.copy_stream import CopyStream, Fetched

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


_BYTES_ON_THEIR_WAY = 2**28
"""Bytes that are copied beside the computation at a time, out in the forward, back ahead of the
backward: some layers' worth, and little beside a GPU's memory."""


@cache
def _copy_stream(device: torch.device) -> CopyStream | None:
    """The stream for copies of a device; None where copies are made in the place of computing."""
    return CopyStream(device, held=_BYTES_ON_THEIR_WAY) if device.type == "cuda" else None


class _Offloaded:
    """A tensor in the CPU's memory, until the backward asks for it."""

    def __init__(self, tensor: Tensor, *, number: int) -> None:
        self.number, self.nbytes = number, tensor.nbytes
        self._device, self._stream = tensor.device, _copy_stream(tensor.device)
        self._fetched: Fetched | None = None
        self._taken = False
        if self._stream is None:
            self._copy = tensor.detach().to("cpu", copy=True)
        else:
            self._copy = self._stream.send(tensor.detach())

    def fetch_ahead(self) -> bool:
        """Begin to bring it back, if it was not asked for yet; whether it is under way."""
        if self._stream is None or self._taken:
            return False
        self._fetched = self._fetched or self._stream.fetch(self._copy)
        return True

    def take(self) -> Tensor:
        """The tensor, on its own device again."""
        if self._stream is None:
            return self._copy.to(self._device)
        fetched = self._fetched or self._stream.fetch(self._copy)
        self._fetched, self._taken = None, True
        return self._stream.receive(fetched)


class ActivationOffload(saved_tensors_hooks):
    """Context in which tensors that autograd saves for the backward are moved to CPU memory.

    Weights are not moved, nor what is made of one alone: the bfloat16 copies that autocast keeps
    for the whole step, or the whole weight of a shard. On CUDA, copies are made in pinned memory on
    a stream of their own (`samestep.models.copy_stream`): the forward goes on while they leave, and
    what the backward asks for next comes back while it computes. A backward on another device than
    CUDA waits for each copy.

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
        weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
        offloaded: list[ReferenceType[_Offloaded]] = []
        self._devices: set[torch.device] = set()

        def pack(tensor: Tensor) -> Tensor | _Offloaded:
            small = tensor.nbytes < _MIN_OFFLOAD_BYTES
            if small or tensor.untyped_storage()._cdata in weights or _is_of_a_weight(tensor):
                return tensor.detach()  # with its graph it would hold itself
            self._devices.add(tensor.device)
            moved = _Offloaded(tensor, number=len(offloaded))
            offloaded.append(ref(moved))
            return moved

        def unpack(packed: Tensor | _Offloaded) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            tensor = packed.take()
            _fetch_ahead(offloaded, packed.number)
            return tensor

        super().__init__(pack, unpack)

    def __exit__(self, *error: object) -> None:
        """End the context: what has left is no longer held."""
        super().__exit__(*error)
        for device in self._devices:
            stream = _copy_stream(device)
            if stream is not None:
                stream.finish_sending()


def _fetch_ahead(saved: Sequence[ReferenceType[_Offloaded]], number: int) -> None:
    """Begin to bring back what a backward asks for next: what was saved last before a number."""
    room = _BYTES_ON_THEIR_WAY
    for at in reversed(range(number)):
        offloaded = saved[at]()
        if offloaded is None:  # the backward is done with it
            continue
        if offloaded.fetch_ahead():
            room -= offloaded.nbytes
        if room < 0:
            return


def _is_of_a_weight(tensor: Tensor) -> bool:
    """Whether a tensor has the elements of one weight and depends on nothing else.

    Such as a cast or a view of it: autograd's graph leads from it, without a fork, to the weight.
    """
    whole = tensor if tensor._base is None else tensor._base
    if isinstance(whole, nn.Parameter):
        return True
    node = tensor.grad_fn
    while node is not None:
        weight = getattr(node, "variable", None)
        if weight is not None:
            return isinstance(weight, nn.Parameter) and weight.numel() == tensor.numel()
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        node = parents[0] if len(parents) == 1 else None
    return False
