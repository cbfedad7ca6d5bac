"""The moving average of the weights that train: moved once a step, evaluated, and exported."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


class WeightAverage:
    """An exponential moving average, which starts at the weights as they are.

    Args:
        model: Its weights that require gradients are averaged, whole or in shards.
        decay: The share of the average that stays at a step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._weights = {name: w for name, w in model.named_parameters() if w.requires_grad}
        self._model, self._decay = model, decay
        self.tensors: dict[str, Tensor] = {
            name: weight.detach().clone().to(torch.promote_types(weight.dtype, torch.float32))
            for name, weight in self._weights.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights, after a step that has changed them."""
        for name, weight in self._weights.items():
            average = self.tensors[name]
            average.mul_(self._decay).add_(weight.to(average.dtype), alpha=1 - self._decay)

    @torch.no_grad()
    def put_in_place(self) -> None:
        """Give the model the average for its weights, for good."""
        _rest(self._model)
        for name, weight in self._weights.items():
            weight.copy_(self.tensors[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model the average for its weights inside the block."""
        _rest(self._model)
        before = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self.put_in_place()
        try:
            yield
        finally:
            _rest(self._model)
            with torch.no_grad():
                for name, weight in self._weights.items():
                    weight.copy_(before[name])


def _rest(model: nn.Module) -> None:
    """Let FSDP2 drop the whole weights that a forward has left, which were made of the former."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
