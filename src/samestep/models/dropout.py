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
    """Replaces an ``nn.Dropout``; `key_dropout` sets the sequences of each micro-batch.

    Args:
        p: Probability that an element is dropped.
        layer: The number of this layer in its model.

    Attributes:
        shape: Rows and length of the micro-batch.
        sequences: For each sequence its key (seed, step, example), its row, and its positions
            there.
    """

    def __init__(self, p: float, layer: int) -> None:
        super().__init__()
        self.p = p
        self.layer = layer
        self.shape: tuple[int, ...] = ()
        self.sequences: list[tuple[tuple[int, ...], int, slice]] = []

    def forward(self, states: Tensor) -> Tensor:
        """Drop elements; none in eval mode.

        Args:
            states: [rows, length, ...], or [sequences, width].

        Returns:
            The states, those that are kept divided by 1 - p.

        Raises:
            ConfigError: The states do not show which example they belong to.
        """
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
        mask = torch.zeros_like(states)
        for key, place in places:
            seed = np.random.SeedSequence([*key, self.layer]).generate_state(1, np.uint64)[0]
            generator = torch.Generator(states.device).manual_seed(int(seed >> np.uint64(1)))
            mask[place] = mask[place].bernoulli_(1 - self.p, generator=generator)
        return states * mask / (1 - self.p)


def replace_dropout(model: nn.Module) -> int:
    """Put an `ExampleDropout` in the place of every ``nn.Dropout`` with p > 0.

    Args:
        model: Changed in place.

    Returns:
        How many were replaced.

    Examples:
        >>> replace_dropout(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1), nn.Dropout(0.0)))
        1
    """
    dropouts = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Dropout and child.p > 0
    ]
    for layer, (parent, name, child) in enumerate(dropouts):
        setattr(parent, name, ExampleDropout(child.p, layer).train(child.training))
    return len(dropouts)


def key_dropout(model: nn.Module, micro_batch: Mapping[str, Any], *, seed: int, step: int) -> None:
    """Set the sequences of the next forward in every `ExampleDropout`.

    The keys stay until the next call, so that the backward may run the forward again.

    Args:
        model: A model after `replace_dropout`.
        micro_batch: A micro-batch of `samestep.data.collate.collate_examples`.
        seed: The run's seed.
        step: The step's number.

    Examples:
        >>> model = nn.Sequential(nn.Dropout(0.5))
        >>> replace_dropout(model)
        1
        >>> micro_batch = {"input_ids": torch.ones(1, 8).long(), "example_ids": torch.tensor([3])}
        >>> key_dropout(model, micro_batch, seed=0, step=1)
        >>> states = torch.ones(1, 8, 4)
        >>> torch.equal(model(states), model(states))  # the same example in the same step
        True
    """
    layers = [module for module in model.modules() if isinstance(module, ExampleDropout)]
    if not layers:
        return
    examples = micro_batch["example_ids"].tolist()
    sequences: list[tuple[tuple[int, ...], int, slice]] = [
        ((seed, step, example), row, span)
        for example, (row, span) in zip(examples, sequence_spans(micro_batch), strict=True)
    ]
    for layer in layers:
        layer.shape = tuple(micro_batch["input_ids"].shape)
        layer.sequences = sequences
