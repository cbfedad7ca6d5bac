"""From a step's examples to its micro-batches."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from samestep.data.collate import Padding, collate, to_device
from samestep.data.examples import Examples
from samestep.data.plan import cut_step
from samestep.train.config import TrainConfig

AUTO_MICRO_TOKENS = 2048
"""Tokens a micro-batch under ``micro_tokens: auto``: large enough to keep the matrix products
busy, small enough for the activations of a billion-parameter model to fit beside its weights."""

MakeMicroBatches = Callable[[Sequence[int]], Iterator[dict[str, Any]]]
"""Maps indices of examples to the micro-batches that hold them."""


def micro_batch_maker(
    examples: Examples,
    config: TrainConfig,
    *,
    padding: Padding,
    pad_id: int,
    device: torch.device,
) -> MakeMicroBatches:
    """How examples become micro-batches in this run.

    Args:
        examples: The data set.
        config: ``micro_batch`` and ``micro_tokens``.
        padding: The layout that the model takes.
        pad_id: What to fill padding with.
        device: Where the tensors go.

    Returns:
        A function from indices of examples to their micro-batches.
    """
    budget = AUTO_MICRO_TOKENS if config.micro_tokens == "auto" else config.micro_tokens
    lengths = examples.lengths

    def make(indices: Sequence[int]) -> Iterator[dict[str, Any]]:
        cut = cut_step(
            [lengths[index] for index in indices],
            micro_batch=config.micro_batch,
            micro_tokens=None if config.micro_batch else budget,
            padded=padding != "none",
        )
        for positions in cut:
            chosen = [examples[indices[position]] for position in positions]
            yield to_device(collate(chosen, padding=padding, pad_id=pad_id), device)

    return make
