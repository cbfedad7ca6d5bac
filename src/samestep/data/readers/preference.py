"""Preference rows: a prompt and two completions, or one completion that is good or bad."""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samestep.data.collate import Padding, collate_examples, collate_records
from samestep.data.examples import Example, Examples
from samestep.data.message_forms import begins_with, is_empty_turn
from samestep.data.records import Record, Records
from samestep.data.rows import (
    WEIGHS_NOTHING,
    Row,
    RowDropped,
    RowError,
    RowTally,
    describe_columns,
    describe_dropped,
    iter_rows,
    map_rows,
    read_number,
    read_weight,
    rows_with_weight,
    tally_missing,
)
from samestep.data.tokenize import tokenize_rows
from samestep.errors import DataError

_PAIR_COLUMNS = (
    "accepted columns: prompt, chosen and rejected, all text or all lists of messages; or chosen "
    "and rejected alone, as whole conversations that begin the same. Each row may add weight, "
    "margin, and ref_chosen_logps with ref_rejected_logps"
)

_UNPAIRED_COLUMNS = (
    "accepted columns: prompt and completion, both text or both lists of messages, and label, true "
    "or false. Each row may add weight"
)

_NUMBER_COLUMNS = ("margin", "ref_chosen_logps", "ref_rejected_logps")
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
        rows: At least one, with ``prompt``, ``chosen`` and ``rejected``, all text or all lists of
            messages; or ``chosen`` and ``rejected`` alone, as conversations that begin the same.
            Each may add ``weight``, ``margin``, and ``ref_chosen_logps`` with
            ``ref_rejected_logps``.
        tokenizer: As for `samestep.data.tokenize.tokenize_rows`.
        max_length: Keep the first so many tokens of each side.
        append_eos: Close completions given as text with the end-of-sequence token.
        cache: A folder to keep tokens in.

    Returns:
        A record for every pair whose two sides differ and both have a target; ``dropped`` counts
        the others by reason. Fields: ``margin``, and
        ``ref_chosen_logps`` with ``ref_rejected_logps`` (in nats), if the rows have them
        [records], float64.

    Raises:
        DataError: Rows are malformed (lists every one), or none is left.
    """
    numbers = _pair_numbers(rows)
    if _prompts_repeat(rows):
        rows = [_without_prompt(row) for row in rows]
    dropped = RowTally()
    sides: list[Row] = []

    def read_pair(at: int, row: Row) -> None:
        chosen, rejected = _sides(row.values)
        weight = read_weight(row.values)
        if not weight:
            raise RowDropped(WEIGHS_NOTHING)
        if reason := _nothing_to_learn(chosen["completion"], rejected["completion"]):
            raise RowDropped(reason)
        for name, side in (("chosen", chosen), ("rejected", rejected)):
            sides.append(Row({**side, "weight": weight}, f"{row.origin} ({name})"))

    kept = [at for at, _ in iter_rows(rows, read_pair, hint=_PAIR_COLUMNS, dropped=dropped)]
    if not sides:
        raise DataError(f"no pair is left to learn from ({describe_dropped(dropped)})")
    tokens = tokenize_rows(
        sides, tokenizer, max_length=max_length, append_eos=append_eos, cache=cache
    )
    return _records_of_two(
        tokens,
        kept=kept,
        fields=numbers,
        dropped=dropped,
        reason="a side has no target after truncation",
    )


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
    from which the KL of policy to reference is estimated. The next row is that of the data set, so
    that the estimate does not depend on how batches are made or divided.

    Args:
        rows: At least two, with ``prompt`` and ``completion``, both text or both lists of messages,
            and ``label``, true or false. Each may add ``weight``.
        tokenizer: As for `pair_records`.
        max_length: As for `pair_records`.
        append_eos: As for `pair_records`.
        cache: As for `pair_records`.

    Returns:
        A record for every row with a target in both sequences. Field: ``label`` [records], bool.

    Raises:
        DataError: Rows are malformed (lists every one), all have the same label, or none is left.
    """
    labels = map_rows(rows, _desirable, hint=_UNPAIRED_COLUMNS)
    if len(set(labels)) < 2:
        raise DataError(
            f"every one of the {len(rows)} rows has the label {str(labels[0]).lower()}: KTO needs "
            "desirable and undesirable rows"
        )
    kept = [at for at, row in enumerate(rows) if not _is_empty(row.values["completion"])]
    dropped = tally_missing("an empty completion", kept, total=len(rows))
    kept = rows_with_weight(rows, kept, dropped)
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
    return _records_of_two(
        tokens, kept=kept, fields=fields, dropped=dropped, reason="no target after truncation"
    )


def _sides(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two sides as prompt and completion, the prompt once."""
    chosen, rejected = (_as_messages(values.get(name)) for name in ("chosen", "rejected"))
    prompt = values.get("prompt")
    if isinstance(prompt, str) and isinstance(chosen, list) and isinstance(rejected, list):
        prompt, chosen, rejected = _with_question(prompt, chosen, rejected)
    kinds = {type(side) for side in (chosen, rejected) if side is not None}
    if chosen is None or rejected is None:
        raise RowError(f"has no chosen or no rejected; {describe_columns(values)}")
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
        same = _shared(chosen, rejected)
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
    elif isinstance(prompt, list) and all(begins_with(s, prompt) for s in (chosen, rejected)):
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    common = {"prompt": prompt, "tools": values.get("tools")}
    return {**common, "completion": chosen}, {**common, "completion": rejected}


def _as_messages(side: Any) -> Any:
    return [side] if isinstance(side, Mapping) else side


def _with_question(
    prompt: str, chosen: list[Any], rejected: list[Any]
) -> tuple[list[Any], list[Any], list[Any]]:
    """Prompt and sides of a prompt that is text beside sides that are messages (UltraFeedback)."""
    same = _shared(chosen, rejected)
    begin = chosen[:same]
    asked = any(isinstance(m, Mapping) and m.get("role") == "user" for m in begin)
    question = [] if asked else [{"role": "user", "content": prompt}]
    return [*begin, *question], chosen[same:], rejected[same:]


def _shared(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """How many messages both sides begin with."""
    pairs = zip(chosen, rejected, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _prompts_repeat(rows: Sequence[Row]) -> bool:
    """Whether every row's prompt, which is text of some words, stands again before both sides."""

    def repeats(values: Mapping[str, Any]) -> bool:
        prompt, *sides = (values.get(name) for name in ("prompt", "chosen", "rejected"))
        return (
            isinstance(prompt, str)
            and len(prompt.split()) > 1
            and all(isinstance(side, str) and side.startswith(prompt) for side in sides)
        )

    return all(repeats(row.values) for row in rows)


def _without_prompt(row: Row) -> Row:
    start = len(row.values["prompt"])
    return row.with_values({name: row.values[name][start:] for name in ("chosen", "rejected")})


def _nothing_to_learn(chosen: Any, rejected: Any) -> str | None:
    """Why a pair teaches nothing, or None."""
    if chosen == rejected:
        return "chosen and rejected are equal"
    return "an empty side" if _is_empty(chosen) or _is_empty(rejected) else None


def _is_empty(completion: Any) -> bool:
    if isinstance(completion, list):
        return all(is_empty_turn(message) for message in completion)
    return isinstance(completion, str) and not completion


def _desirable(row: Row) -> bool:
    """The label of a row."""
    label = row.values.get("label")
    if row.values.get("prompt") is None or row.values.get("completion") is None:
        raise RowError(f"has no prompt or no completion; {describe_columns(row.values)}")
    labels = {"true": True, "false": False, "1": True, "0": False}
    text = str(label).strip().lower()
    if text not in labels:
        raise RowError(f"label must be true or false, found {label!r}")
    return labels[text]


def _pair_numbers(rows: Sequence[Row]) -> dict[str, Tensor]:
    """The columns of numbers that the rows have: [rows], float64."""
    names = [
        name for name in _NUMBER_COLUMNS if any(row.values.get(name) is not None for row in rows)
    ]
    numbers = map_rows(rows, lambda row: [read_number(row.values, name) for name in names])
    if len(set(names) & {"ref_chosen_logps", "ref_rejected_logps"}) == 1:
        raise DataError("ref_chosen_logps and ref_rejected_logps go together: one is missing")
    columns = torch.tensor(numbers, dtype=torch.float64).view(len(rows), len(names))
    return dict(zip(names, columns.unbind(1), strict=True))


def _records_of_two(
    tokens: Examples,
    *,
    kept: Sequence[int],
    fields: Mapping[str, Tensor],
    dropped: RowTally,
    reason: str,
) -> Records:
    """Records of two neighbouring rows each, where both of them have a target.

    Args:
        tokens: Of the two rows of each of ``kept``.
        kept: The source row of each record.
        fields: By source row [rows].
        dropped: Counts those of which a row has no target.
        reason: What it counts them under.
    """
    pairs: dict[int, list[Example]] = {}
    for example in tokens:
        pairs.setdefault(example.row // 2, []).append(example)
    complete = [at for at, sequences in pairs.items() if len(sequences) == 2]
    for at in sorted(set(range(len(kept))) - set(complete)):
        dropped.add(reason, kept[at])
    cut = RowTally()
    if tokens.cut is not None:
        cut.add_all(tokens.cut, [row for row in kept for _ in range(2)])
    if not complete:
        raise DataError(f"no row is left to learn from ({describe_dropped(dropped)})")
    rows = [kept[at] for at in complete]
    return Records(
        Examples.from_examples(example for at in complete for example in pairs[at]),
        width=2,
        fields={name: field[rows] for name, field in fields.items()},
        dropped=dropped,
        cut=cut,
    )


def collate_unpaired(
    records: Sequence[Record], *, padding: Padding = "none", pad_id: int = 0
) -> dict[str, Any]:
    """One micro-batch of records of `unpaired_records`.

    Args:
        records: At least one.
        padding: As for `samestep.data.collate.collate_examples`.
        pad_id: As for `collate_examples`.

    Returns:
        A micro-batch of the rows' own sequences with their fields; ``mismatched`` is another, of
        their prompts with the completion of the next row.
    """
    own = [Record(record.sequences[:1], record.fields) for record in records]
    mismatched = [record.sequences[1] for record in records]
    return {
        **collate_records(own, padding=padding, pad_id=pad_id),
        "mismatched": collate_examples(mismatched, padding=padding, pad_id=pad_id),
    }
