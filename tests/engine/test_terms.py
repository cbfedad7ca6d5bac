import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import samestep
from samestep.engine.counts import count_units, input_tokens
from samestep.engine.normalize import divisor, reduce_terms
from samestep.engine.terms import Term, constant
from samestep.errors import ConfigError, StepError

I = -100  # noqa: E741


def micro_batch(*rows: list[int], **others: Any) -> dict[str, Any]:
    return {"labels": torch.tensor(rows), **others}


def test_counts_are_after_the_shift() -> None:
    actual = count_units([micro_batch([5, 6, I, 7], [I, I, I, I]), micro_batch([5, 6, 7, 8])])
    assert actual == {"token": 5.0, "sequence": 2.0, "example": 2.0}


def test_an_example_of_weight_two_counts_twice() -> None:
    heavy = micro_batch([5, 6], [5, 6], example_weights=torch.tensor([2.0, 1.0]))
    assert count_units([heavy]) == {"token": 3.0, "sequence": 3.0, "example": 3.0}
    assert count_units([micro_batch([5, 6], [5, 6], [5, 6])]) == count_units([heavy])


def test_class_labels_count_examples() -> None:
    assert count_units([{"labels": torch.tensor([1, I, 0])}]) == {"example": 2.0}
    weighted = {"labels": torch.tensor([1, 0]), "example_weights": torch.tensor([0.5, 1.0])}
    assert count_units([weighted]) == {"example": 1.5}


def test_counters_add_units_and_replace_default_ones() -> None:
    actual = count_units([micro_batch([5, 6])] * 2, {"pair": lambda _: 3, "token": lambda _: 7})
    assert actual == {"token": 14.0, "sequence": 2.0, "example": 2.0, "pair": 6.0}
    assert count_units([object()], {"pair": lambda _: 3}) == {"pair": 3.0}


@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
def test_a_count_is_finite_and_not_negative(value: float) -> None:
    with pytest.raises(StepError, match=r"'pair'.*micro-batch 0"):
        count_units([object()], {"pair": lambda _: value})


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    cuts=st.lists(st.integers(1, 5), min_size=1, max_size=6),
)
def test_counts_add_up_over_any_partition(lengths: list[int], cuts: list[int]) -> None:
    rows = [[row % 3 - 100 if at % 2 else 7 for at in range(n)] for row, n in enumerate(lengths)]
    whole = count_units([micro_batch(row) for row in rows])
    micro_batches, at, turn = [], 0, 0
    while at < len(rows):
        part = rows[at : at + cuts[turn % len(cuts)]]
        width = max(map(len, part))
        micro_batches.append(micro_batch(*[row + [I] * (width - len(row)) for row in part]))
        at, turn = at + len(part), turn + 1
    assert count_units(micro_batches) == whole


def test_a_unit_that_nobody_counted_is_named_with_its_term() -> None:
    with pytest.raises(StepError, match=r"'margin'.*'pair'.*counted: 'token'"):
        divisor("margin", "pair", counts={"token": 3.0})
    assert divisor("margin", constant(4), counts={}) == 4


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan])
def test_a_constant_is_above_zero(value: float) -> None:
    with pytest.raises(ConfigError, match="above 0"):
        samestep.constant(value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total": 1.0}, "must be a tensor"),
        ({"total": torch.ones(2, 2)}, "0-d or"),
        ({"total": torch.ones(()), "unit": 3}, "a name or constant"),
        ({"total": torch.ones(()), "weight": math.nan}, "weight must be finite"),
    ],
)
def test_terms_refuse_what_they_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Term(**arguments)


@pytest.mark.parametrize("loss", [torch.ones(()), {}, {"a": torch.ones(())}, None])
def test_a_loss_without_units_is_refused(loss: Any) -> None:
    with pytest.raises(StepError, match="Term"):
        reduce_terms(loss, micro_batch([5, 6]), normalize="token")


def test_totals_by_sequence_take_weights_and_normalisation() -> None:
    batch = micro_batch([5, 6, 7], [5, 6, I], example_weights=torch.tensor([2.0, 1.0]))
    loss = Term(torch.tensor([4.0, 3.0]))
    assert float(reduce_terms(loss, batch, normalize="token")["loss"].total) == 11
    by_sequence = reduce_terms(loss, batch, normalize="sequence")["loss"]
    assert (float(by_sequence.total), by_sequence.unit) == (2 * 4 / 2 + 3 / 1, "sequence")


def test_totals_that_cannot_be_normalised_are_refused() -> None:
    with pytest.raises(StepError, match="total for each sequence"):
        reduce_terms(Term(torch.ones(())), micro_batch([5, 6]), normalize="sequence")
    with pytest.raises(StepError, match="3 totals for 1 sequences"):
        reduce_terms(Term(torch.ones(3)), micro_batch([5, 6]), normalize="token")
    with pytest.raises(ConfigError, match="one weight a sequence"):
        count_units([micro_batch([5, 6], example_weights=torch.ones(2))])


def test_target_weights_share_a_sequence_out() -> None:
    batch = micro_batch([5, 6, 7], [5, 6, I])
    assert samestep.target_weights(batch, "token").tolist() == [[1, 1, 0], [1, 0, 0]]
    assert samestep.target_weights(batch, "sequence").tolist() == [[0.5, 0.5, 0], [1, 0, 0]]
    with pytest.raises(ConfigError, match="normalize='pair'"):
        samestep.target_weights(batch, "pair")


def test_tokens_have_weights() -> None:
    weights = torch.tensor([[9.0, 0.5, 2.0], [9.0, 3.0, 9.0]])
    batch = micro_batch([5, 6, 7], [5, 6, I], token_weights=weights)
    assert samestep.target_weights(batch, "token").tolist() == [[0.5, 2, 0], [3, 0, 0]]
    assert samestep.target_weights(batch, "sequence").tolist() == [[0.2, 0.8, 0], [1, 0, 0]]
    assert count_units([batch])["token"] == 5.5
    with pytest.raises(StepError, match="the micro-batch weighs tokens"):
        reduce_terms(Term(torch.ones(2)), batch, normalize="token")
    with pytest.raises(ConfigError, match="token_weights has shape"):
        count_units([micro_batch([5, 6], token_weights=torch.ones(3))])


def test_input_tokens_leave_padding_out() -> None:
    ids = torch.ones(2, 3)
    assert input_tokens({"input_ids": ids}) == 6
    assert input_tokens({"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0]])}) == 2
    assert input_tokens(object()) == 0
