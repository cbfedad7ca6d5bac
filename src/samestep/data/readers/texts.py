"""Rows of one or several texts, whose tokens are no targets of a decoder that reads them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samestep.data.collate import Padding, collate_examples, collate_records, pad_rows
from samestep.data.examples import Example, Examples
from samestep.data.records import Record, Records
from samestep.data.row_texts import read_text
from samestep.data.rows import (
    Row,
    RowError,
    RowTally,
    describe_columns,
    describe_dropped,
    map_rows,
    read_weight,
    rows_with_weight,
    tally_cut,
    tally_missing,
)
from samestep.engine.targets import IGNORE
from samestep.errors import ConfigError, DataError


def text_records(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    columns: Sequence[str],
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
    map_rows(
        rows,
        lambda row: _check_columns(row, columns),
        hint=f"accepted columns: {', '.join(columns)}, all text; and weight",
    )
    weights = map_rows(rows, lambda row: read_weight(row.values))
    encoded = [
        _encode_column(
            rows, tokenizer, column=name, max_length=max_length, of_target=name in of_target
        )
        for name in columns
    ]
    kept = [at for at, row in enumerate(rows) if all(row.values[name] for name in columns)]
    dropped = tally_missing("an empty text", kept, total=len(rows))
    kept = rows_with_weight(rows, kept, dropped)
    if not kept:
        raise DataError(f"no row is left to learn from ({describe_dropped(dropped)})")
    cut = _cut_texts(rows, tokenizer, columns=columns, encoded=encoded, max_length=max_length)
    width, examples, special = len(columns), [], []
    for at in kept:
        for side, outputs in enumerate(encoded):
            ids = torch.tensor(outputs["input_ids"][at])
            row = at * width + side
            examples.append(Example.without_targets(ids, weight=weights[at], row=row))
            special.append(torch.tensor(outputs["special_tokens_mask"][at], dtype=torch.int64))
    return Records(
        Examples.from_examples(examples),
        width=width,
        token_fields={"special": torch.cat(special)},
        dropped=dropped,
        cut=cut,
    )


def _cut_texts(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    columns: Sequence[str],
    encoded: Sequence[Mapping[str, list[list[int]]]],
    max_length: int | None,
) -> RowTally:
    """The rows of which a text was truncated, each once."""
    cut = RowTally()
    for name, outputs in zip(columns, encoded, strict=True):

        def whole_length(at: int, name: str = name) -> int:
            return len(tokenizer(rows[at].values[name], verbose=False)["input_ids"])

        lengths = [len(ids) for ids in outputs["input_ids"]]
        for reason, found in tally_cut(lengths, max_length, whole_length=whole_length).rows.items():
            for at in sorted(set(found) - set(cut.rows.get(reason, []))):
                cut.add(reason, at)
    return cut


def _check_columns(row: Row, columns: Sequence[str]) -> None:
    if not all(isinstance(row.values.get(name), str) for name in columns):
        raise RowError(describe_columns(row.values))
    for name in columns:
        read_text(row.values, name)


def _encode_column(
    rows: Sequence[Row], tokenizer: Any, *, column: str, max_length: int | None, of_target: bool
) -> Mapping[str, list[list[int]]]:
    outputs: Mapping[str, list[list[int]]] = tokenizer(
        **{"text_target" if of_target else "text": [row.values[column] for row in rows]},
        truncation=max_length is not None,
        max_length=max_length,
        return_special_tokens_mask=True,
    )
    return outputs


def mask_settings(tokenizer: Any) -> dict[str, int]:
    """What `collate_masked` needs of a tokenizer.

    Args:
        tokenizer: A tokenizer of transformers.

    Returns:
        The id of its mask token, and how many tokens it has: to be put into ``meta``.

    Raises:
        ConfigError: It has no mask token.
    """
    if tokenizer.mask_token_id is None:
        raise ConfigError("the tokenizer has no mask token, which masked_lm puts in place of words")
    return {"mask_id": tokenizer.mask_token_id, "vocabulary": len(tokenizer)}


def collate_masked(
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
        padding: As for `samestep.data.collate.collate_examples`.
        pad_id: As for `collate_examples`.
        key: (seed, step).

    Returns:
        A micro-batch whose field ``classes`` [rows, length] holds what was masked.
    """
    masked = []
    for index in indices:
        record = data[index]
        (sequence,) = record.sequences
        ids, originals = _mask_tokens(
            sequence.input_ids,
            record.token_fields["special"][0].bool(),
            share=share,
            draw=np.random.default_rng([*key, sequence.row]),
            settings=data.meta,
        )
        example = Example.without_targets(ids, weight=sequence.weight, row=sequence.row)
        masked.append(Record((example,), {}, {"classes": (originals,)}))
    return collate_records(masked, padding=padding, pad_id=pad_id)


def _mask_tokens(
    ids: Tensor,
    special: Tensor,
    *,
    share: float,
    draw: np.random.Generator,
    settings: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:
    """The ids after masking [length], and those that were drawn, else IGNORE [length]."""
    drawn = torch.from_numpy(draw.random(len(ids)) < share) & ~special
    kind = torch.from_numpy(draw.random(len(ids)))
    random_ids = torch.from_numpy(draw.integers(settings["vocabulary"], size=len(ids)))
    masked = torch.where(drawn & (kind < 0.8), settings["mask_id"], ids)
    masked = torch.where(drawn & (kind >= 0.8) & (kind < 0.9), random_ids, masked)
    return masked, ids.where(drawn, IGNORE)


def collate_seq2seq(records: Sequence[Record], *, pad_id: int = 0) -> dict[str, Any]:
    """One micro-batch of prompts for an encoder and completions for a decoder.

    Args:
        records: Of `text_records`, two sequences each; at least one.
        pad_id: What to fill the prompts' padding with.

    Returns:
        ``input_ids`` and ``attention_mask`` [rows, longest prompt] of prompts padded to the right,
        without ``labels`` and ``position_ids``; the field ``targets`` [rows, longest completion]
        holds the completions, ``IGNORE`` in padding.
    """
    prompts = [record.sequences[0] for record in records]
    completions = [record.sequences[1].input_ids for record in records]
    micro = collate_examples(prompts, padding="right", pad_id=pad_id)
    del micro["labels"], micro["position_ids"]
    return {**micro, "fields": {"targets": pad_rows(completions, fill=IGNORE)}}
