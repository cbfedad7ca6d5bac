"""Prompts to which rollouts are generated, with what a reward function reads of their rows."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from samestep.data.conversations import check_chat_template, renderer
from samestep.data.examples import Example, Examples
from samestep.data.messages import read_message_texts, read_tools
from samestep.data.records import Records
from samestep.data.rows import (
    Row,
    RowError,
    RowTally,
    describe_dropped,
    map_rows,
    read_weight,
    rows_with_weight,
)
from samestep.data.target_spans import TextWithTargets, tokenize_texts
from samestep.errors import DataError


@dataclass(frozen=True)
class PromptRow:
    """A row as a reward function reads it.

    Attributes:
        prompt: Text, or messages.
        columns: The other columns.
        origin: Where the row is from, for messages.
    """

    prompt: Any
    columns: Mapping[str, Any]
    origin: str = field(compare=False)

    @property
    def is_conversation(self) -> bool:
        """Whether completions to it are messages."""
        return isinstance(self.prompt, list)


class PromptRows(tuple[PromptRow, ...]):
    """Rows of prompts; shown as a digest of what they hold, for their records' fingerprint."""

    def __repr__(self) -> str:
        """A digest of the prompts and all columns."""
        digest = hashlib.sha256()
        for row in self:
            digest.update(json.dumps([row.prompt, dict(row.columns)], default=repr).encode())
        return digest.hexdigest()


ROWS = "prompt rows"
"""Where ``Records.meta`` of prompts holds their `PromptRows`, one a record."""


def prompt_records(rows: Sequence[Row], tokenizer: Any, *, columns: bool = True) -> Records:
    """Tokenise prompts up to where the completion begins.

    Args:
        rows: At least one, with ``prompt``: text, or messages (with ``tools``, or none), which get
            the header of the assistant's turn. Each may add ``weight``.
        tokenizer: A tokenizer of transformers; with a chat template for messages.
        columns: Whether anybody reads the other columns.

    Returns:
        A record for each row, without targets; ``meta`` holds its columns.

    Raises:
        DataError: Rows cannot be used; lists every one.
        ConfigError: There is no chat template, and rows need one.
    """
    dropped = RowTally()
    kept = rows_with_weight(rows, range(len(rows)), dropped)
    if not kept:
        raise DataError(f"no row is left to complete ({describe_dropped(dropped)})")
    if any(isinstance(rows[at].values.get("prompt"), list) for at in kept):
        check_chat_template(tokenizer)
    ids = map_rows(
        [rows[at] for at in kept],
        lambda row: _prompt_ids(row, tokenizer),
        hint="accepted columns: prompt, text or a list of messages; all others are for the rewards",
    )
    weights = [read_weight(rows[at].values) for at in kept]
    examples = [
        Example.without_targets(torch.from_numpy(each), weight=weight, row=at)
        for at, each, weight in zip(kept, ids, weights, strict=True)
    ]
    found = PromptRows(_prompt_row(rows[at], columns=columns) for at in kept)
    return Records(Examples.from_examples(examples, dropped), meta={ROWS: found})


def _prompt_row(row: Row, *, columns: bool) -> PromptRow:
    others = {name: value for name, value in row.values.items() if columns and name != "prompt"}
    return PromptRow(row.values["prompt"], others, row.origin)


def _prompt_ids(row: Row, tokenizer: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    prompt = row.values.get("prompt")
    if isinstance(prompt, str):
        text, special_tokens = prompt, True
    elif isinstance(prompt, list):
        messages = read_message_texts(row.values, "prompt")
        text = renderer(tokenizer, read_tools(row.values))(messages, True)
        special_tokens = False  # the template writes them itself
    else:
        raise RowError(
            f"prompt must be text or a list of messages, found {type(prompt).__name__}"
            if prompt is not None
            else f"has no prompt (columns: {', '.join(row.values) or 'none'})"
        )
    (found,) = tokenize_texts([TextWithTargets(text, ())], tokenizer, special_tokens=special_tokens)
    if isinstance(found, RowError):
        raise found
    ids, end = found.ids, tokenizer.eos_token_id
    if special_tokens and len(ids) and ids[-1] == end and not text.endswith(tokenizer.eos_token):
        ids = ids[:-1]  # put behind a text, where the completion is to come
    if not len(ids):
        raise RowError("prompt is empty: there is nothing to complete")
    return ids
