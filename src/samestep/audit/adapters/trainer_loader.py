"""A trainer's own loader: taken in order for most runs, or left to deal its rows."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer

from samestep.audit.adapters.loaders import named, one_pass, recognise
from samestep.audit.adapters.processes import rank_timeout, run_on_ranks
from samestep.audit.adapters.trainer_data import (
    AuditCollator,
    select_evaluation_rows,
    shard_as_loader,
    without_repeats,
)
from samestep.audit.subject import (
    DEFAULT_SETTINGS,
    Capability,
    Dealt,
    Evaluated,
    Observation,
    RunSettings,
    Split,
)


class DealsRows:
    """How a trainer's rows are dealt: to ranks, or by its own loader."""

    _train: Callable[..., Observation]
    _fresh_trainer: Callable[..., AbstractContextManager[tuple[Any, AuditCollator]]]
    _evaluate: Callable[..., dict[str, float]]
    _rows: Callable[[Sequence[int]], list[int]]
    missing: Callable[[], Mapping[Capability, str]]
    _rollouts: Any
    _even: bool
    rows_per_example: int
    _slowest: float

    def run_on_ranks(
        self, shares: Sequence[Split], settings: RunSettings = DEFAULT_SETTINGS
    ) -> list[Observation]:
        """One update on each rank; the trainer deals the micro-batches out in turn."""
        turns = zip(*shares, strict=True)
        rows = [row for turn in turns for micro_batch in turn for row in self._rows(micro_batch)]
        examples = len({*rows}) // self.rows_per_example
        rows = without_repeats(rows, shares, self.shard(examples, len(shares)))

        def work(rank: int) -> Observation:
            share = shares[rank]
            return self._train(share, settings, accumulation=len(share), all_rows=rows)

        return run_on_ranks(work, len(shares), seconds=rank_timeout(self._slowest))

    def evaluate_on_ranks(
        self,
        batch_size: int,
        settings: RunSettings = DEFAULT_SETTINGS,
        *,
        examples: Sequence[int],
        world: int,
    ) -> list[Evaluated]:
        """The trainer's own evaluation on each rank, of rows that its own loader deals."""

        def work(rank: int) -> Evaluated:
            with self._fresh_trainer((tuple(examples),), settings, accumulation=1) as (trainer, of):
                rows = self._rows(examples)
                trainer.eval_dataset = select_evaluation_rows(trainer.eval_dataset, rows)
                of.start(rows)
                numbers = self._evaluate(trainer, batch_size, seed=settings.seed)
                data = trainer.eval_dataset
                seen = named(recognise_in(data, of.seen), range(len(rows))) or ()
                scored = [row // self.rows_per_example for batch in seen for row in batch]
                return Evaluated(numbers, tuple(scored))

        return run_on_ranks(work, world, seconds=rank_timeout(self._slowest))

    def shard(self, examples: int, world: int) -> Sequence[tuple[int, ...]] | None:
        """As the trainer's own data loader deals one micro-batch to each rank."""
        if self._rollouts is not None:
            return None  # a generation is always cut into equal parts
        return shard_as_loader(examples, world, even=self._even)

    def run_dealt(
        self,
        examples: Sequence[int],
        micro_batch_size: int,
        settings: RunSettings = DEFAULT_SETTINGS,
    ) -> Dealt:
        """One update on a pass of the trainer's own loader."""
        cut = _cut(examples, micro_batch_size)
        with self._fresh_trainer(cut, settings, accumulation=len(cut), dealt=True) as (trainer, _):
            number = len(one_pass(trainer.get_train_dataloader(), len(examples)))
        return self._dealt(cut, settings, examples=examples, number=number)

    def run_dealt_on_ranks(
        self,
        examples: Sequence[int],
        micro_batch_size: int,
        world: int,
        settings: RunSettings = DEFAULT_SETTINGS,
    ) -> list[Dealt] | None:
        """The same on several ranks, to each of which the loader deals one micro-batch."""
        if "loader" in self.missing():
            return None

        def work(rank: int) -> Dealt:
            cut = _cut(examples, micro_batch_size)
            return self._dealt(cut, settings, examples=examples, number=1, rank=rank)

        return run_on_ranks(work, world, seconds=rank_timeout(self._slowest))

    def _dealt(
        self,
        cut: Sequence[Sequence[int]],
        settings: RunSettings,
        *,
        examples: Sequence[int],
        number: int,
        rank: int | None = None,
    ) -> Dealt:
        seen: list[tuple[int | None, ...]] = []
        rows = None if rank is None else list(examples)
        observation = self._train(cut, settings, accumulation=number, all_rows=rows, dealt=seen)
        return Dealt(observation, named(seen, examples), number)


def _cut(examples: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(examples[at : at + size]) for at in range(0, len(examples), size)]


def recognise_dealt(trainer: Any, collator: AuditCollator) -> list[tuple[int | None, ...]]:
    """The places, in the trainer's data, of the rows of each micro-batch that it collated."""
    return recognise_in(trainer.train_dataset, collator.seen)


def recognise_in(dataset: Any, seen: Sequence[Any]) -> list[tuple[int | None, ...]]:
    """The places, in a data set, of the rows of each micro-batch.

    Args:
        dataset: Rows by number.
        seen: What the collator was given, a list for each micro-batch.
    """
    rows = [dataset[at] for at in range(len(dataset))]
    return [recognise(features, rows) for features in seen]


def deal_in_order(trainer: Any) -> None:
    """Let a trainer with a loader of its own take its rows in order, by its collator."""
    if type(trainer).get_train_dataloader is Trainer.get_train_dataloader:
        return
    own = trainer.get_train_dataloader

    def in_order() -> Any:
        loader = own()
        rows = trainer.train_dataset
        batched = getattr(loader, "batch_sampler", None) is not None
        if not batched or len(loader.dataset) != len(rows):
            return loader
        plain: Any = DataLoader(
            loader.dataset,
            batch_size=trainer._train_batch_size or trainer.args.train_batch_size,
            sampler=SequentialSampler(loader.dataset),
            collate_fn=loader.collate_fn,
        )
        return trainer.accelerator.prepare(plain)

    trainer.get_train_dataloader = in_order
