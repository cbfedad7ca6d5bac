"""From a step's records to this rank's micro-batches, which shrink where memory runs out."""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from samestep.data.batching import pack_micro_batches, padding_share, shard_by_cost
from samestep.data.collate import to_device
from samestep.data.records import Records
from samestep.engine.collectives import rank, world_size
from samestep.engine.parallel import Idle, is_sharded
from samestep.errors import OutOfMemoryError, SequenceTooLargeError
from samestep.train.ahead import Ahead, Collator
from samestep.utils.memory import release_memory

DEFAULT_MICRO_TOKENS = 1024
"""Tokens a micro-batch where nothing was measured."""


class MicroBatches:
    """Cuts records of a data set into micro-batches, under a budget that can be lowered.

    Args:
        records: The data set.
        collate: Makes a micro-batch of some of them.
        micro_batch: Records a micro-batch; None: as many as ``micro_tokens`` allows.
        micro_tokens: Tokens a micro-batch, those of padding included.
        padded: Whether the collator pads its sequences to one length.
        device: Where the tensors go.
        whole_packs: Cut the records of all ranks first, and deal micro-batches to the ranks: then
            what is computed together does not depend on the ranks.

    Attributes:
        device: The same.
    """

    def __init__(
        self,
        records: Records,
        collate: Collator,
        *,
        micro_batch: int | None = None,
        micro_tokens: int = DEFAULT_MICRO_TOKENS,
        padded: bool,
        device: torch.device,
        whole_packs: bool = False,
    ) -> None:
        self._records = records
        self._names: Sequence[str] = ()
        self._whole_packs = whole_packs
        self._padded = padded
        self.device = device
        self._ahead = Ahead(collate, device)
        self._following: tuple[Sequence[int], int] | None = None
        self._by_number = micro_batch is not None
        self._budget = micro_tokens if micro_batch is None else micro_batch

    @property
    def budget(self) -> int:
        """Tokens of a micro-batch, or records where those are counted."""
        return self._budget

    @budget.setter
    def budget(self, budget: int) -> None:
        self._budget = budget

    def put(self, records: Records, names: Sequence[str]) -> None:
        """Cut other records from here on, under the same budget.

        Args:
            records: Those that a step generated.
            names: What messages call each.
        """
        self._records, self._names = records, names

    def name_of(self, index: int) -> str:
        """What messages call a record; empty where the rows of its sequences say it."""
        return self._names[index] if self._names else ""

    def with_budget(self, micro_tokens: int) -> "MicroBatches":
        """The same records, cut under another budget.

        Args:
            micro_tokens: Tokens a micro-batch.

        Returns:
            What cuts them so.
        """
        found = copy.copy(self)
        found._by_number, found._budget = False, micro_tokens
        return found

    def of_this_rank(self, indices: Sequence[int], step: int) -> Iterator[dict[str, Any] | Idle]:
        """This rank's part of the records: over all ranks each is there exactly once.

        Args:
            indices: Of records.
            step: Its number: what is random about a record depends on it.

        Yields:
            Micro-batches; one that is `Idle` on a rank that gets no record.
        """
        packs, counts = self._packs_to_run(indices)
        for pack in packs:
            micro_batch = self._make(pack, step)
            yield micro_batch if counts else Idle(micro_batch)

    @contextmanager
    def made_ahead(self) -> Iterator[None]:
        """A block in which `prepare` works in the background, where that leaves the CPU free."""
        if not leaves_cpu_free(self.device):
            yield
            return
        with self._ahead.running():
            yield

    def prepare(self, indices: Sequence[int], step: int) -> None:
        """Begin to make what `of_this_rank` will be asked for next, inside `made_ahead`.

        Args:
            indices: As for `of_this_rank`.
            step: As for `of_this_rank`.
        """
        self._following = indices, step
        packs, _ = self._packs_to_run(indices)
        self._ahead.begin([(self._records, tuple(pack), step) for pack in packs])

    def rank_indices(self, indices: Sequence[int]) -> list[int]:
        """The records that this rank gets.

        Args:
            indices: Of the records of all ranks.

        Returns:
            Those of this rank.
        """
        if self._whole_packs:
            return [index for pack in self._own_packs(indices) for index in pack]
        costs = self._lengths(indices)
        return [indices[position] for position in shard_by_cost(costs, ranks=world_size())[rank()]]

    def _own_packs(self, indices: Sequence[int]) -> list[list[int]]:
        """The records of each micro-batch of this rank."""
        if not self._whole_packs:
            own = self.rank_indices(indices)
            return [[own[at] for at in part] for part in self._cut(own)]
        packs = [[indices[at] for at in part] for part in self._cut(indices)]
        costs = [sum(self._lengths(pack)) for pack in packs]
        return [packs[at] for at in sorted(shard_by_cost(costs, ranks=world_size())[rank()])]

    def _packs_to_run(self, indices: Sequence[int]) -> tuple[list[list[int]], bool]:
        """What this rank runs, and whether it counts: a rank without a record runs one anyway."""
        own = self._own_packs(indices)
        if own:
            return own, True
        return [[min(indices, key=lambda index: self._records.lengths[index])]], False

    def count(self, indices: Sequence[int]) -> int:
        """How many micro-batches this rank makes of the records of all ranks; at least 1."""
        return len(self._own_packs(indices)) or 1

    def describe(self, indices: Sequence[int]) -> str:
        """How well records fill the micro-batches that they are cut into, for the log.

        Args:
            indices: Of the records.

        Returns:
            A line such as "3 micro-batches, 91% of their 448 tokens filled".
        """
        lengths, parts = self._lengths(indices), self._cut(indices)
        text = f"{len(parts)} micro-batches"
        if not self._by_number:
            share = sum(lengths) / (len(parts) * self._budget)
            text += f", {min(1.0, share):.0%} of their {self._budget:,} tokens filled"
        if self._padded:
            text += f"; {padding_share(lengths, parts):.0%} of what is computed is padding"
        return text

    def batches(self, indices: Sequence[int], step: int) -> Iterator[dict[str, Any]]:
        """The micro-batches of the records, all of them on this rank.

        Args:
            indices: Of the records.
            step: As for `of_this_rank`.

        Yields:
            Micro-batches on the device.
        """
        for part in self._cut(indices):
            yield self._make([indices[at] for at in part], step)

    def halve(self, indices: Sequence[int]) -> str:
        """Halve the budget from here on, so that these records are cut finer.

        Args:
            indices: Of the records.

        Returns:
            The new budget, in words.
        """
        lengths = self._lengths(indices)
        most = len(lengths) if self._by_number else sum(lengths)
        self._budget = max(1, min(self._budget, most) // 2)
        self._ahead.forget()  # what was begun is cut too coarsely
        if self._following is not None:
            self.prepare(*self._following)
        return f"{self._budget} {'records' if self._by_number else 'tokens'}"

    def _lengths(self, indices: Sequence[int]) -> list[int]:
        return [self._records.lengths[index] for index in indices]

    def _cut(self, indices: Sequence[int]) -> list[list[int]]:
        return pack_micro_batches(
            self._lengths(indices),
            micro_batch=self._budget if self._by_number else None,
            micro_tokens=None if self._by_number else self._budget,
            padded=self._padded,
        )

    def _make(self, pack: Sequence[int], step: int) -> dict[str, Any]:
        return to_device(self._ahead.make((self._records, tuple(pack), step)), self.device)


def leaves_cpu_free(device: torch.device) -> bool:
    """Whether steps on a device leave the CPU time to make the next micro-batches meanwhile."""
    return device.type != "cpu"


log = logging.getLogger("samestep")

Report = TypeVar("Report")


def retry_on_oom(
    model: Any,
    work: Callable[[], Report],
    *,
    micro_batches: MicroBatches,
    indices: Sequence[int],
    recompute_activations: Callable[[], bool],
) -> Report:
    """Repeat work with smaller micro-batches, or keeping less for the backward, until it fits.

    Args:
        model: The model that the work runs.
        work: Runs all micro-batches of the records.
        micro_batches: Cuts the records; its budget is lowered for good.
        indices: The records.
        recompute_activations: Lets the model keep less from here on; says whether it could.

    Returns:
        What the work returned.

    Raises:
        SequenceTooLargeError: A single sequence does not fit.
        OutOfMemoryError: Under FSDP2, where the other ranks cannot be told; or twice in clipping
            or in the update, which on several ranks the others cannot be told either.
    """
    failed_after_backward = False
    while True:
        try:
            return work()
        except SequenceTooLargeError as error:
            if is_sharded(model) or not recompute_activations():
                raise
            problem, change = str(error), "computing most of each layer anew in the backward"
        except OutOfMemoryError as error:
            problem = str(error)
            if error.after_backward and (failed_after_backward or world_size() > 1):
                raise OutOfMemoryError(
                    f"{problem}. Weights, gradients and the optimizer's state do not fit: continue "
                    "with --resume on a machine with more memory or on more ranks; lora_rank, or "
                    "an optimizer with less state, makes another, smaller run"
                ) from None
            failed_after_backward |= error.after_backward
            if is_sharded(model):
                raise OutOfMemoryError(
                    f"{problem}. Under fsdp2 the other ranks wait inside the model and cannot be "
                    "told: continue with --resume and a smaller --micro-tokens, which does not "
                    "change the step"
                ) from None
            change = f"in micro-batches of at most {micro_batches.halve(indices)}"
        log.warning("%s: the same again, %s", problem, change)
        release_memory()
