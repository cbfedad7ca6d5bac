"""From a step's records to its micro-batches."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from samestep.data.collate import Padding, to_device
from samestep.data.plan import cut_step
from samestep.data.records import Records
from samestep.train.config import TrainConfig

AUTO_MICRO_TOKENS = 2048
"""Tokens a micro-batch under ``micro_tokens: auto``: large enough to keep the matrix products
busy, small enough for the activations of a billion-parameter model to fit beside its weights."""

MakeMicroBatches = Callable[[Sequence[int], int], Iterator[dict[str, Any]]]
"""Maps indices of records, and the number of the step, to the micro-batches that hold them."""


def micro_batch_maker(
    records: Records,
    config: TrainConfig,
    *,
    padding: Padding,
    pad_id: int,
    device: torch.device,
) -> MakeMicroBatches:
    """How records become micro-batches in this run.

    Args:
        records: The data set.
        config: ``micro_batch``, ``micro_tokens``, ``seed``, and how it collates.
        padding: The layout that the model takes.
        pad_id: What to fill padding with.
        device: Where the tensors go.

    Returns:
        A function from indices of records and the step to their micro-batches.
    """
    budget = AUTO_MICRO_TOKENS if config.micro_tokens == "auto" else config.micro_tokens
    lengths = records.lengths

    def make(indices: Sequence[int], step: int) -> Iterator[dict[str, Any]]:
        cut = cut_step(
            [lengths[index] for index in indices],
            micro_batch=config.micro_batch,
            micro_tokens=None if config.micro_batch else budget,
            padded=padding != "none",
        )
        for positions in cut:
            chosen = [indices[position] for position in positions]
            key = (config.seed, step)
            micro = config.collate(records, chosen, padding=padding, pad_id=pad_id, key=key)
            yield to_device(micro, device)

    return make
