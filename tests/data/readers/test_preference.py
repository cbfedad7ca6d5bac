from typing import Any

import pytest
import torch
from tiny import tiny_tokenizer

from samestep.data.readers.preference import pair_records, unpaired_records
from samestep.data.rows import Row
from samestep.engine.targets import IGNORE
from samestep.errors import DataError


def rows(*values: dict[str, Any]) -> list[Row]:
    return [Row(value, f"rows.jsonl:{number}") for number, value in enumerate(values, 1)]


PAIR = {"prompt": "How many? ", "chosen": "Nine.", "rejected": "Maybe ten, or eleven."}


def targets(records: Any, at: int, side: int) -> str:
    sequence = records[at].sequences[side]
    return str(tiny_tokenizer().decode(sequence.labels[sequence.labels != IGNORE]))


def test_text_pairs() -> None:
    records = pair_records(rows(PAIR, {**PAIR, "weight": 2, "chosen": "9"}), tiny_tokenizer())
    assert [targets(records, 0, side) for side in (0, 1)] == [
        "Nine.<|im_end|>",
        "Maybe ten, or eleven.<|im_end|>",
    ]
    assert [record.sequences[1].weight for record in records] == [1.0, 2.0]
    assert records.lengths[0] == sum(len(one.input_ids) for one in records[0].sequences)
    rows_of = [one.row for record in records for one in record.sequences]
    assert len(set(rows_of)) == 4  # dropout keys of their own


@pytest.mark.parametrize("implicit", [False, True])
def test_chat_pairs_and_the_prompt_inside_both_sides(implicit: bool) -> None:
    user = [{"role": "user", "content": "How many?"}]
    sides = [[{"role": "assistant", "content": text}] for text in ("Nine.", "Ten.")]
    row: dict[str, Any] = {"prompt": user, "chosen": sides[0], "rejected": sides[1]}
    if implicit:
        row = {"chosen": user + sides[0], "rejected": user + sides[1]}
    records = pair_records(rows(row), tiny_tokenizer(chat=True))
    assert [targets(records, 0, side) for side in (0, 1)] == ["Nine.<|im_end|>", "Ten.<|im_end|>"]


def test_useless_pairs_are_dropped_and_counted() -> None:
    long = {**PAIR, "prompt": "How many forks were in the package that Emma bought? " * 3}
    equal, empty = {**PAIR, "rejected": "Nine."}, {**PAIR, "rejected": ""}
    records = pair_records(rows(equal, PAIR, empty, long), tiny_tokenizer(), max_length=24)
    assert len(records) == 1
    assert records.dropped == {
        "chosen and rejected are equal": 1,
        "an empty side": 1,
        "a side has no target after truncation": 1,
    }
    assert targets(records, 0, 0) == "Nine.<|im_end|>"


def test_numbers_stay_with_their_pair() -> None:
    numbers = {"margin": 0.5, "ref_chosen_logps": -3.0, "ref_rejected_logps": -4.0}
    equal = {**PAIR, "rejected": "Nine."}
    given = rows({**equal, **numbers}, {**PAIR, **numbers, "margin": "1.5"})
    records = pair_records(given, tiny_tokenizer())
    assert records.fields["margin"].tolist() == [1.5]
    assert records.fields["ref_rejected_logps"].tolist() == [-4.0]


def test_every_malformed_pair_is_named() -> None:
    with pytest.raises(DataError) as error:
        pair_records(
            rows(
                {"prompt": "a", "chosen": "b"},
                {"prompt": "a", "chosen": "b", "rejected": ["c"]},
                {"chosen": "b", "rejected": "c"},
                {**PAIR, "weight": -1},
            ),
            tiny_tokenizer(),
        )
    message = str(error.value)
    assert "rows.jsonl:1: has no chosen or no rejected; found the columns prompt, chosen" in message
    assert "rows.jsonl:2: prompt is str, chosen is str, rejected is list" in message
    assert "rows.jsonl:3: has no prompt" in message
    assert "rows.jsonl:4: weight must be" in message
    assert "accepted columns" in message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([{**PAIR, "rejected": "Nine."}], "no pair is left .*equal"),
        (
            [{**PAIR, "margin": 1}, PAIR],
            "rows.jsonl:2: margin must be .* None",
        ),
        ([{**PAIR, "ref_chosen_logps": -1}], "go together"),
    ],
)
def test_unusable_data_is_refused(values: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        pair_records(rows(*values), tiny_tokenizer())


GOOD = {"prompt": "How many? ", "completion": "Nine.", "label": True}
BAD = {"prompt": "How old? ", "completion": "No idea.", "label": "false"}


def test_unpaired_rows_bring_the_next_rows_completion() -> None:
    third = {"prompt": "Why? ", "completion": "Because.", "label": 1}
    empty = {**GOOD, "completion": ""}
    records = unpaired_records(rows(GOOD, empty, BAD, third), tiny_tokenizer())
    assert records.fields["label"].tolist() == [True, False, True]
    assert [targets(records, at, 0) for at in range(3)] == [
        f"{text}<|im_end|>" for text in ("Nine.", "No idea.", "Because.")
    ]
    assert [targets(records, at, 1) for at in range(3)] == [
        f"{text}<|im_end|>" for text in ("No idea.", "Because.", "Nine.")
    ]
    prompts = [tiny_tokenizer().decode(one.input_ids)[:4] for one in records[1].sequences]
    assert prompts == ["How ", "How "]
    assert records.dropped == {"an empty completion": 1}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([GOOD, GOOD], "every one of the 2 rows has the label true"),
        ([GOOD, {**BAD, "label": "maybe"}], "rows.jsonl:2: label must be true or false"),
        ([GOOD, {"prompt": "x", "label": 0}], "rows.jsonl:2: has no prompt or no completion"),
    ],
)
def test_unusable_unpaired_rows_are_refused(values: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        unpaired_records(rows(*values), tiny_tokenizer())


def test_derived_fields_do_not_change_the_fingerprint() -> None:
    records = pair_records(rows({**PAIR, "margin": 1}), tiny_tokenizer())
    more = records.with_fields({"ref": torch.ones(1)})
    assert more.fingerprint() == records.fingerprint()
    assert more.fields.keys() == {"margin", "ref"}
    other = pair_records(rows({**PAIR, "margin": 2}), tiny_tokenizer())
    assert other.fingerprint() != records.fingerprint()
