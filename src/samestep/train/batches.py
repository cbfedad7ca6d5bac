"""From a step's records to this rank's micro-batches."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from samestep.data.batching import pack_micro_batches, padding_share, shard_by_cost
from samestep.data.collate import Padding, to_device
from samestep.data.records import Records
from samestep.engine.collectives import rank, world_size
from samestep.engine.parallel import Idle
from samestep.train.budget import DEFAULT
from samestep.train.config import TrainConfig


class MicroBatches:
    """Cuts records of a data set into micro-batches, under a budget that can be lowered.

    Args:
        records: The data set.
        config: ``micro_batch``, ``micro_tokens``, ``seed``, and how it collates.
        padding: The layout that the model takes.
        pad_id: What to fill padding with.
        device: Where the tensors go.
    """

    def __init__(
        self,
        records: Records,
        config: TrainConfig,
        *,
        padding: Padding,
        pad_id: int,
        device: torch.device,
    ) -> None:
        self._records = records
        self._config = config
        self._padding = padding
        self._pad_id = pad_id
        self._device = device
        tokens = DEFAULT if config.micro_tokens == "auto" else config.micro_tokens
        self._by_number = config.micro_batch is not None
        self._budget = config.micro_batch or tokens

    def of_this_rank(self, indices: Sequence[int], step: int) -> Iterator[dict[str, Any] | Idle]:
        """This rank's part of the records: over all ranks each is there exactly once.

        Args:
            indices: Of records.
            step: Its number: what is random about a record depends on it.

        Yields:
            Micro-batches; one that is `Idle` on a rank that gets no record.
        """
        hand = self.hand(indices)
        yield from self.of(hand, step)
        if not hand:
            shortest = min(indices, key=lambda index: self._records.lengths[index])
            yield Idle(self._collate([shortest], step))

    def hand(self, indices: Sequence[int]) -> list[int]:
        """The records that this rank gets."""
        lengths = [self._records.lengths[index] for index in indices]
        return [
            indices[position] for position in shard_by_cost(lengths, ranks=world_size())[rank()]
        ]

    def told(self, indices: Sequence[int]) -> str:
        """How well the cut of these records fills its micro-batches, for the log."""
        lengths = [self._records.lengths[index] for index in indices]
        cut = self._cut(indices)
        told = f"{len(cut)} micro-batches"
        if not self._by_number:
            share = sum(lengths) / (len(cut) * self._budget)
            told += f", {min(1.0, share):.0%} of their {self._budget:,} tokens filled"
        if self._padding != "none":
            told += f"; {padding_share(lengths, cut):.0%} of what is computed is padding"
        return told

    def of(self, indices: Sequence[int], step: int) -> Iterator[dict[str, Any]]:
        """The micro-batches of the records, all of them on this rank."""
        for positions in self._cut(indices):
            yield self._collate([indices[position] for position in positions], step)

    def _cut(self, indices: Sequence[int]) -> list[list[int]]:
        return pack_micro_batches(
            [self._records.lengths[index] for index in indices],
            micro_batch=self._budget if self._by_number else None,
            micro_tokens=None if self._by_number else self._budget,
            padded=self._padding != "none",
        )

    def halve(self, indices: Sequence[int]) -> str:
        """Halve the budget from here on, so that these records are cut finer; say what it is."""
        lengths = [self._records.lengths[index] for index in indices]
        most = len(lengths) if self._by_number else sum(lengths)
        self._budget = max(1, min(self._budget, most) // 2)
        return f"{self._budget} {'records' if self._by_number else 'tokens'}"

    def _collate(self, indices: Sequence[int], step: int) -> dict[str, Any]:
        micro = self._config.collate(
            self._records,
            indices,
            padding=self._padding,
            pad_id=self._pad_id,
            key=(self._config.seed, step),
        )
        return to_device(micro, self._device)
