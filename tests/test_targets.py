import torch

from samestep.targets import sequence_ids, shifted_targets

I = -100  # noqa: E741


def test_a_row_alone_loses_its_first_label() -> None:
    found = shifted_targets({"labels": torch.tensor([[5, 6, I, 7]])})
    assert found.tolist() == [[6, I, 7, I]]


def test_a_pack_is_cut_where_positions_restart() -> None:
    micro = {
        "labels": torch.tensor([[5, 6, 7, 8, 9]]),
        "position_ids": torch.tensor([[0, 1, 0, 1, 2]]),
    }
    assert shifted_targets(micro).tolist() == [[6, I, 8, 9, I]]
    assert sequence_ids(micro).tolist() == [[0, 0, 1, 1, 1]]


def test_padding_is_never_a_target_nor_predicted_from() -> None:
    labels = torch.tensor([[5, 6, 7], [5, 6, 7]])  # careless: padding keeps its labels
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    found = shifted_targets({"labels": labels, "attention_mask": mask})
    assert found.tolist() == [[6, I, I], [I, 7, I]]


def test_left_padded_rows_with_positions_are_one_sequence_each() -> None:
    micro = {
        "labels": torch.tensor([[I, I, 7, 8], [5, 6, 7, 8]]),
        "position_ids": torch.tensor([[0, 0, 0, 1], [0, 1, 2, 3]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
    }
    assert sequence_ids(micro).tolist() == [[0] * 4, [1] * 4]
    assert shifted_targets(micro).tolist() == [[I, I, 8, I], [6, 7, 8, I]]


def test_a_row_that_goes_on_elsewhere_still_starts_a_sequence() -> None:
    micro = {
        "labels": torch.tensor([[5, 6], [7, 8]]),
        "position_ids": torch.tensor([[0, 1], [2, 3]]),
    }
    assert sequence_ids(micro).tolist() == [[0, 0], [1, 1]]
