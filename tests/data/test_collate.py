"""Collating: every layout holds the same examples, and counts the same."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from samestep.data.collate import collate_examples, to_device
from samestep.data.examples import Example
from samestep.engine.counts import count_units, input_tokens
from samestep.engine.targets import sequence_ids, shifted_targets


def example(length: int, masked: int, row: int = 0, weight: float = 1.0) -> Example:
    ids = torch.arange(length) + 10 * row
    labels = ids.clone()
    labels[:masked] = -100
    return Example(ids, labels, weight, row)


def test_a_pack_has_no_padding_and_restarts_positions() -> None:
    batch = collate_examples([example(3, 1, row=4), example(2, 0, row=7)])
    assert batch["input_ids"].tolist() == [[40, 41, 42, 70, 71]]
    assert batch["labels"].tolist() == [[-100, 41, 42, 70, 71]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 5]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == 3
    assert batch["example_ids"].tolist() == [4, 7]
    assert "example_weights" not in batch


def test_padding_on_either_side() -> None:
    both = [example(3, 1), example(1, 0)]
    right, left = (collate_examples(both, padding=side, pad_id=9) for side in ("right", "left"))
    assert right["input_ids"].tolist() == [[0, 1, 2], [0, 9, 9]]
    assert left["input_ids"].tolist() == [[0, 1, 2], [9, 9, 0]]
    assert right["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert left["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    assert left["labels"].tolist() == [[-100, 1, 2], [-100, -100, 0]]


def test_the_pad_id_may_be_a_token_of_the_text() -> None:
    one = collate_examples([example(3, 0), example(2, 0)], padding="right", pad_id=1)
    assert count_units([one]) == count_units(
        [collate_examples([example(3, 0), example(2, 0)], padding="right")]
    )


SHAPES = st.lists(
    st.integers(1, 20).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))),
    min_size=1,
    max_size=8,
)


@given(shapes=SHAPES, weighted=st.booleans())
def test_every_layout_holds_the_same(shapes: list[tuple[int, int]], weighted: bool) -> None:
    examples = [
        example(length, masked, row, 0.5 + row if weighted else 1.0)
        for row, (length, masked) in enumerate(shapes)
    ]
    batches = [collate_examples(examples, padding=padding) for padding in ("none", "right", "left")]
    wanted = count_units([collate_examples([one]) for one in examples])
    tokens = []
    for batch in batches:
        assert count_units([batch]) == wanted
        assert input_tokens(batch) == sum(length for length, _ in shapes)
        targets, ids = shifted_targets(batch), sequence_ids(batch)
        chosen = targets != -100
        tokens.append(list(zip(ids[chosen].tolist(), targets[chosen].tolist(), strict=True)))
    assert tokens[0] == tokens[1] == tokens[2]


def test_only_tensors_move() -> None:
    batch = to_device(collate_examples([example(3, 1)]), torch.device("meta"))
    assert batch["input_ids"].is_meta
    assert batch["max_length_q"] == 3
    assert batch["example_ids"].device.type == "cpu"  # read by the CPU alone
