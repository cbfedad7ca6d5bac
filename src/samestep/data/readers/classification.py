"""Rows that are read whole, tokens that are no targets: what labels beside the text need."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from samestep.data.examples import Example, Examples
from samestep.data.records import Records
from samestep.data.rows import Row, RowError, map_rows, raise_all, weight_of
from samestep.engine.targets import IGNORE
from samestep.errors import ConfigError, DataError


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


def label_records(
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
        classes: The names of the classes in order; None: those found, sorted (for numbers, all
            from 0 to the highest).

    Returns:
        Records with the field ``class`` [records], int64, and ``meta["classes"]``.

    Raises:
        DataError: Rows are malformed or have a class that is not among them; lists every one.
    """
    names = map_rows(rows, lambda row: _class_of(row.values), "text (or messages) and label")
    known = list(classes) if classes is not None else all_classes(names)
    outside = [
        f"{row.origin}: label {name!r} is none of the classes {', '.join(known)}"
        for row, name in zip(rows, names, strict=True)
        if name not in known
    ]
    raise_all(outside)
    if len(known) < 2:
        raise DataError(f"every row has the class {known[0]!r}: there is nothing to tell apart")
    return _with_texts(
        rows,
        tokenizer,
        max_length,
        {"class": torch.tensor([known.index(name) for name in names])},
        meta={"classes": known},
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
    values = map_rows(rows, lambda row: _number(row.values), "text (or messages) and label")
    numbers = torch.tensor(values, dtype=torch.float64)
    return _with_texts(rows, tokenizer, max_length, {"value": numbers})


def _class_of(values: Mapping[str, Any]) -> str:
    label = _label(values)
    if isinstance(label, float | list | dict):
        raise RowError(f"label must be the name or the number of a class, found {label!r}")
    return class_name(label)


def _number(values: Mapping[str, Any]) -> float:
    label = _label(values)
    try:
        number = math.nan if isinstance(label, bool) else float(label)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError(f"label must be a finite number, found {label!r}")
    return number


def _label(values: Mapping[str, Any]) -> Any:
    if not isinstance(values.get("text"), str) and not isinstance(values.get("messages"), list):
        found = ", ".join(name for name, value in values.items() if value is not None)
        raise RowError(f"has no text and no messages; found the columns {found or 'none'}")
    if values.get("label") is None:
        raise RowError("has no label")
    return values["label"]


def class_name(label: Any) -> str:
    """The name of a class that is told by its name or its number."""
    if isinstance(label, bool):
        return str(int(label))
    if isinstance(label, int) and label < 0:
        raise RowError(f"label must be at least 0, found {label}")
    return str(label)


def all_classes(names: Sequence[str]) -> list[str]:
    """The classes by the names found: sorted; for numbers, all up to the highest."""
    if all(name.isdigit() for name in names):
        return [str(number) for number in range(max(map(int, names), default=0) + 1)]
    return sorted(set(names))


def _with_texts(
    rows: Sequence[Row],
    tokenizer: Any,
    max_length: int | None,
    fields: Mapping[str, Tensor],
    meta: Mapping[str, Any] | None = None,
) -> Records:
    encoded = encode_texts(rows, tokenizer, max_length)
    kept = [at for at, one in enumerate(encoded["input_ids"]) if one]
    dropped = Counter({"no token": len(rows) - len(kept)})
    fields = {name: values[kept] for name, values in fields.items()}
    return label_records(rows, encoded, kept, fields=fields, meta=meta, dropped=dropped)


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
        max_length: As for `samestep.data.readers.classification.class_records`.
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
    read = map_rows(rows, lambda row: _words(row.values), "tokens and tags")
    found = [tag for _, tags in read for tag in tags if tag is not None]
    known = list(classes) if classes is not None else all_classes(found)
    raise_all(
        [
            f"{row.origin}: tag {tag!r} is none of the classes {', '.join(known)}"
            for row, (_, tags) in zip(rows, read, strict=True)
            for tag in tags
            if tag is not None and tag not in known
        ]
    )
    encoded = tokenizer(
        [words for words, _ in read],
        is_split_into_words=True,
        truncation=max_length is not None,
        max_length=max_length,
    )
    labels = [
        _tags_of_tokens(encoded.word_ids(at), tags, known) for at, (_, tags) in enumerate(read)
    ]
    kept = [at for at, one in enumerate(labels) if bool((one != IGNORE).any())]
    return label_records(
        rows,
        encoded,
        kept,
        token_fields={"classes": torch.cat([labels[at] for at in kept])} if kept else {},
        meta={"classes": known},
        dropped=Counter({"no tag left": len(rows) - len(kept)}),
    )


def _words(values: Mapping[str, Any]) -> tuple[list[str], list[str | None]]:
    words, tags = values.get("tokens"), values.get("tags")
    if not isinstance(words, list) or not isinstance(tags, list) or not words:
        raise RowError("needs tokens and tags, both lists")
    if len(words) != len(tags):
        raise RowError(f"{len(words)} tokens but {len(tags)} tags")
    if not all(isinstance(word, str) for word in words):
        raise RowError("tokens must be text")
    return words, [None if tag in (None, IGNORE) else class_name(tag) for tag in tags]


def _tags_of_tokens(
    words: Sequence[int | None], tags: Sequence[str | None], known: Sequence[str]
) -> Tensor:
    labels = []
    for word, before in zip(words, [None, *words[:-1]], strict=True):
        tag = None if word is None or word == before else tags[word]
        labels.append(IGNORE if tag is None else known.index(tag))
    return torch.tensor(labels)
