"""Long texts in pieces of at most ``max_length`` tokens, for continued pretraining."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from samestep.data.row_formats import common_format
from samestep.data.rows import Row, raise_problems
from samestep.data.tokenize import tokenize_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("samestep")


def split_texts(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    append_eos: bool,
    cache: Path | None = None,
) -> list[Row]:
    """Rows of text as rows of token ids, each text in as many as it needs.

    A piece begins with the last token of the piece before it, which is read and not learned: the
    first token of a sequence has none before it to be predicted from. So every token of a text but
    its first is a target, once.

    Args:
        rows: Rows of text.
        tokenizer: Reads them.
        max_length: Tokens a piece, at most; at least 2.
        append_eos: Close each text, not each piece, with the end-of-sequence token.
        cache: As for `samestep.data.tokenize.tokenize_rows`.

    Returns:
        A row a piece; a text that has nothing to learn is a row that has nothing to learn.

    Raises:
        DataError: The rows are no texts.
    """
    others = [row for row in rows if common_format([row]).name != "text"]
    raise_problems(
        [f"{row.origin}: it has {', '.join(row.values)}, not text" for row in others],
        hint="long_text: split is for rows of text alone: take cut or drop",
    )
    examples = tokenize_rows(rows, tokenizer, max_length=None, append_eos=append_eos, cache=cache)
    texts = {example.row: example.input_ids.tolist() for example in examples}
    pieces: list[Row] = []
    long = 0
    for at, row in enumerate(rows):
        ids = texts.get(at, [0])  # alone it is no target: dropped and counted like the text
        starts = range(0, max(1, len(ids) - 1), max_length - 1)
        long += len(starts) > 1
        for number, start in enumerate(starts, 1):
            name = f"{row.origin} part {number} of {len(starts)}" if starts[1:] else row.origin
            pieces.append(_piece(row, ids[start : start + max_length], name, max_length))
    if long:
        log.info(
            "%d texts of more than %d tokens are learned in pieces: %d rows of %d texts",
            *(long, max_length, len(pieces), len(rows)),
        )
    return pieces


def _piece(row: Row, ids: list[int], origin: str, max_length: int) -> Row:
    weight = {name: value for name, value in row.values.items() if name == "weight"}
    converted = (f"text in pieces of at most {max_length} tokens", tuple(row.values))
    return replace(row, values={"input_ids": ids, **weight}, origin=origin, converted=converted)
