"""Changes to batches of every kind, and what they can be counted by."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchEncoding

from samestep.audit.adapters.batches import (
    add_padding,
    alter_inputs,
    cast_floats,
    copied,
    infer_padding,
    locate_examples,
    mask_boundaries,
    mask_targets,
    possible_denominators,
    real_tokens,
    token_length,
)
from samestep.errors import CheckError

SHORT, LONG = torch.tensor([4, 5]), torch.tensor([1, 2, 3, 9])


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass
class Held:
    x: Tensor


def rows(examples: list[Tensor], *, left: bool = False) -> dict[str, Tensor]:
    side = "left" if left else "right"
    return {
        "input_ids": pad_sequence(examples, batch_first=True, padding_value=7, padding_side=side),
        "labels": pad_sequence(examples, batch_first=True, padding_value=-100, padding_side=side),
    }


@pytest.mark.parametrize(
    "batch",
    [
        {"x": torch.ones(2)},
        [torch.ones(2)],
        (torch.ones(2), 1),
        Pair(torch.ones(2), torch.ones(1)),
        Held(torch.ones(2)),
        BatchEncoding({"x": torch.ones(2)}),
        torch.ones(2),
    ],
)
def test_a_cast_keeps_the_type_of_batch(batch: Any) -> None:
    found = cast_floats(batch, torch.float64)
    assert type(found) is type(batch)
    if isinstance(found, Held):
        found = [found.x]
    values = found.values() if isinstance(found, dict | BatchEncoding) else found
    assert next(iter(values)).dtype == torch.float64


@pytest.mark.parametrize("left", [False, True])
def test_how_a_collator_pads_is_learned_and_repeated(left: bool) -> None:
    padding = infer_padding(rows([SHORT], left=left), rows([LONG, SHORT], left=left))
    assert padding is not None
    assert padding.side == ("left" if left else "right")
    found = add_padding(
        rows([SHORT], left=left), 2, side=padding.side, offset=1, fills=padding.fills
    )
    ids, labels = [4, 5, 8, 8], [4, 5, -100, -100]
    assert found["input_ids"].tolist() == [ids[2:] + ids[:2] if left else ids]
    assert found["labels"].tolist() == [labels[2:] + labels[:2] if left else labels]


def test_a_collator_that_does_not_pad_is_seen() -> None:
    assert infer_padding({"x": torch.ones(1, 3)}, {"x": torch.ones(2, 3)}) is None


def test_places_are_rows_without_padding_or_stretches_of_a_pack() -> None:
    batch = rows([LONG, SHORT])
    assert locate_examples(batch, [4, 2]) == [(0, slice(0, 4)), (1, slice(0, 2))]
    assert locate_examples(batch, [4, 2], side="left") == [
        (0, slice(-4, None)),
        (1, slice(-2, None)),
    ]
    assert locate_examples((torch.ones(2, 6),), [None, None]) == [(0,), (1,)]
    pack = {"input_ids": torch.cat([LONG, SHORT])[None]}
    assert locate_examples(pack, [4, 2]) == [(0, slice(0, 4)), (0, slice(4, 6))]
    with pytest.raises(CheckError, match="cannot be told apart"):
        locate_examples(batch, [4, 2, 2])


def test_masks_reach_the_examples_alone() -> None:
    batch = rows([LONG, SHORT])
    where = locate_examples(batch, [4, 2])
    assert mask_targets(batch, where[:1])["labels"].tolist()[0] == [-100] * 4
    assert mask_targets(batch, where[:1])["labels"].tolist()[1] == [4, 5, -100, -100]
    line = torch.cat([LONG, SHORT])[None]
    pack = {"input_ids": line, "labels": line}
    where = locate_examples(pack, [4, 2])
    assert mask_targets(pack, where[1:])["labels"].tolist() == [[1, 2, 3, 9, -100, -100]]
    assert mask_boundaries(pack, where)["labels"].tolist() == [[-100, 2, 3, 9, -100, 5]]
    with pytest.raises(CheckError, match="no classes"):
        mask_targets({"labels": torch.ones(2)}, [(0,)])


def test_inputs_are_altered_within_their_range_and_nothing_else() -> None:
    batch = rows([LONG, SHORT])
    found = alter_inputs(batch, locate_examples(batch, [4, 2])[:1])
    assert found["input_ids"].tolist() == [[1, 7, 8, 9], [4, 5, 7, 7]]
    assert found["labels"] is batch["labels"]
    x = torch.arange(6.0).view(2, 3)
    assert alter_inputs((x, 1), [(0,)])[0].tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(CheckError, match="no tensor"):
        alter_inputs({"text": "words"}, [(0,)])


def test_everything_that_a_batch_could_be_counted_by_has_a_cause() -> None:
    batch = {**rows([LONG, SHORT]), "weight": torch.tensor([0.5, 2.0])}
    found = possible_denominators(batch)
    assert found["labels"] == ("unshifted-count", 6)
    assert found["elements of labels"] == ("padding-counted", 8)
    assert found["elements of labels[:, 1:]"] == ("padding-counted", 6)
    assert "labels of labels" not in found  # they are the labels
    assert found["sum of weight"] == ("example-weighted", 2.5)


def test_sums_of_marks_are_counts_of_them() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    found = possible_denominators({**rows([LONG, SHORT]), "attention_mask": mask})
    assert found["sum of attention_mask"] == found["non-zeros of attention_mask"]


def test_an_example_is_altered_alike_whatever_its_neighbours_pad_it_to() -> None:
    def altered(batch: Any, padding: Any) -> list[int]:
        found: list[int] = alter_inputs(batch, [real_tokens(batch, 0, padding=padding)])[
            "input_ids"
        ][0].tolist()
        return found

    alone, beside = rows([SHORT]), rows([SHORT, LONG])
    padding = infer_padding(alone, rows([LONG, SHORT]))
    assert altered(alone, padding) == altered(beside, padding)[:2]
    for batch in (alone, beside):
        batch["attention_mask"] = (batch["labels"] != -100).long()
    assert altered(alone, None) == altered(beside, None)[:2]


def test_the_mask_of_a_preference_is_found_by_its_name() -> None:
    ids = torch.tensor([[5, 9, 7, 0, 0], [3, 4, 5, 6, 7]])
    batch = {"chosen_input_ids": ids, "chosen_attention_mask": (ids > 0).long()}
    assert real_tokens(batch, 0, padding=None) == (0, slice(0, 3))


def test_lengths_are_of_tokens() -> None:
    assert token_length(rows([LONG])) == 4
    assert token_length((torch.ones(1, 6), torch.ones(1))) is None
    assert token_length("text") is None


def test_copies_are_deep_and_of_the_same_types() -> None:
    rows = [{"ids": SHORT, "more": (LONG, "text", None)}, Pair(SHORT, LONG)]
    again = copied(rows)
    for tensor in (again[0]["ids"], again[0]["more"][0], *again[1]):
        tensor.zero_()
    assert [int(SHORT[0]), int(LONG[0])] == [4, 1]
    assert isinstance(again[1], Pair)
    assert again[0]["more"][1:] == ("text", None)
