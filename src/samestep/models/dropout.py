"""Dropout whose random numbers belong to the example, not to the micro-batch.

PyTorch's dropout draws from one stream in the order of computation, so a different split gives
different masks. Here the mask of a sequence is a function of (seed, step, example, layer): the
step stays a function of the effective batch, a resumed run needs no generator state, and gradient
checkpointing draws the same mask again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from samestep.engine.targets import sequence_spans
from samestep.errors import ConfigError


class ExampleDropout(nn.Module):
    """Stands in for one ``nn.Dropout``; `key_dropout` tells it each micro-batch's sequences."""

    def __init__(self, p: float, layer: int) -> None:
        super().__init__()
        self.p = p
        self.layer = layer
        self.shape: tuple[int, ...] = ()
        self.sequences: list[tuple[tuple[int, ...], int, slice]] = []

    def forward(self, states: Tensor) -> Tensor:
        """Drop elements of states [rows, length, ...] or [sequences, width]; none in eval mode."""
        if not self.training:
            return states
        if states.dim() == 2 and len(states) == len(self.sequences):
            return self._drop(states, [(key, at) for at, (key, _, _) in enumerate(self.sequences)])
        if states.shape[:2] != self.shape:
            raise ConfigError(
                f"dropout saw {tuple(states.shape)} in a micro-batch of {self.shape} tokens: it "
                "cannot tell the examples apart, so the step would depend on the split. Set this "
                "model's dropout to 0"
            )
        return self._drop(states, [(key, (row, span)) for key, row, span in self.sequences])

    def _drop(self, states: Tensor, places: Sequence[tuple[tuple[int, ...], Any]]) -> Tensor:
        keep = torch.zeros_like(states)
        for key, place in places:
            seed = np.random.SeedSequence([*key, self.layer]).generate_state(1, np.uint64)[0]
            generator = torch.Generator(states.device).manual_seed(int(seed >> np.uint64(1)))
            keep[place] = keep[place].bernoulli_(1 - self.p, generator=generator)
        return states * keep / (1 - self.p)


def replace_dropout(model: nn.Module) -> int:
    """Put an `ExampleDropout` in the place of every ``nn.Dropout`` with p > 0.

    Args:
        model: Changed in place.

    Returns:
        How many were replaced.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Dropout and child.p > 0
    ]
    for layer, (parent, name, child) in enumerate(found):
        setattr(parent, name, ExampleDropout(child.p, layer).train(child.training))
    return len(found)


def key_dropout(model: nn.Module, micro: Mapping[str, Any], *, seed: int, step: int) -> None:
    """Tell every `ExampleDropout` which sequences the next forward holds.

    The keys stay until the next call, so that the backward may run the forward again.

    Args:
        model: A model after `replace_dropout`.
        micro: A micro-batch of `samestep.data.collate.collate_examples`.
        seed: The run's seed.
        step: The step's number.
    """
    layers = [module for module in model.modules() if isinstance(module, ExampleDropout)]
    if not layers:
        return
    examples = micro["example_ids"].tolist()
    sequences: list[tuple[tuple[int, ...], int, slice]] = [
        ((seed, step, example), row, span)
        for example, (row, span) in zip(examples, sequence_spans(micro), strict=True)
    ]
    for layer in layers:
        layer.shape = tuple(micro["input_ids"].shape)
        layer.sequences = sequences
