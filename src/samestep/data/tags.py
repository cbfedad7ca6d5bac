"""Words with a tag each."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from samestep.data.encoded import each_row, records_of
from samestep.data.labelled import all_classes, class_name
from samestep.data.load import Row
from samestep.data.problems import RowError, raise_all
from samestep.data.records import Records
from samestep.errors import ConfigError
from samestep.targets import IGNORE


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
        max_length: As for `samestep.data.labelled.class_records`.
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
    read = each_row(rows, lambda row: _words(row.values), "tokens and tags")
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
    return records_of(
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
