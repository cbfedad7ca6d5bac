"""Records described: what was read of their rows, and one row with its targets marked."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from samestep.data.message_forms import LEARNED_ROLE, count_roles, is_empty_turn, turns_of
from samestep.data.records import Record, Records
from samestep.data.report import CLOSE, OPEN, DataReport, escaped
from samestep.data.row_formats import ROW_FORMATS
from samestep.data.rows import Row, RowTally

_NO_EOS = (
    "append_eos: the tokenizer has no end-of-sequence token, so nothing is put behind texts and "
    "completions, and the model does not learn to stop: set tokenizer to one that has it, or "
    "append_eos to false"
)

_NAMED = 5
"""How many rows are named of each kind."""

_SHOWN = 560
"""Letters of the row that is shown: about eight lines."""


def with_report(
    records: Records,
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    format: str,
    used: Sequence[str] = (),
    append_eos: bool = False,
) -> Records:
    """Records with a report of what was read.

    Args:
        records: What was made of the rows.
        rows: The rows of the source; empty if they are not known.
        tokenizer: What read them, to show one; a processor or None will do.
        format: What the rows are, in words.
        used: The columns that were read, as far as rows have them.
        append_eos: Whether texts were to end with the end-of-sequence token.

    Returns:
        The same records.
    """
    found = list(dict.fromkeys(name for row in rows for name in _columns(row)))
    converted = {row.converted[0] for row in rows if row.converted is not None}
    for name in converted & ROW_FORMATS.keys():
        used = [*used, *ROW_FORMATS[name].columns, *ROW_FORMATS[name].optional]
    if converted:
        used = [*used, *(found if converted - ROW_FORMATS.keys() else [])]
        format = f"{', '.join(sorted(converted))}, read as {format}"
    read = tuple(name for name in found if name in {*used, "weight"})
    missing = {row for at in records.dropped.rows.values() for row in at}
    shown = next((at for at in range(len(rows)) if at not in missing), len(rows))
    ends = not append_eos or getattr(tokenizer, "eos_token_id", None) is not None
    records.report = DataReport(
        format=format,
        rows=len(rows) or len(records),
        kept=len(records),
        used=read,
        ignored=tuple(name for name in found if name not in read),
        notes=tuple(_notes(records, rows)),
        roles=count_roles(rows),
        tokens=len(records.sequences.ids),
        targets=sum(records.sequences.targets),
        remarks=() if ends else (_NO_EOS,),
        shown=rows[shown].origin if shown < len(rows) else "the first row",
        example=_example(records[0], tokenizer=tokenizer),
        by_source=_by_source(records, rows),
    )
    return records


def _by_source(records: Records, rows: Sequence[Row]) -> tuple[int, ...] | None:
    """The records of each source; None if they are not those of one source after another."""
    first = records.first_rows()
    if not rows or max(first, default=0) >= len(rows):
        return None
    sources = [rows[at].source for at in first]
    if sources != sorted(sources):
        return None
    counts = Counter(sources)
    return tuple(counts[number] for number in range(max(row.source for row in rows) + 1))


def _columns(row: Row) -> Sequence[str]:
    if row.converted is not None:
        return row.converted[1]
    return [name for name, value in row.values.items() if value is not None]


def _notes(records: Records, rows: Sequence[Row]) -> Iterator[tuple[str, int, tuple[str, ...]]]:
    tallies = [
        ("dropped: ", records.dropped),
        ("", records.cut or RowTally()),
        ("", _empty(rows)),
    ]
    for before, tally in tallies:
        for reason, number in tally.items():
            at = tally.rows.get(reason, [])
            named = tuple(rows[row].origin for row in at[:_NAMED] if row < len(rows))
            yield f"{before}{reason}", number, named


def _empty(rows: Sequence[Row]) -> RowTally:
    """The rows whose completion, or a turn that is learned, says nothing."""
    empty = RowTally()
    for at, row in enumerate(rows):
        completion = row.values.get("completion")
        if isinstance(completion, str) and not completion.strip():
            empty.add("with an empty completion: only its end is learned", at)
        turns = turns_of(row, "messages") or turns_of(row, "completion")
        if any(turn.get("role") == LEARNED_ROLE and is_empty_turn(turn) for turn in turns):
            empty.add(f"with an empty {LEARNED_ROLE} turn: only its end is learned", at)
    return empty


def _example(record: Record, *, tokenizer: Any) -> tuple[str, ...]:
    """Every sequence of a record, targets marked, long ones shortened."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if tokenizer is None or not any(len(each.input_ids) for each in record.sequences):
        return ()
    room = max(80, _SHOWN // len(record.sequences))
    texts = []
    for sequence in record.sequences:
        is_target = (sequence.labels == sequence.input_ids).tolist()
        is_target[:1] = [False]  # nothing comes before it that it could be predicted from
        pieces = _decoded(sequence.input_ids.tolist(), is_target, tokenizer=tokenizer)
        texts.append(_shortened(pieces, room))
    fields = [
        f"{name}: {value.tolist()}" for name, value in record.fields.items() if value.numel() == 1
    ]
    return (*texts, *([", ".join(fields)] if fields else []))


def _decoded(
    ids: Sequence[int], is_target: Sequence[bool], *, tokenizer: Any
) -> list[tuple[str, bool]]:
    """The text of each run of targets or of others."""
    pieces, end, before = [], 0, ""
    for target, run in groupby(is_target):
        end += len(list(run))
        # From the start each time: a token's text may depend on those before it.
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        pieces.append((escaped(text[len(before) :]), target))
        before = text
    return pieces


def _shortened(pieces: Sequence[tuple[str, bool]], room: int) -> str:
    """The pieces in a text, each cut in the middle to what makes all of them fit."""
    most = max(1, room // 40)
    rest = len(pieces) - most
    pieces = pieces[:most]
    limit = room
    while limit > 30 and sum(min(len(text), limit) for text, _ in pieces) > room:
        limit = limit * 9 // 10
    shown = []
    for text, target in pieces:
        if len(text) > limit:
            text = f"{text[: limit // 2]} ... {text[-(limit // 2) :]}"
        shown.append(f"{OPEN}{text}{CLOSE}" if target else text)
    return "".join(shown) + (" ..." if rest > 0 else "")
