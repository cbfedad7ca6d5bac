"""Preference rows: a prompt and two completions, or one completion that is good or bad."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samestep.data.examples import Example, Examples
from samestep.data.records import Records
from samestep.data.rows import Row, RowError, raise_all, weight_of
from samestep.data.tokenize import tokenize_rows
from samestep.errors import DataError

PAIR_COLUMNS = (
    "accepted columns: prompt, chosen and rejected, all text or all lists of messages; or chosen "
    "and rejected alone, as whole conversations that begin the same. Each row may add weight, "
    "margin, and ref_chosen_logps with ref_rejected_logps"
)

UNPAIRED_COLUMNS = (
    "accepted columns: prompt and completion, both text or both lists of messages, and label, true "
    "or false. Each row may add weight"
)

NUMBERS = ("margin", "ref_chosen_logps", "ref_rejected_logps")
"""Columns of numbers that a row of a pair may add; all rows or none."""


def pair_records(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    append_eos: bool = True,
    cache: Path | None = None,
) -> Records:
    """Tokenise preference rows: records of two sequences, the chosen one first.

    Args:
        rows: At least one, with the columns of ``PAIR_COLUMNS``.
        tokenizer: As for `samestep.data.tokenize.tokenize_rows`.
        max_length: Keep the first so many tokens of each side.
        append_eos: Close completions given as text with the end-of-sequence token.
        cache: A folder to keep tokens in.

    Returns:
        A record for every pair whose two sides differ and both have a target; ``dropped`` counts
        the others by reason. Fields: those of ``NUMBERS`` that the rows have [records], float64.

    Raises:
        DataError: Rows are malformed (lists every one), or none is left.
    """
    numbers = _numbers(rows)
    dropped: Counter[str] = Counter()
    problems, sides, kept = [], [], []
    for at, row in enumerate(rows):
        try:
            chosen, rejected = _sides(row.values)
            weight = weight_of(row.values)
        except RowError as error:
            problems.append(f"{row.origin}: {error}")
            continue
        if reason := _useless(chosen["completion"], rejected["completion"]):
            dropped[reason] += 1
            continue
        for name, side in (("chosen", chosen), ("rejected", rejected)):
            sides.append(Row({**side, "weight": weight}, f"{row.origin} ({name})"))
        kept.append(at)
    raise_all(problems, hint=PAIR_COLUMNS)
    if not sides:
        raise DataError(f"no pair is left to learn from ({_told(dropped)})")
    tokens = tokenize_rows(
        sides, tokenizer, max_length=max_length, append_eos=append_eos, cache=cache
    )
    return _group(tokens, 2, kept, numbers, dropped, "a side has no target after truncation")


def unpaired_records(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    append_eos: bool = True,
    cache: Path | None = None,
) -> Records:
    """Tokenise rows of a completion and whether it is desirable, for KTO.

    A record has two sequences: the row's own, and its prompt with the completion of the next row,
    from which the KL of policy to reference is estimated. The next row is taken of the data set,
    so that the estimate does not depend on how batches are made or cut.

    Args:
        rows: At least two, with the columns of ``UNPAIRED_COLUMNS``.
        tokenizer: As for `pair_records`.
        max_length: As for `pair_records`.
        append_eos: As for `pair_records`.
        cache: As for `pair_records`.

    Returns:
        A record for every row with a target in both sequences. Field: ``label`` [records], bool.

    Raises:
        DataError: Rows are malformed (lists every one), all have the same label, or none is left.
    """
    labels = _labels(rows)
    if len(set(labels)) < 2:
        raise DataError(
            f"every one of the {len(rows)} rows has the label {str(labels[0]).lower()}: KTO needs "
            "desirable and undesirable rows"
        )
    dropped: Counter[str] = Counter()
    kept = [at for at, row in enumerate(rows) if not _empty(row.values["completion"])]
    if len(kept) < len(rows):
        dropped["an empty completion"] = len(rows) - len(kept)
    sequences = []
    for at, after in zip(kept, kept[1:] + kept[:1], strict=True):
        values = {name: rows[at].values.get(name) for name in ("prompt", "weight", "tools")}
        for completion in (at, after):
            both = {**values, "completion": rows[completion].values["completion"]}
            sequences.append(Row(both, rows[at].origin))
    tokens = tokenize_rows(
        sequences, tokenizer, max_length=max_length, append_eos=append_eos, cache=cache
    )
    fields = {"label": torch.tensor(labels)}
    return _group(tokens, 2, kept, fields, dropped, "no target after truncation")


def _sides(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two sides as prompt and completion."""
    chosen, rejected = values.get("chosen"), values.get("rejected")
    prompt = values.get("prompt")
    kinds = {type(side) for side in (chosen, rejected) if side is not None}
    if chosen is None or rejected is None:
        found = ", ".join(name for name, value in values.items() if value is not None)
        raise RowError(f"has no chosen or no rejected; found the columns {found or 'none'}")
    if kinds not in ({str}, {list}) or (prompt is not None and type(prompt) not in kinds):
        shown = ", ".join(
            f"{name} is {type(values[name]).__name__}"
            for name in ("prompt", "chosen", "rejected")
            if values.get(name) is not None
        )
        raise RowError(f"{shown}: all must be text, or all lists of messages")
    if prompt is None:
        if kinds == {str}:
            raise RowError("has no prompt, which chosen and rejected as text need")
        same = 0
        for one, other in zip(chosen, rejected, strict=False):
            if one != other:
                break
            same += 1
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
    common = {"prompt": prompt, "tools": values.get("tools")}
    return {**common, "completion": chosen}, {**common, "completion": rejected}


def _useless(chosen: Any, rejected: Any) -> str | None:
    if chosen == rejected:
        return "chosen and rejected are equal"
    return "an empty side" if _empty(chosen) or _empty(rejected) else None


def _empty(completion: Any) -> bool:
    if isinstance(completion, list):
        return not any(isinstance(m, Mapping) and m.get("content") for m in completion)
    return isinstance(completion, str) and not completion


def _labels(rows: Sequence[Row]) -> list[bool]:
    problems, labels = [], []
    for row in rows:
        try:
            label = _label(row.values)
        except RowError as error:
            problems.append(f"{row.origin}: {error}")
            continue
        labels.append(label)
    raise_all(problems, hint=UNPAIRED_COLUMNS)
    return labels


def _label(values: Mapping[str, Any]) -> bool:
    label = values.get("label")
    if values.get("prompt") is None or values.get("completion") is None:
        found = ", ".join(name for name, value in values.items() if value is not None)
        raise RowError(f"has no prompt or no completion; found the columns {found or 'none'}")
    known = {"true": True, "false": False, "1": True, "0": False}
    text = str(label).strip().lower()
    if text not in known:
        raise RowError(f"label must be true or false, found {label!r}")
    return known[text]


def _numbers(rows: Sequence[Row]) -> dict[str, Tensor]:
    """The columns of numbers, if the rows have them: [rows], float64."""
    found: dict[str, Tensor] = {}
    problems = []
    for name in NUMBERS:
        if all(row.values.get(name) is None for row in rows):
            continue
        numbers = []
        for row in rows:
            try:
                number = float(row.values.get(name, math.nan))
            except (TypeError, ValueError):
                number = math.nan
            if not math.isfinite(number):
                problems.append(
                    f"{row.origin}: {name} must be a finite number, found {row.values.get(name)!r}"
                )
            numbers.append(number)
        found[name] = torch.tensor(numbers, dtype=torch.float64)
    if len(found.keys() & set(NUMBERS[1:])) == 1:
        problems.append("ref_chosen_logps and ref_rejected_logps go together: one is missing")
    raise_all(problems)
    return found


def _group(
    tokens: Examples,
    width: int,
    kept: Sequence[int],
    fields: Mapping[str, Tensor],
    dropped: Counter[str],
    reason: str,
) -> Records:
    """Records of the groups of ``width`` sequences that were all tokenised."""
    groups: dict[int, list[Example]] = {}
    for example in tokens:
        groups.setdefault(example.row // width, []).append(example)
    whole = [group for group, sequences in groups.items() if len(sequences) == width]
    if len(whole) < len(kept):
        dropped[reason] += len(kept) - len(whole)
    if not whole:
        raise DataError(f"no row is left to learn from ({_told(dropped)})")
    rows = [kept[group] for group in whole]
    return Records(
        Examples.from_examples(example for group in whole for example in groups[group]),
        width=width,
        fields={name: field[rows] for name, field in fields.items()},
        dropped=dropped,
    )


def _told(dropped: Mapping[str, int]) -> str:
    return "; ".join(f"{count} rows: {reason}" for reason, count in dropped.items())
