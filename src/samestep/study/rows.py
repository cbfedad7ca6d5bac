"""The rows of a study: tokenised once, completions cut, written where every arm reads them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from samestep.data.examples import Example, Examples
from samestep.data.load import load_rows
from samestep.data.tokenize import tokenize_rows
from samestep.engine.targets import IGNORE
from samestep.models.load import load_tokenizer, resolve_source
from samestep.study.arms import expand_grid
from samestep.study.results import Lengths
from samestep.study.spec import StudySpec
from samestep.utils.files import cache_folder, write_atomically

RowSet = Literal["train", "eval"]


def prepare_rows(spec: StudySpec, model: str, *, folder: Path) -> list[Lengths]:
    """Tokenise the rows once, and write them for each share of cut completions.

    Args:
        spec: The study.
        model: What `samestep.models.load.resolve_source` made of the spec's model.
        folder: Where the files go; see `rows_file`.

    Returns:
        How unequal the training rows are, for each share.

    Raises:
        ConfigError: There is no tokenizer.
        DataError: The rows cannot be used.
    """
    tokenizer = load_tokenizer(resolve_source(spec.tokenizer or model))
    sources: dict[RowSet, tuple[str, int | None]] = {
        "train": (spec.data, spec.rows),
        "eval": (spec.eval_data, spec.eval_rows),
    }
    examples = {
        row_set: read_examples(source, tokenizer, rows=rows, max_length=spec.max_length)
        for row_set, (source, rows) in sources.items()
    }
    lengths = []
    for cut in sorted({arm.cut for arm in expand_grid(spec)}):
        for row_set, uncut in examples.items():
            cut_examples = cut_completions(uncut, cut, keep=spec.cut_targets)
            write_examples(rows_file(folder, row_set, cut=cut), cut_examples)
            if row_set == "train":
                lengths.append(describe_lengths(cut_examples, cut=cut))
    return lengths


def rows_file(folder: Path, row_set: RowSet, *, cut: float) -> Path:
    """Where the tokenised rows of an arm are.

    Args:
        folder: Of the study's rows.
        row_set: "train" or "eval".
        cut: Share of cut completions.

    Returns:
        The path.
    """
    return folder / f"{row_set}-cut-{cut:g}.jsonl"


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
    rng = np.random.default_rng(0)
    return [_shortened(example, keep) if rng.random() < share else example for example in examples]


def _shortened(example: Example, keep: int) -> Example:
    targets = (example.labels[1:] != IGNORE).nonzero().flatten()
    end = int(targets[keep - 1]) + 2 if len(targets) > keep else len(example.labels)
    return Example(example.input_ids[:end], example.labels[:end], example.weight, example.row)


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """Write examples as rows of token ids, which `samestep train` reads.

    Args:
        path: A .jsonl file; its folder must exist.
        examples: The examples.

    Raises:
        OSError: The file cannot be written.
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


def describe_lengths(examples: Iterable[Example], *, cut: float) -> Lengths:
    """How many targets the examples have, and how unequal they are.

    Args:
        examples: The examples, completions cut.
        cut: Share of the completions that was cut.

    Returns:
        Their number, percentiles and spread.
    """
    targets = np.array([int((example.labels[1:] != IGNORE).sum()) for example in examples])
    p10, p50, p90 = np.percentile(targets, [10, 50, 90])
    return Lengths(
        cut=cut,
        rows=len(targets),
        targets=int(targets.sum()),
        p10=float(p10),
        p50=float(p50),
        p90=float(p90),
        spread=float(targets.std() / targets.mean()),
    )
