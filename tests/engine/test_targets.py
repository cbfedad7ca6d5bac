import pytest
import torch

from samestep.data.collate import collate_examples
from samestep.data.examples import Example
from samestep.engine.counts import count_units
from samestep.engine.targets import (
    check_collated_positions,
    num_sequences,
    sequence_ids,
    shifted_targets,
    target_positions,
)
from samestep.errors import StepError

I = -100  # noqa: E741


def test_a_row_alone_loses_its_first_label() -> None:
    actual = shifted_targets({"labels": torch.tensor([[5, 6, I, 7]])})
    assert actual.tolist() == [[6, I, 7, I]]


def test_a_pack_is_cut_where_positions_restart() -> None:
    micro_batch = {
        "labels": torch.tensor([[5, 6, 7, 8, 9]]),
        "position_ids": torch.tensor([[0, 1, 0, 1, 2]]),
    }
    assert shifted_targets(micro_batch).tolist() == [[6, I, 8, 9, I]]
    assert sequence_ids(micro_batch).tolist() == [[0, 0, 1, 1, 1]]


def test_padding_is_never_a_target_nor_predicted_from() -> None:
    labels = torch.tensor([[5, 6, 7], [5, 6, 7]])  # careless: padding keeps its labels
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    actual = shifted_targets({"labels": labels, "attention_mask": mask})
    assert actual.tolist() == [[6, I, I], [I, 7, I]]


def test_left_padded_rows_with_positions_are_one_sequence_each() -> None:
    micro_batch = {
        "labels": torch.tensor([[I, I, 7, 8], [5, 6, 7, 8]]),
        "position_ids": torch.tensor([[0, 0, 0, 1], [0, 1, 2, 3]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
    }
    assert sequence_ids(micro_batch).tolist() == [[0] * 4, [1] * 4]
    assert shifted_targets(micro_batch).tolist() == [[I, I, 8, I], [6, 7, 8, I]]


def test_a_row_that_goes_on_elsewhere_still_starts_a_sequence() -> None:
    micro_batch = {
        "labels": torch.tensor([[5, 6], [7, 8]]),
        "position_ids": torch.tensor([[0, 1], [2, 3]]),
    }
    assert sequence_ids(micro_batch).tolist() == [[0, 0], [1, 1]]


def test_positions_are_those_of_the_targets() -> None:
    micro_batch = {"labels": torch.tensor([[5, 6, I, 7], [I, I, 8, I]])}
    assert target_positions(micro_batch).tolist() == [0, 2, 5]
    assert target_positions({**micro_batch, "target_positions": torch.tensor([1])}).tolist() == [1]


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_what_collate_knows_is_what_the_labels_say(padding: str) -> None:
    ids = torch.arange(4)
    labels = torch.tensor([I, I, 2, 3])
    micro_batch = collate_examples(
        [Example(ids, labels), Example(ids[:3], labels[:3])], padding=padding
    )  # type: ignore[arg-type]
    check_collated_positions(micro_batch)
    asked = {
        k: v
        for k, v in micro_batch.items()
        if k not in ("spans", "target_positions", "cu_seq_lens_q")
    }
    assert target_positions(asked).tolist() == micro_batch["target_positions"].tolist()
    assert num_sequences(asked) == num_sequences(micro_batch) == 2


def test_knowledge_that_does_not_fit_the_labels_is_refused() -> None:
    ids = torch.arange(4)
    micro_batch = collate_examples([Example(ids, ids.clone()), Example(ids, ids.clone())])
    micro_batch["labels"][0, 2] = I
    with pytest.raises(StepError, match="names 6 positions, which are not those"):
        count_units([micro_batch])
    again = collate_examples([Example(ids, ids.clone()), Example(ids, ids.clone())])
    again["spans"] = again["spans"][:1]
    with pytest.raises(StepError, match="spans names 1 sequences"):
        check_collated_positions(again)
