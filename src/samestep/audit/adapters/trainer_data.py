"""What a trainer trains on: its rows, its batches and their changes, and what it generates."""

import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor
from torch.utils.data import BatchSampler, IterableDataset, SequentialSampler, Subset
from transformers import Trainer

from samestep.audit.adapters.batches import (
    CollatorPadding,
    add_padding,
    alter_inputs,
    cast_floats,
    mask_targets,
    real_tokens,
)
from samestep.audit.subject import Capability, ExampleCounts, RunSettings
from samestep.errors import CheckError

NUM_ITEMS = "num_items_in_batch"
"""The entry that counts the tokens of all rollouts of an effective batch."""

MISSING_FOR_ROLLOUTS: Mapping[Capability, str] = {
    "padding": "rollouts are padded when they are generated, for all micro-batches alike",
    "masking": "every rollout has a completion",
    "window": "a generation is always cut into equal micro-batches",
    "loader": "a generation is dealt by the trainer, as it was made",
    "evaluation": "an evaluation generates anew, which is random",
}
"""What has no meaning for rollouts."""


class _Stream(IterableDataset[Any]):
    """Rows without a length, for a trainer whose own data have none."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


class _Rows(Subset[Any]):
    """Some rows of a dataset, with every other attribute of its own."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("dataset", "indices"):
            raise AttributeError(name)
        return getattr(self.dataset, name)


def is_stream(dataset: Any) -> bool:
    """Whether a dataset can only be iterated over."""
    kinds = (IterableDataset, *_kinds_of_datasets("IterableDataset"))
    return isinstance(dataset, kinds)


def _kinds_of_datasets(name: str) -> tuple[Any, ...]:
    """A class of the package datasets; none, where nothing has loaded it: then no data are of it.

    A plain trainer does not need that package.
    """
    package = sys.modules.get("datasets")
    return () if package is None else (getattr(package, name),)


def number_of_rows(dataset: Any, most: int) -> int:
    """How many rows a dataset holds; of a stream, as far as ``most``."""
    if is_stream(dataset):
        return sum(1 for _ in itertools.islice(dataset, most))
    return len(dataset)


def select_rows(dataset: Any, indices: Sequence[int]) -> Any:
    """A dataset of these rows in this order, of the same kind as far as a trainer can see."""
    if isinstance(dataset, _kinds_of_datasets("Dataset")):
        return dataset.select(indices)
    if is_stream(dataset):
        rows = list(itertools.islice(dataset, max(indices) + 1))
        return _Stream([rows[index] for index in indices])
    if isinstance(dataset, list | tuple):
        return type(dataset)(dataset[index] for index in indices)
    return _Rows(dataset, indices)


def select_evaluation_rows(data: Any, indices: Sequence[int]) -> Any:
    """These rows of a dataset, or of each of several by name; of short ones some come again."""
    if isinstance(data, Mapping):
        return {key: select_evaluation_rows(each, indices) for key, each in data.items()}
    held = number_of_rows(data, max(indices) + 1)
    return select_rows(data, [index % held for index in indices])


class AuditCollator:
    """A trainer's collator with a change to each batch.

    Args:
        collate: The trainer's own.
        change: Called with the batch and the rows of the trainer's data that it holds.
        rows: Which rows come, in order; then they come again.

    Attributes:
        collated: How many rows came.
        seen: What came, a list for each batch.
    """

    def __init__(
        self,
        collate: Callable[..., Any],
        change: Callable[[Any, Sequence[int]], Any],
        *,
        rows: Sequence[int],
    ) -> None:
        self.collate = collate
        self.change = change
        self.start(rows)

    def start(self, rows: Sequence[int]) -> None:
        """Expect these rows from now on."""
        self.rows = rows
        self.collated = 0
        self.seen: list[Any] = []

    def __call__(self, features: Any, *args: Any, **options: Any) -> Any:
        """The changed batch."""
        places = range(self.collated, self.collated + len(features))
        self.collated += len(features)
        self.seen.append(features)
        held = [self.rows[place % len(self.rows)] for place in places]
        return self.change(self.collate(features, *args, **options), held)


def stand_in_for(collate: Any, call: Callable[..., Any]) -> Any:
    """What a trainer gets for its collator: of the same type, with its attributes; calls ours.

    Args:
        collate: The trainer's own: a function, or an object.
        call: What is called in its place.
    """
    try:
        kind = type(type(collate).__name__, (type(collate),), {"__call__": _calls(call)})
        stand_in: Any = object.__new__(kind)
        stand_in.__dict__ = collate.__dict__  # shared: what a call sets is seen by the trainer
    except (TypeError, AttributeError):  # a function, or an object of fixed fields
        return _like_function(collate, call)
    return stand_in


def _calls(call: Callable[..., Any]) -> Callable[..., Any]:
    """A method that calls a function."""

    def method(self: Any, *args: Any, **options: Any) -> Any:
        del self
        return call(*args, **options)

    return method


def _like_function(function: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    """A function with another's name and attributes."""

    @functools.wraps(function)
    def wrapped(*args: Any, **options: Any) -> Any:
        return call(*args, **options)

    return wrapped


def change_batch(
    batch: Any,
    rows: Sequence[int],
    *,
    settings: RunSettings,
    rows_per_example: int,
    padding: CollatorPadding | None,
    padding_token: int,
) -> Any:
    """A trainer's batch under the settings of a run: padded, masked, altered, in another type.

    Args:
        batch: What the collator gave.
        rows: The rows of the trainer's data that it holds.
        settings: Of the run.
        rows_per_example: Rows that are an example.
        padding: How the collator pads, if that could be seen.
        padding_token: Token id of padding, if it could not, and the settings name none.
    """
    examples = [row // rows_per_example for row in rows]
    altered = [at for at, each in enumerate(examples) if each in settings.altered_examples]
    if settings.alter_repeats:
        altered += [at for at, row in enumerate(rows) if row in rows[:at]]
    masked = [at for at, each in enumerate(examples) if each in settings.masked_examples]
    if altered:
        own = _locations(batch, altered, number=len(rows))
        batch = alter_inputs(batch, [real_tokens(batch, row, padding=padding) for row in own])
    if masked:
        batch = mask_targets(batch, [(row,) for row in _locations(batch, masked, number=len(rows))])
    if settings.extra_padding:
        token = settings.padding_offset or (padding_token if padding is None else 0)
        batch = add_padding(
            batch,
            settings.extra_padding,
            side=settings.padding_side,
            offset=token,
            fills=None if padding is None else padding.fills,
        )
    return batch if settings.dtype is None else cast_floats(batch, settings.dtype)


def _locations(batch: Any, chosen: Sequence[int], *, number: int) -> list[int]:
    """The rows of some of a batch's examples: one each, or one in each of several parts."""
    rows = _rows_of(batch)
    if rows is None or rows % number:
        raise CheckError("the collator does not give each example rows of its own")
    return [part + at for at in chosen for part in range(0, rows, number)]


def _rows_of(batch: Any) -> int | None:
    """Rows of a batch, if all of its tensors have as many."""
    if not isinstance(batch, Mapping):
        return None
    sizes = {
        value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.dim()
    }
    return sizes.pop() if len(sizes) == 1 else None


def missing_of(batch: Any, rows_per_example: int, *, stream: bool) -> dict[Capability, str]:
    """What cannot be done with these data, and why.

    Args:
        batch: The trainer's own, of two examples.
        rows_per_example: Rows of its data that make an example.
        stream: Whether the data have no length.

    Raises:
        CheckError: The batch is no mapping.
    """
    if not isinstance(batch, Mapping):
        raise CheckError(f"batches of this trainer are a {type(batch).__name__}, not a mapping")
    reasons: dict[Capability, str] = {}
    rows = _rows_of(batch)
    if rows is None or rows % (2 * rows_per_example):
        reasons["padding"] = reasons["masking"] = (
            "the collator does not give each example a row of its own"
        )
    if not isinstance(batch.get("input_ids"), Tensor):
        reasons["padding"] = "batches have no 'input_ids' [rows, length]"
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        reasons["masking"] = "batches have no integer 'labels' to mask"
    if stream:
        reasons["window"] = "the training data are a stream, which has no last window"
        reasons["loader"] = "the training data are a stream, which comes in its own order"
        reasons["ranks"] = "the training data are a stream, which each rank cuts in its own way"
    return reasons


def shard_as_loader(examples: int, world: int, *, even: bool) -> list[tuple[int, ...]]:
    """How accelerate's data loader deals one micro-batch to each rank.

    Args:
        examples: Of the effective batch.
        world: Number of ranks.
        even: Whether it repeats examples to give each rank as many.
    """
    size = -(-examples // world)
    batches = BatchSampler(SequentialSampler(range(examples)), size, drop_last=False)
    return [
        tuple(next(iter(BatchSamplerShard(batches, world, rank, even_batches=even))))
        for rank in range(world)
    ]


def without_repeats(
    rows: list[int], shares: Sequence[Any], shard: Sequence[tuple[int, ...]] | None
) -> list[int]:
    """The rows for all ranks; each once where the loader itself repeats some, and can say which.

    Args:
        rows: In the order in which they are dealt out.
        shares: The micro-batches of each rank.
        shard: How the loader deals these examples out, each given once.
    """
    by_loader = shard is not None and [(one,) for one in shard] == list(shares)
    return list(dict.fromkeys(rows)) if by_loader else rows


def generates_rows(trainer: Any) -> bool:
    """Whether a trainer makes its rows itself, as those of GRPO, RLOO and distillation in TRL."""
    return any("_generate_and_score_completions" in vars(kind) for kind in type(trainer).__mro__)


class Rollouts:
    """What a trainer generated from its own prompts, with its own rewards, to be cut like rows.

    Two things are changed where they would hide everything. Completions that are all of one length
    become ragged; advantages that are all zero, since an untrained model's rollouts are all as
    bad, become 1 and -1 in turn.

    Args:
        trainer: Gives the rollouts; its model is not changed.
        most: Rollouts to keep.

    Raises:
        CheckError: The rollouts are not a mapping of tensors with a row each.
    """

    def __init__(self, trainer: Any, most: int) -> None:
        repeats = vars(trainer).get("num_generations", 1)
        prompts = max(2, -(-most // repeats))
        held = [trainer.train_dataset[at % len(trainer.train_dataset)] for at in range(prompts)]
        trainer.model.train()
        with torch.no_grad():
            generated = trainer._generate_and_score_completions(
                [dict(row) for row in held for _ in range(repeats)]
            )
        rows = prompts * repeats
        kept = torch.arange(0, rows, max(1, rows // most))[:most]
        odd = [
            key
            for key, value in generated.items()
            if value is not None and key != NUM_ITEMS and _length(value) != rows
        ]
        if odd:
            raise CheckError(f"rollouts cannot be cut: {', '.join(odd)} has no entry for each row")
        self.columns = {
            key: value.detach()[kept].clone()
            for key, value in generated.items()
            if isinstance(value, Tensor) and key != NUM_ITEMS
        }
        self.counted = NUM_ITEMS in generated
        self.size = len(kept)
        self._make_ragged()
        advantages = self.columns.get("advantages")
        if advantages is not None and not advantages.any():
            advantages[::2], advantages[1::2] = 1.0, -1.0

    def _make_ragged(self) -> None:
        """Cut completions that are all of one length to different ones."""
        mask = self.columns["completion_mask"]
        lengths = mask.sum(1)
        if len(set(lengths.tolist())) > 1:
            return
        places = torch.arange(mask.shape[1])
        for row, length in enumerate(lengths.tolist()):
            mask[row] *= (places < 1 + (5 * row + 2) % length).to(mask.dtype)

    def example_counts(self) -> list[ExampleCounts]:
        """Each rollout's tokens; all of its completion are targets."""
        targets = self.columns["completion_mask"].sum(1).tolist()
        prompts = self.columns["prompt_mask"].sum(1).tolist()
        return [ExampleCounts(int(a), int(a + b)) for a, b in zip(targets, prompts, strict=True)]

    def dataset(self) -> list[dict[str, str]]:
        """As many rows as there are rollouts, for a data loader to count."""
        return [{"prompt": ""} for _ in range(self.size)]

    def batch(self, rows: Sequence[int], all_rows: Sequence[int]) -> dict[str, Tensor]:
        """A micro-batch.

        Args:
            rows: Its rollouts.
            all_rows: Those of the effective batch, on all ranks.
        """
        chosen = torch.tensor(list(rows))
        batch = {key: value[chosen] for key, value in self.columns.items()}
        if self.counted:
            mask = self.columns["completion_mask"] * self.columns.get("tool_mask", 1)
            batch[NUM_ITEMS] = mask[torch.tensor(list(all_rows))].sum()
        return batch

    def feed(self, trainer: Any, accumulation: int) -> None:
        """Let a trainer take micro-batches from its data loader in place of its own generation."""
        trainer.get_train_dataloader = partial(Trainer.get_train_dataloader, trainer)
        trainer._prepare_inputs = partial(Trainer._prepare_inputs, trainer)
        for name, value in (("steps_per_generation", accumulation), ("num_iterations", 1)):
            if name in vars(trainer.args):
                setattr(trainer.args, name, value)
        if "log_completions" in vars(trainer):
            trainer.log_completions = False


def _length(value: Any) -> int | None:
    if isinstance(value, Tensor):
        return value.shape[0] if value.dim() else None
    return len(value) if isinstance(value, Sequence | Mapping) else None
