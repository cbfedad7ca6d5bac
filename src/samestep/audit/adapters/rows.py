"""Which rows of a trainer's data a run sees."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
from torch.utils.data import IterableDataset, Subset


class _Stream(IterableDataset[Any]):
    """Rows without a length, for a trainer whose own data have none."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


def is_stream(dataset: Any) -> bool:
    """Whether a dataset can only be iterated over."""
    return isinstance(dataset, IterableDataset | datasets.IterableDataset)


def length(dataset: Any, most: int) -> int:
    """How many rows a dataset holds; of a stream, as far as ``most``."""
    if is_stream(dataset):
        return sum(1 for _ in itertools.islice(dataset, most))
    return len(dataset)


def restrict(dataset: Any, indices: Sequence[int]) -> Any:
    """A dataset of these rows in this order, of the same kind as far as a trainer can tell."""
    if isinstance(dataset, datasets.Dataset):
        return dataset.select(indices)
    if is_stream(dataset):
        rows = list(itertools.islice(dataset, max(indices) + 1))
        return _Stream([rows[index] for index in indices])
    return Subset(dataset, indices)


def evaluation_rows(trainer: Any, most: int) -> Any:
    """The first rows of the evaluation data, or else of the training data."""
    given = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
    return of_each(given, range(most))


def of_each(data: Any, rows: Sequence[int]) -> Any:
    """These rows of a data set, or of each of several by name; of short ones some come again."""
    if isinstance(data, Mapping):
        return {key: of_each(one, rows) for key, one in data.items()}
    held = length(data, max(rows) + 1)
    return restrict(data, [row % held for row in rows])
