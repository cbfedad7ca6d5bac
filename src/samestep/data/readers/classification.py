"""Texts with a class, a number, or a tag for each word: labels beside text, no next token."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from samestep.data.conversations import check_chat_template, renderer
from samestep.data.examples import Example, Examples
from samestep.data.messages import read_message_texts
from samestep.data.records import Records
from samestep.data.row_texts import check_text, read_text, shortened
from samestep.data.rows import (
    Row,
    RowError,
    RowTally,
    describe_columns,
    describe_dropped,
    map_rows,
    raise_problems,
    read_number,
    read_weight,
    rows_with_weight,
    tally_cut,
    tally_missing,
)
from samestep.engine.targets import IGNORE
from samestep.errors import ConfigError, DataError

Label = TypeVar("Label")

_MOST_NUMBERED = 10_000
"""Numbered classes that rows may leave out: more, and a number is an identifier, or a slip."""


def class_records(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    classes: Sequence[str] | None = None,
) -> Records:
    """Texts with a class.

    Args:
        rows: With ``text`` (and ``text_pair``) or ``messages``, and ``label``: the name of a class
            or its number. Each may add ``weight``.
        tokenizer: A tokenizer of transformers.
        max_length: Truncate to so many tokens, special ones included.
        classes: The names of the classes in order; None: those of the rows, sorted (for numbers,
            all from 0 to the highest).

    Returns:
        Records with the field ``class`` [records], int64, and ``meta["classes"]``.

    Raises:
        DataError: Rows are malformed or have a class that is not among them; lists every one.
    """
    labels = read_labels(rows, _class_label, columns="text (or messages) and label")
    of_rows = [[label] for label in labels]
    names = list(classes) if classes is not None else _all_classes(rows, of_rows)
    _check_classes(rows, of_rows, names=names, what="label")
    if len(names) < 2:
        raise DataError(f"every row has the class {names[0]!r}: there is nothing to tell apart")
    field = torch.tensor([names.index(label) for label in labels])
    return _text_records(
        rows,
        tokenizer,
        max_length=max_length,
        fields={"class": field},
        meta={"classes": names},
    )


def value_records(rows: Sequence[Row], tokenizer: Any, *, max_length: int | None = None) -> Records:
    """Texts with a number.

    Args:
        rows: As for `class_records`, with ``label`` a finite number.
        tokenizer: As for `class_records`.
        max_length: As for `class_records`.

    Returns:
        Records with the field ``value`` [records], float64.

    Raises:
        DataError: As for `class_records`.
    """
    values = read_labels(rows, _value_label, columns="text (or messages) and label")
    field = torch.tensor(values, dtype=torch.float64)
    return _text_records(rows, tokenizer, max_length=max_length, fields={"value": field})


def tag_records(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    classes: Sequence[str] | None = None,
) -> Records:
    """Words with a tag each; the first token of a word carries it.

    Args:
        rows: With ``tokens``, a list of words, and ``tags``, as many names or numbers; a tag of
            -100 or null is not learned. Each may add ``weight``.
        tokenizer: A fast tokenizer of transformers.
        max_length: As for `class_records`.
        classes: As for `class_records`.

    Returns:
        Records with the token field ``classes`` [tokens], int64, and ``meta["classes"]``; rows
        without a tag left are dropped and counted.

    Raises:
        DataError: As for `class_records`.
        ConfigError: The tokenizer cannot tell words.
    """
    if not tokenizer.is_fast:
        raise ConfigError("tags of words need a fast tokenizer, which tells a token's word")
    tagged = read_labels(rows, _tagged_words, columns="tokens and tags")
    learned = [[tag for tag in tags if tag is not None] for _, tags in tagged]
    names = list(classes) if classes is not None else _all_classes(rows, learned)
    _check_classes(rows, learned, names=names, what="tag")
    encoded = tokenizer(
        [words for words, _ in tagged],
        is_split_into_words=True,
        truncation=max_length is not None,
        max_length=max_length,
    )
    labels = [
        _token_classes(encoded.word_ids(at), tags, names=names)
        for at, (_, tags) in enumerate(tagged)
    ]
    kept = [at for at, classes in enumerate(labels) if bool((classes != IGNORE).any())]
    dropped = tally_missing("no tag left", kept, total=len(rows))
    kept = rows_with_weight(rows, kept, dropped)
    return untargeted_records(
        rows,
        encoded,
        kept=kept,
        token_fields={"classes": torch.cat([labels[at] for at in kept])} if kept else {},
        meta={"classes": names},
        dropped=dropped,
        cut=tally_cut(
            [len(ids) for ids in encoded["input_ids"]],
            max_length,
            whole_length=lambda at: len(
                tokenizer(tagged[at][0], is_split_into_words=True, verbose=False)["input_ids"]
            ),
        ),
    )


def read_labels(rows: Sequence[Row], read: Callable[[Row], Label], *, columns: str) -> list[Label]:
    """What is read of every row; their weights are checked too.

    Args:
        rows: The rows.
        read: Maps a row to its label; raises `RowError`.
        columns: The columns that rows must have, for messages.

    Returns:
        One for each row.

    Raises:
        DataError: Rows are malformed; lists every one.
    """

    def checked(row: Row) -> Label:
        read_weight(row.values)
        return read(row)

    hint = f"accepted columns: {columns}; each row may add weight"
    return map_rows(rows, checked, hint=hint)


def untargeted_records(
    rows: Sequence[Row],
    encoded: Mapping[str, Sequence[Sequence[int]]],
    *,
    kept: Sequence[int],
    fields: Mapping[str, Tensor] | None = None,
    token_fields: Mapping[str, Tensor] | None = None,
    meta: Mapping[str, Any] | None = None,
    dropped: RowTally,
    cut: RowTally,
) -> Records:
    """Records of one sequence each, of which no next token is learned.

    Args:
        rows: All rows.
        encoded: What a tokenizer made of them: ``input_ids``, and ``token_type_ids`` or none, each
            a list of token ids a row.
        kept: The indices of rows that become records.
        fields: Of the records by name [records, ...].
        token_fields: Of the tokens of all records by name [tokens, ...].
        meta: What belongs to all records.
        dropped: The rows that are left out, by reason.
        cut: The rows that were truncated.

    Returns:
        The records.

    Raises:
        DataError: No row is kept.
    """
    if not kept:
        raise DataError(f"no row is left to learn from ({describe_dropped(dropped)})")
    token_fields = dict(token_fields or {})
    segments = encoded.get("token_type_ids", [[]] * len(rows))
    types = [token for at in kept for token in segments[at]]
    if any(types):  # BERT tells a pair's second text by them
        token_fields["token_type_ids"] = torch.tensor(types)
    examples = [
        Example.without_targets(
            torch.tensor(encoded["input_ids"][at]), weight=read_weight(rows[at].values), row=at
        )
        for at in kept
    ]
    return Records(
        Examples.from_examples(examples),
        fields=fields,
        token_fields=token_fields,
        meta=meta,
        dropped=dropped,
        cut=cut,
    )


def _class_label(row: Row) -> str:
    label = _label(row.values)
    if isinstance(label, float | list | dict):
        raise RowError(f"label must be the name or the number of a class, found {label!r}")
    return _class_name(label)


def _value_label(row: Row) -> float:
    _label(row.values)
    return read_number(row.values, "label", booleans=False)


def _label(values: Mapping[str, Any]) -> Any:
    if not isinstance(values.get("text"), str) and not isinstance(values.get("messages"), list):
        raise RowError(f"has no text and no messages; {describe_columns(values)}")
    if values.get("messages") is None:
        read_text(values, "text")
        if values.get("text_pair") is not None:
            read_text(values, "text_pair")
    if values.get("label") is None:
        raise RowError("has no label")
    return values["label"]


def _class_name(label: Any) -> str:
    """The name of a class whose label is its name or its number."""
    if isinstance(label, bool):
        return str(int(label))
    if isinstance(label, int) and label < 0:
        raise RowError(f"label must be at least 0, found {label}")
    return check_text(str(label), "label")


def _all_classes(rows: Sequence[Row], labels: Sequence[Sequence[str]]) -> list[str]:
    """The names of the classes that labels have: sorted; of numbers, all up to the highest."""
    found = set(chain.from_iterable(labels))
    if not all(label.isascii() and label.isdigit() for label in found):
        return sorted(found)
    digits = max((label.lstrip("0") for label in found), key=lambda text: (len(text), text))
    number = int(digits[:18] or 0) + 1
    if number > _MOST_NUMBERED + 100 * len(found):
        pairs = zip(rows, labels, strict=True)
        row = next(row for row, some in pairs if digits in {text.lstrip("0") for text in some})
        raise DataError(
            f"{row.origin}: class {digits[:40]}: numbered classes are all those from 0 to the "
            f"highest, but the rows have {len(found)} of them. Number them 0, 1, 2, or name them "
            "by classes"
        )
    return [str(number) for number in range(number)]


def _check_classes(
    rows: Sequence[Row], labels: Iterable[Sequence[str]], *, names: Sequence[str], what: str
) -> None:
    """Refuse labels, some for each row, that are none of the classes' names."""
    raise_problems(
        [
            f"{row.origin}: {what} {label!r} is none of the classes {', '.join(names)}"
            for row, labels_of_row in zip(rows, labels, strict=True)
            for label in labels_of_row
            if label not in names
        ]
    )


def _text_records(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_length: int | None,
    fields: Mapping[str, Tensor],
    meta: Mapping[str, Any] | None = None,
) -> Records:
    """Records of the rows that have a token; ``fields`` are those of all rows [rows]."""
    encoded = _encode_texts(rows, tokenizer, max_length=max_length)
    kept = [at for at, ids in enumerate(encoded["input_ids"]) if ids]
    dropped = tally_missing("no token", kept, total=len(rows))
    kept = rows_with_weight(rows, kept, dropped)
    fields = {name: values[kept] for name, values in fields.items()}

    def whole_length(at: int) -> int:
        return len(_encode_texts([rows[at]], tokenizer, max_length=None)["input_ids"][0])

    lengths = [len(ids) for ids in encoded["input_ids"]]
    return untargeted_records(
        rows,
        encoded,
        kept=kept,
        fields=fields,
        meta=meta,
        dropped=dropped,
        cut=tally_cut(lengths, max_length, whole_length=whole_length),
    )


def _encode_texts(
    rows: Sequence[Row], tokenizer: Any, *, max_length: int | None
) -> Mapping[str, list[list[int]]]:
    """The tokens of each row's ``text`` (and ``text_pair``), or of its ``messages``."""
    options: dict[str, Any] = {"truncation": max_length is not None, "max_length": max_length}
    if any(isinstance(row.values.get("messages"), list) for row in rows):
        check_chat_template(tokenizer)

    def encode(row: Row) -> Mapping[str, list[int]]:
        values = row.values
        outputs: Mapping[str, list[int]]
        if isinstance(values.get("messages"), list):
            text = renderer(tokenizer, None)(read_message_texts(values, "messages"), False)
            text = check_text(text, "messages")
            outputs = tokenizer(text, add_special_tokens=False, **options)
        else:
            outputs = tokenizer(values["text"], values.get("text_pair"), **options)
        return outputs

    encoded: dict[str, list[list[int]]] = {}
    for outputs in map_rows(rows, encode):
        for name, tokens in outputs.items():
            encoded.setdefault(name, []).append(tokens)
    return encoded


def _tagged_words(row: Row) -> tuple[list[str], list[str | None]]:
    words, tags = row.values.get("tokens"), row.values.get("tags")
    if not isinstance(words, list) or not isinstance(tags, list) or not words:
        raise RowError("needs tokens and tags, both lists")
    if len(words) != len(tags):
        raise RowError(f"{len(words)} tokens but {len(tags)} tags")
    for word in words:
        check_text(word, "a token")
    for tag in tags:
        if isinstance(tag, float | list | dict):
            raise RowError(f"a tag must be the name or number of a class, found {shortened(tag)}")
    return words, [None if tag in (None, IGNORE) else _class_name(tag) for tag in tags]


def _token_classes(
    words: Sequence[int | None], tags: Sequence[str | None], *, names: Sequence[str]
) -> Tensor:
    """The class of each token [tokens], int64: its word's if it is the first of it, else IGNORE."""
    classes = []
    for word, before in zip(words, [None, *words[:-1]], strict=True):
        tag = None if word is None or word == before else tags[word]
        classes.append(IGNORE if tag is None else names.index(tag))
    return torch.tensor(classes)
