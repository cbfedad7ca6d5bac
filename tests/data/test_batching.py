"""The plan: pure functions that lose no example and repeat none."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samestep.data import batching
from samestep.data.batching import (
    epoch_batches,
    num_steps,
    pack_micro_batches,
    padding_share,
    plan_steps,
    shuffled_indices,
)
from samestep.errors import ConfigError

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=50)


@given(size=st.integers(1, 300), seed=st.integers(0, 2**40), epoch=st.integers(0, 99))
def test_the_order_is_a_permutation_of_seed_and_epoch_alone(
    size: int, seed: int, epoch: int
) -> None:
    one = shuffled_indices(size, seed=seed, epoch=epoch)
    assert sorted(one) == list(range(size))
    assert one == shuffled_indices(size, seed=seed, epoch=epoch)


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(shuffled_indices(50, seed=s, epoch=e)) for s in range(3) for e in range(3)}
    assert len(orders) == 9


@given(lengths=LENGTHS, batch_size=st.integers(1, 60))
def test_batches_of_examples(lengths: list[int], batch_size: int) -> None:
    epoch = shuffled_indices(len(lengths), seed=1, epoch=0)
    batches = epoch_batches(epoch, lengths, batch_size=batch_size)
    assert list(itertools.chain(*batches)) == epoch
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch_size


@given(lengths=LENGTHS, batch_tokens=st.integers(1, 200))
def test_batches_of_tokens(lengths: list[int], batch_tokens: int) -> None:
    epoch = shuffled_indices(len(lengths), seed=1, epoch=0)
    batches = epoch_batches(epoch, lengths, batch_tokens=batch_tokens)
    assert list(itertools.chain(*batches)) == epoch
    sums = [sum(lengths[one] for one in batch) for batch in batches]
    for batch, total in zip(batches, sums, strict=True):
        assert total <= batch_tokens or len(batch) == 1
    for at in range(len(batches) - 1):  # no batch is cut too early
        assert sums[at] + lengths[batches[at + 1][0]] > batch_tokens


@given(lengths=LENGTHS, micro_batch=st.integers(1, 60))
def test_micro_batches_of_sequences_keep_the_order(lengths: list[int], micro_batch: int) -> None:
    cut = pack_micro_batches(lengths, micro_batch=micro_batch)
    assert list(itertools.chain(*cut)) == list(range(len(lengths)))
    assert all(len(micro) == micro_batch for micro in cut[:-1])


@given(lengths=LENGTHS, budget=st.integers(1, 200), padded=st.booleans())
def test_micro_batches_of_tokens_keep_the_budget(
    lengths: list[int], budget: int, padded: bool
) -> None:
    cut = pack_micro_batches(lengths, micro_tokens=budget, padded=padded)
    assert sorted(itertools.chain(*cut)) == list(range(len(lengths)))
    for micro in cut:
        sizes = [lengths[position] for position in micro]
        cost = max(sizes) * len(sizes) if padded else sum(sizes)
        assert cost <= budget or len(micro) == 1
    if not padded:  # as few as first-fit decreasing makes, and none larger
        packed = first_fit_decreasing(lengths, budget)
        assert len(cut) == len(packed)
        assert max(sum(lengths[at] for at in micro) for micro in cut) <= max(packed)


def first_fit_decreasing(lengths: list[int], budget: int) -> list[int]:
    """The loads of the bins, from the definition."""
    loads: list[int] = []
    for length in sorted(lengths, reverse=True):
        for at, load in enumerate(loads):
            if load + length <= budget:
                loads[at] += length
                break
        else:
            loads.append(length)
    return loads


def test_micro_batches_are_alike_where_they_can_be() -> None:
    lengths = [4] * 10
    cut = pack_micro_batches(lengths, micro_tokens=16)  # first fit: four, four, two
    assert sorted(len(micro) for micro in cut) == [3, 3, 4]
    lengths = [9, 20, 3]  # one is longer than the budget: it runs alone
    assert sorted(pack_micro_batches(lengths, micro_tokens=12)) == [[0, 2], [1]]


def test_packs_depend_on_lengths_and_budget_alone() -> None:
    lengths = [5, 9, 3, 9, 1, 7]
    assert pack_micro_batches(lengths, micro_tokens=12) == pack_micro_batches(
        lengths, micro_tokens=12
    )
    assert pack_micro_batches(lengths, micro_tokens=12) == [[1, 2], [5, 0], [3, 4]]


SIZES = st.sampled_from(["batch_size", "batch_tokens"])


@given(lengths=LENGTHS, kind=SIZES, size=st.integers(1, 90), start=st.integers(0, 12))
def test_a_resumed_plan_is_the_tail_of_the_whole(
    lengths: list[int], kind: str, size: int, start: int
) -> None:
    def steps(start: int, number: int) -> list[Any]:
        plans = plan_steps(lengths, seed=3, start=start, **{kind: size})
        return list(itertools.islice(plans, number))

    assert steps(start, 4) == steps(0, start + 4)[start:]


@given(lengths=LENGTHS, kind=SIZES, size=st.integers(1, 90), epochs=st.integers(1, 3))
def test_the_steps_of_a_run_are_counted_without_walking_it(
    lengths: list[int], kind: str, size: int, epochs: int
) -> None:
    plans = plan_steps(lengths, seed=3, **{kind: size})
    walked = sum(1 for _ in itertools.takewhile(lambda plan: plan.epoch < epochs, plans))
    assert num_steps(lengths, seed=3, epochs=epochs, **{kind: size}) == walked


def test_resuming_a_long_run_draws_one_order_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    right = batching._permutation

    def counted(size: int, *, seed: int, epoch: int) -> Any:
        drawn.append(epoch)
        return right(size, seed=seed, epoch=epoch)

    monkeypatch.setattr(batching, "_permutation", counted)
    found = next(plan_steps([1] * 1000, seed=0, batch_size=10, start=10**6 + 7))
    assert (found.step, found.epoch, drawn) == (10**6 + 7, 10**4, [10**4])


def test_progress_counts_epochs() -> None:
    plans = plan_steps([1] * 5, seed=0, batch_size=2)
    found = [(p.step, p.epoch, p.progress, len(p.examples)) for p in itertools.islice(plans, 4)]
    assert found == [(0, 0, 0.4, 2), (1, 0, 0.8, 2), (2, 0, 1.0, 1), (3, 1, 1.4, 2)]


@pytest.mark.parametrize("given_", [{}, {"batch_size": 2, "batch_tokens": 2}, {"batch_size": 0}])
def test_exactly_one_batch_size(given_: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="exactly one"):
        epoch_batches([0], [1], **given_)


@pytest.mark.parametrize("given_", [{}, {"micro_batch": 2, "micro_tokens": 2}, {"micro_tokens": 0}])
def test_exactly_one_micro_batch_size(given_: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="exactly one"):
        pack_micro_batches([1], **given_)


def test_the_share_of_padding() -> None:
    assert padding_share([4, 2, 3], [[0, 1], [2]]) == pytest.approx(2 / 11)
    assert padding_share([4, 2, 3], [[0], [1], [2]]) == 0


@given(lengths=LENGTHS, micro_tokens=st.integers(1, 200), padded=st.booleans())
def test_the_largest_micro_batch_comes_first(
    lengths: list[int], micro_tokens: int, padded: bool
) -> None:
    cut = pack_micro_batches(lengths, micro_tokens=micro_tokens, padded=padded)
    held = [[lengths[one] for one in micro] for micro in cut]
    sizes = [len(one) * max(one) if padded else sum(one) for one in held]
    assert sizes == sorted(sizes, reverse=True)
