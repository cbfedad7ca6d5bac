"""Activations that wait for the backward in the CPU's memory."""

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

LEAST = 2**16
"""Bytes below which a tensor stays: the way there would take longer than it is worth."""


class Offload(saved_tensors_hooks):
    """Within the block, what autograd saves for the backward is kept in the CPU's memory.

    The weights stay where they are. Copies are pinned and made beside the computation on CUDA, as
    `torch.autograd.graph.save_on_cpu` makes them. The numbers are the same, so the step is.

    Args:
        model: Its weights, and views of them, are not moved.
    """

    def __init__(self, model: nn.Module) -> None:
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

        def pack(tensor: Tensor) -> tuple[Tensor, bool]:
            small = tensor.numel() * tensor.element_size() < LEAST
            if small or tensor.untyped_storage().data_ptr() in weights:
                return tensor, False
            pinned = tensor.device.type == "cuda"
            copy = tensor.new_empty(tensor.shape, device="cpu", pin_memory=pinned)
            copy.copy_(tensor, non_blocking=pinned)
            return copy, True

        def unpack(packed: tuple[Tensor, bool]) -> Tensor:
            tensor, moved = packed
            return (
                tensor.to(next(model.parameters()).device, non_blocking=True) if moved else tensor
            )

        super().__init__(pack, unpack)
