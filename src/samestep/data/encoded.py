"""Rows that are read whole, tokens that are no targets: what labels beside the text need."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from samestep.data.examples import Example, Examples
from samestep.data.forms import weight_of
from samestep.data.load import Row
from samestep.data.problems import RowError, raise_all
from samestep.data.records import Records
from samestep.errors import DataError
from samestep.targets import IGNORE

Read = TypeVar("Read")


def each_row(rows: Sequence[Row], read: Callable[[Row], Read], wanted: str) -> list[Read]:
    """What is read of every row, or every problem."""
    found: list[Read] = []
    problems = []
    for row in rows:
        try:
            weight_of(row.values)
            one = read(row)
        except RowError as error:
            problems.append(f"{row.origin}: {error}")
            continue
        found.append(one)
    raise_all(problems, hint=f"accepted columns: {wanted}; each row may add weight")
    return found


def encode_texts(
    rows: Sequence[Row], tokenizer: Any, max_length: int | None
) -> Mapping[str, list[list[int]]]:
    """The tokens of each row's ``text`` (and ``text_pair``), or of its ``messages``."""
    options: dict[str, Any] = {"truncation": max_length is not None, "max_length": max_length}
    encoded: dict[str, list[list[int]]] = {}
    for row in rows:
        values = row.values
        if isinstance(values.get("messages"), list):
            text = tokenizer.apply_chat_template(values["messages"], tokenize=False)
            found = tokenizer(text, add_special_tokens=False, **options)
        else:
            found = tokenizer(values["text"], values.get("text_pair"), **options)
        for name, tokens in found.items():
            encoded.setdefault(name, []).append(tokens)
    return encoded


def records_of(
    rows: Sequence[Row],
    encoded: Mapping[str, Sequence[Sequence[int]]],
    kept: Sequence[int],
    *,
    fields: Mapping[str, Tensor] | None = None,
    token_fields: Mapping[str, Tensor] | None = None,
    meta: Mapping[str, Any] | None = None,
    dropped: Mapping[str, int],
) -> Records:
    """Records without a next token to learn."""
    dropped = {reason: number for reason, number in dropped.items() if number}
    if not kept:
        told = "; ".join(f"{number} rows: {reason}" for reason, number in dropped.items())
        raise DataError(f"no row is left to learn from ({told})")
    examples = []
    token_fields = dict(token_fields or {})
    types = [token for at in kept for token in encoded.get("token_type_ids", [[]] * len(rows))[at]]
    if any(types):  # BERT tells a pair's second text by them
        token_fields["token_type_ids"] = torch.tensor(types)
    for at in kept:
        tokens = torch.tensor(encoded["input_ids"][at])
        nothing = torch.full_like(tokens, IGNORE)
        examples.append(Example(tokens, nothing, weight_of(rows[at].values), row=at))
    return Records(
        Examples.from_examples(examples),
        fields=fields,
        token_fields=token_fields,
        meta=meta,
        dropped=dropped,
    )
