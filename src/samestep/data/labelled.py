"""Texts with a label: a class or a number."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from samestep.data.encoded import each_row, encode_texts, records_of
from samestep.data.load import Row
from samestep.data.problems import RowError, raise_all
from samestep.data.records import Records
from samestep.errors import DataError


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
    names = each_row(rows, lambda row: _class_of(row.values), "text (or messages) and label")
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
    values = each_row(rows, lambda row: _number(row.values), "text (or messages) and label")
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
    return records_of(rows, encoded, kept, fields=fields, meta=meta, dropped=dropped)
