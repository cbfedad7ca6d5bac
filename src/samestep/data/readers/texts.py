"""Rows of several texts, or of text to be masked: no next token is learned from them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samestep.data.collate import Padding
from samestep.data.examples import Example, Examples
from samestep.data.records import Records, collate_records
from samestep.data.rows import Row, RowError, raise_all, weight_of
from samestep.engine.targets import IGNORE
from samestep.errors import ConfigError, DataError


def text_records(
    rows: Sequence[Row],
    tokenizer: Any,
    columns: Sequence[str],
    *,
    max_length: int | None = None,
    of_target: Sequence[str] = (),
) -> Records:
    """Records with one sequence for each column of text.

    Args:
        rows: With all of the columns as text; each may add ``weight``.
        tokenizer: A tokenizer of transformers; its special tokens are added.
        columns: Their names.
        max_length: Truncate each text to so many tokens.
        of_target: Columns that are tokenised as targets of a translation.

    Returns:
        Records without next tokens to learn, whose token field ``special`` [tokens] says which
        tokens the tokenizer added; rows with an empty text are dropped and counted.

    Raises:
        DataError: Rows are malformed; lists every one.
    """
    problems = []
    for row in rows:
        if not all(isinstance(row.values.get(name), str) for name in columns):
            found = ", ".join(name for name, value in row.values.items() if value is not None)
            problems.append(f"{row.origin}: found the columns {found or 'none'}")
    raise_all(problems, hint=f"accepted columns: {', '.join(columns)}, all text; and weight")
    weights = _weights(rows)
    encoded = [_encode(rows, tokenizer, name, max_length, name in of_target) for name in columns]
    kept = [at for at, row in enumerate(rows) if all(row.values[name] for name in columns)]
    if not kept:
        raise DataError("every row has an empty text")
    width, examples, special = len(columns), [], []
    for at in kept:
        for side, one in enumerate(encoded):
            ids = torch.tensor(one["input_ids"][at])
            nothing = torch.full_like(ids, IGNORE)
            examples.append(Example(ids, nothing, weights[at], row=at * width + side))
            special.append(torch.tensor(one["special_tokens_mask"][at], dtype=torch.int64))
    dropped = Counter({"an empty text": len(rows) - len(kept)})
    return Records(
        Examples.from_examples(examples),
        width=width,
        token_fields={"special": torch.cat(special)},
        dropped={reason: number for reason, number in dropped.items() if number},
    )


def _weights(rows: Sequence[Row]) -> list[float]:
    problems, weights = [], []
    for row in rows:
        try:
            weight = weight_of(row.values)
        except RowError as error:
            problems.append(f"{row.origin}: {error}")
            continue
        weights.append(weight)
    raise_all(problems)
    return weights


def _encode(
    rows: Sequence[Row], tokenizer: Any, column: str, max_length: int | None, target: bool
) -> Mapping[str, list[list[int]]]:
    texts = [row.values[column] for row in rows]
    found: Mapping[str, list[list[int]]] = tokenizer(
        **{"text_target" if target else "text": texts},
        truncation=max_length is not None,
        max_length=max_length,
        return_special_tokens_mask=True,
    )
    return found


def mask_settings(tokenizer: Any) -> dict[str, int]:
    """What `masked_batch` needs of a tokenizer.

    Raises:
        ConfigError: It has no mask token.
    """
    if tokenizer.mask_token_id is None:
        raise ConfigError("the tokenizer has no mask token, which masked_lm puts in place of words")
    return {"mask_id": tokenizer.mask_token_id, "vocabulary": len(tokenizer)}


def masked_batch(
    data: Records,
    indices: Sequence[int],
    *,
    share: float,
    padding: Padding,
    pad_id: int,
    key: tuple[int, int],
) -> dict[str, Any]:
    """A micro-batch with some tokens masked, drawn for each example by itself.

    Of the tokens drawn 80 % become the mask token, 10 % a random one, 10 % stay
    (arXiv:1810.04805). What is drawn is a function of (seed, step, row): not of the micro-batch.

    Args:
        data: Of `text_records`, with `mask_settings` as ``meta``.
        indices: Which records; at least one.
        share: The share of tokens to be drawn; special ones never are.
        padding: As for `samestep.data.collate.collate`.
        pad_id: As for `collate`.
        key: (seed, step).

    Returns:
        A micro-batch whose field ``classes`` [rows, length] holds what was masked.
    """
    masked, classes, records = [], [], [data[at] for at in indices]
    for record in records:
        (sequence,) = record.sequences
        ids, were = _masked(
            sequence.input_ids,
            record.token_fields["special"][0].bool(),
            share,
            np.random.default_rng([*key, sequence.row]),
            data.meta,
        )
        nothing = torch.full_like(ids, IGNORE)
        masked.append(Example(ids, nothing, sequence.weight, sequence.row))
        classes.append(were)
    drawn = Records(Examples.from_examples(masked), token_fields={"classes": torch.cat(classes)})
    return collate_records(list(drawn), padding=padding, pad_id=pad_id)


def _masked(
    ids: Tensor, special: Tensor, share: float, draw: np.random.Generator, meta: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    drawn = torch.from_numpy(draw.random(len(ids)) < share) & ~special
    kind = torch.from_numpy(draw.random(len(ids)))
    others = torch.from_numpy(draw.integers(meta["vocabulary"], size=len(ids)))
    new = torch.where(drawn & (kind < 0.8), meta["mask_id"], ids)
    new = torch.where(drawn & (kind >= 0.8) & (kind < 0.9), others, new)
    return new, ids.where(drawn, IGNORE)
