"""The rows of a study: tokenised once, completions cut, written where every arm reads them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from samestep.data.examples import Example, Examples
from samestep.data.load import load_rows
from samestep.data.tokenize import tokenize_rows
from samestep.engine.targets import IGNORE
from samestep.study.results import Lengths
from samestep.utils.files import cache_folder, write_atomically


def read_examples(
    source: str, tokenizer: Any, *, rows: int | None, max_length: int | None
) -> Examples:
    """The examples of a source.

    Args:
        source: As for `samestep.data.load.load_rows`.
        tokenizer: A tokenizer of transformers.
        rows: Take the first so many; None takes all.
        max_length: As for `samestep.data.tokenize.tokenize_rows`.

    Returns:
        At least one example.

    Raises:
        DataError: The rows cannot be used.
    """
    return tokenize_rows(
        load_rows(source)[:rows], tokenizer, max_length=max_length, cache=cache_folder() / "tokens"
    )


def cut_completions(examples: Iterable[Example], share: float, *, keep: int) -> list[Example]:
    """Shorten some completions, to spread the numbers of targets.

    Args:
        examples: The examples.
        share: Of the examples to shorten, from 0 to 1. Which ones is the same in every run, and a
            larger share shortens those of a smaller one and more.
        keep: How many targets a shortened example keeps, if it has more; it ends there.

    Returns:
        The examples in order.
    """
    draw = np.random.default_rng(0)
    return [_shortened(example, keep) if draw.random() < share else example for example in examples]


def _shortened(example: Example, keep: int) -> Example:
    targets = (example.labels[1:] != IGNORE).nonzero().flatten()
    end = int(targets[keep - 1]) + 2 if len(targets) > keep else len(example.labels)
    return Example(example.input_ids[:end], example.labels[:end], example.weight, example.row)


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """Write examples as rows of token ids, which `samestep train` reads.

    Args:
        path: A .jsonl file; its folder must exist.
        examples: The examples.
    """
    rows = (
        {
            "input_ids": example.input_ids.tolist(),
            "labels": example.labels.tolist(),
            "weight": example.weight,
        }
        for example in examples
    )
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def lengths_of(examples: Iterable[Example], *, cut: float) -> Lengths:
    """How many targets the examples have, and how unequal they are."""
    targets = np.array([int((example.labels[1:] != IGNORE).sum()) for example in examples])
    low, middle, high = np.percentile(targets, [10, 50, 90])
    return Lengths(
        cut=cut,
        rows=len(targets),
        targets=int(targets.sum()),
        p10=float(low),
        p50=float(middle),
        p90=float(high),
        spread=float(targets.std() / targets.mean()),
    )
