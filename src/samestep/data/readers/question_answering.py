"""Questions about a context, answered by a span of it."""

from collections.abc import Sequence
from typing import Any

import torch

from samestep.data.readers.classification import read_labels, untargeted_records
from samestep.data.records import Records
from samestep.data.row_texts import read_text, shortened
from samestep.data.rows import (
    Row,
    RowError,
    rows_with_weight,
    tally_cut,
    tally_missing,
)
from samestep.errors import ConfigError

_LISTS = "text, a list of texts, and answer_start, a list of whole numbers"


def answer_records(
    rows: Sequence[Row], tokenizer: Any, *, max_length: int | None = None
) -> Records:
    """Questions about a context, answered by a span of it.

    Args:
        rows: With ``question``, ``context`` and ``answers``, as of SQuAD: ``{"text": [..],
            "answer_start": [..]}`` (the first counts), or none: then the first token is the
            answer. Each may add ``weight``.
        tokenizer: A fast tokenizer of transformers.
        max_length: Truncate the context to so many tokens in all.

    Returns:
        Records with the fields ``start`` and ``end`` [records], the first and the last token of
        the answer, int64; rows whose answer is cut off are dropped and counted.

    Raises:
        DataError: Rows are malformed; lists every one.
        ConfigError: The tokenizer cannot tell characters.
    """
    if not tokenizer.is_fast:
        raise ConfigError("question answering needs a fast tokenizer, which tells characters")
    answers = read_labels(rows, _answer, columns="question, context and answers")
    encoded = tokenizer(
        [row.values["question"] for row in rows],
        [row.values["context"] for row in rows],
        truncation="only_second" if max_length is not None else False,
        max_length=max_length,
    )
    spans = [_tokens_of_answer(encoded, at, answer=answer) for at, answer in enumerate(answers)]
    kept = [at for at, span in enumerate(spans) if span is not None]
    dropped = tally_missing("the answer is cut off", kept, total=len(rows))
    kept = rows_with_weight(rows, kept, dropped)
    fields = {
        name: torch.tensor([spans[at][side] for at in kept])  # type: ignore[index]
        for side, name in enumerate(("start", "end"))
    }
    return untargeted_records(
        rows,
        encoded,
        kept=kept,
        fields=fields,
        dropped=dropped,
        cut=tally_cut(
            [len(ids) for ids in encoded["input_ids"]],
            max_length,
            whole_length=lambda at: len(
                tokenizer(rows[at].values["question"], rows[at].values["context"], verbose=False)[
                    "input_ids"
                ]
            ),
        ),
    )


def _answer(row: Row) -> tuple[int, int] | None:
    """The characters of the answer; None if there is none."""
    context, answers = read_text(row.values, "context"), row.values.get("answers")
    read_text(row.values, "question")
    if answers is None:
        return None
    lists = [answers.get(n) for n in ("text", "answer_start")] if isinstance(answers, dict) else []
    if not lists or not all(each is None or isinstance(each, list) for each in lists):
        raise RowError(f"answers must be an object with {_LISTS}, found {shortened(answers)}")
    texts, starts = (each or [] for each in lists)
    if not texts:
        return None
    if not starts or not isinstance(texts[0], str) or type(starts[0]) is not int:
        raise RowError(f"answers must hold {_LISTS}, found {shortened(answers)}")
    text, start = texts[0], starts[0]
    if start < 0 or context[start : start + len(text)] != text or not text:
        raise RowError(f"the answer {text!r} does not stand at character {start} of the context")
    return start, start + len(text)


def _tokens_of_answer(
    encoded: Any, at: int, *, answer: tuple[int, int] | None
) -> tuple[int, int] | None:
    if answer is None:
        return 0, 0
    first = encoded.char_to_token(at, answer[0], sequence_index=1)
    last = encoded.char_to_token(at, answer[1] - 1, sequence_index=1)
    return None if first is None or last is None else (first, last)
