"""What is counted of a micro-batch on a device: the data on the CPU, while it is their copy."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import ragged

from samestep.data.collate import collate_examples, to_device
from samestep.engine.counts import count_units, input_tokens
from samestep.engine.cut import Halves, cut_in_two
from samestep.engine.device_copy import DeviceCopy, data_of
from samestep.engine.targets import IGNORE, class_positions


def on_cpu() -> dict[str, Any]:
    micro = collate_examples(ragged(6), padding="right")
    return {**micro, "fields": {"margin": torch.arange(6.0)}}


def copied() -> DeviceCopy:
    """Onto the same device, so that both can be read; apart in memory, as on another."""
    data = on_cpu()
    fields = {"margin": data["fields"]["margin"].clone()}
    tensors = {name: value.clone() for name, value in data.items() if torch.is_tensor(value)}
    return DeviceCopy({**data, **tensors, "fields": fields}, data)


def test_it_holds_what_its_data_hold() -> None:
    data = on_cpu()
    micro = to_device(data, torch.device("cpu"))
    assert data_of(micro) is data
    assert data_of(to_device(micro, torch.device("meta"))) is data
    assert count_units([micro]) == count_units([data])
    assert input_tokens(micro) == input_tokens(data)


def no_targets(micro: Any) -> None:
    micro["labels"] = torch.full_like(micro["labels"], IGNORE)


def first_row_in_place(micro: Any) -> None:
    micro["labels"][0] = IGNORE


def another_weight(micro: Any) -> None:
    micro["example_weights"] = torch.arange(6.0).double()


def less_padding(micro: Any) -> None:
    del micro["attention_mask"]


def other_fields(micro: Any) -> None:
    micro["fields"] = {"margin": torch.ones(6)}


def fields_in_place(micro: Any) -> None:
    micro["fields"]["margin"].zero_()


@pytest.mark.parametrize(
    "change",
    [
        *(no_targets, first_row_in_place, another_weight),
        *(less_padding, other_fields, fields_in_place),
    ],
)
def test_what_was_changed_is_counted_as_it_is(change: Callable[[Any], None]) -> None:
    def counts(micro: Any) -> Any:
        for name in ("target_positions", "spans"):  # else labels that were changed are refused
            micro.pop(name, None)
        counters = {"margin": lambda each: float(each["fields"]["margin"].sum())}
        return count_units([micro], counters), input_tokens(micro)

    micro, plain = copied(), dict(on_cpu())
    change(micro)
    assert data_of(micro) is micro
    change(plain)
    assert counts(micro) == counts(plain)
    assert counts(micro) != counts(on_cpu())


def test_what_is_made_of_it_is_no_copy_of_the_data() -> None:
    micro = copied()
    remade = type(micro)(dict(micro))
    for other in ({**micro}, dict(micro), micro.copy(), copy.copy(micro), micro | {}, remade):
        assert data_of(other) is other
    halves = cut_in_two(micro, fits=lambda _: True)
    assert isinstance(halves, Halves)
    own = [count_units([part])["token"] for part in halves.parts]
    assert all(own)
    assert sum(own) == count_units([micro])["token"]


@pytest.mark.parametrize("number", [0, 1, 5])
def test_classes_are_found_without_asking_how_many(number: int) -> None:
    classes = torch.full((3, 7), IGNORE)
    classes.view(-1)[torch.randperm(21)[:number]] = 4
    data = {"fields": {"classes": classes}}
    wanted = (classes.flatten() != IGNORE).nonzero().squeeze(1)
    assert class_positions(to_device(data, torch.device("cpu")), "classes").equal(wanted)
    assert class_positions(data, "classes").equal(wanted)
