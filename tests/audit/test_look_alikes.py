"""Loops whose evidence fits two names: the right one is named, or neither."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from samestep.audit.axes.axis import AxisResult
from samestep.audit.check import check

VOCABULARY = 23
LENGTHS = (9, 4, 14, 6, 11, 5, 7, 12)


class Reader(nn.Module):
    """Sees the two tokens before each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.near = nn.Conv1d(8, 8, 3)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        before = functional.pad(self.embed(ids).transpose(1, 2), (2, 0))
        return self.head(torch.tanh(self.near(before)).transpose(1, 2))


def rows() -> list[Tensor]:
    draw = torch.Generator().manual_seed(5)
    return [torch.randint(1, VOCABULARY, (length,), generator=draw) for length in LENGTHS]


def collate(examples: list[Tensor]) -> dict[str, Tensor]:
    pad = nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(examples, batch_first=True),
        "labels": pad(examples, batch_first=True, padding_value=-100),
        "attention_mask": pad([torch.ones_like(row) for row in examples], batch_first=True),
    }


def total_loss(model: nn.Module, micro: dict[str, Tensor]) -> Tensor:
    logits, labels = model(micro["input_ids"])[:, :-1], micro["labels"][:, 1:]
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def num_targets(micro: dict[str, Tensor]) -> int:
    return int((micro["labels"][:, 1:] != -100).sum())


def subject(**names: Any) -> dict[str, Any]:
    return {"model": Reader, "examples": rows(), "collate": collate, **names}


def micro_batch_axis(**names: Any) -> AxisResult:
    return check(subject(**names), ["micro-batch"]).axes[0]


def weighted(count: Callable[[dict[str, Tensor]], Tensor | int]) -> Callable[..., None]:
    """Means over targets, weighted by what is counted."""

    def step(model: nn.Module, micro_batches: list[dict[str, Tensor]]) -> None:
        whole = sum(count(micro) for micro in micro_batches)
        for micro in micro_batches:
            share = count(micro) / whole
            (total_loss(model, micro) / num_targets(micro) * share).backward()

    return step


@pytest.mark.parametrize(
    ("count", "cause"),
    [
        (lambda micro: micro["attention_mask"].sum(), "padding-counted"),
        (lambda micro: (micro["labels"] != -100).sum(), "unshifted-count"),
    ],
)
def test_counts_that_are_equal_in_the_users_rows_are_told_apart(
    count: Callable[..., Any], cause: str
) -> None:
    assert micro_batch_axis(step=weighted(count)).cause == cause


def test_of_two_names_that_nothing_parts_none_is_given() -> None:
    every = weighted(lambda micro: micro["attention_mask"].sum())

    def step(model: nn.Module, micro_batches: list[dict[str, Tensor]]) -> None:
        for micro in micro_batches:  # so no example can lose its labels
            assert bool((micro["labels"] != -100).any(1).all())
        every(model, micro_batches)

    axis = micro_batch_axis(step=step)
    assert axis.cause == "unexplained"
    assert "unshifted-count (weighted by labels) and padding-counted" in axis.evidence


@pytest.mark.parametrize("window", [8, 16])
def test_a_sum_of_own_gradients_whose_whole_is_weighted_too_is_no_unscaled_sum(window: int) -> None:
    def step(model: nn.Module, micro_batches: list[dict[str, Tensor]]) -> None:
        for micro in micro_batches:
            mean = total_loss(model, micro) / num_targets(micro)
            (mean * len(micro["labels"]) / window).backward()

    assert micro_batch_axis(step=step).cause == "example-weighted"


def test_means_that_are_added_up_are_still_an_unscaled_sum() -> None:
    def step(model: nn.Module, micro_batches: list[dict[str, Tensor]]) -> None:
        for micro in micro_batches:
            (total_loss(model, micro) / num_targets(micro)).backward()

    assert micro_batch_axis(step=step).cause == "unscaled-sum"


def by_hand(between: bool) -> Callable[..., None]:
    """Descent by hand, with decay once a micro-batch: at each, or at the end for all."""

    def train(model: nn.Module, micro_batches: list[dict[str, Tensor]]) -> None:
        count = sum(map(num_targets, micro_batches))
        for micro in micro_batches:
            (total_loss(model, micro) / count).backward()
            if between:
                shrink(model, 0.9)
        if not between:
            shrink(model, 0.9 ** len(micro_batches))
        with torch.no_grad():
            for weight in model.parameters():
                weight -= 0.1 * weight.grad

    return train


def shrink(model: nn.Module, factor: float) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            weight *= factor


@pytest.mark.parametrize("between", [True, False])
def test_weights_that_move_without_a_gradient_are_told_from_wrong_gradients(between: bool) -> None:
    axis = micro_batch_axis(train=by_hand(between))
    assert axis.cause == "state-per-micro-batch"


def test_rows_cut_by_the_width_of_their_batch_are_not_called_padding_that_is_seen() -> None:
    def step(model: nn.Module, micro_batches: list[dict[str, Tensor]]) -> None:
        count = sum(map(num_targets, micro_batches))
        for micro in micro_batches:
            kept = micro["labels"].clone()
            kept[:, 1 + 2 * kept.shape[1] // 3 :] = -100
            (total_loss(model, {**micro, "labels": kept}) / count).backward()

    assert micro_batch_axis(step=step).cause == "dropped-examples"


def flattened(examples: list[Tensor]) -> dict[str, Tensor]:
    """All rows side by side, so that no example can be changed by its place in the batch."""
    ends = torch.tensor([0, *map(len, examples)]).cumsum(0)
    return {"input_ids": torch.cat(examples), "starts": ends[:-1]}


class Pairs(nn.Module):
    """Rows as means of two embeddings of their tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.EmbeddingBag(VOCABULARY, 6, mode="mean") for _ in range(2))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        one, two = (side(batch["input_ids"], batch["starts"]) for side in (self.one, self.two))
        return one @ two.T


def evaluate_negatives(model: Pairs, batches: list[dict[str, Tensor]]) -> float:
    losses = [
        functional.cross_entropy(scores, torch.arange(len(scores)), reduction="sum")
        for scores in map(model, batches)
    ]
    return sum(losses).item() / sum(len(batch["starts"]) for batch in batches)


def evaluate_means(model: Pairs, batches: list[dict[str, Tensor]]) -> float:
    means = [model(batch).diagonal().square().mean() for batch in batches]
    return sum(means).item() / len(means)


@pytest.mark.parametrize(
    ("evaluate", "cause"),
    [(evaluate_negatives, "batch-coupled-term"), (evaluate_means, "eval-mean-of-means")],
)
def test_evaluations_of_rows_against_each_other_are_told_from_means(
    evaluate: Callable[..., float], cause: str
) -> None:
    def step(model: Pairs, micro_batches: list[dict[str, Tensor]]) -> None:
        for batch in micro_batches:
            model(batch).diagonal().square().sum().backward()

    pairs = {"model": Pairs, "collate": flattened, "examples": rows()}
    report = check({**pairs, "step": step, "evaluate": evaluate}, ["evaluation-batch"])
    assert report.axes[0].cause == cause


def divides_each_time(model: nn.Module, micro_batches: list[dict[str, Tensor]]) -> None:
    for micro in micro_batches:
        (total_loss(model, micro) / num_targets(micro)).backward()
        for weight in model.parameters():
            weight.grad /= len(micro_batches)


def repeats_the_first(model: nn.Module, micro_batches: list[dict[str, Tensor]]) -> None:
    count = sum(map(num_targets, micro_batches))
    again = micro_batches[:1] if len(micro_batches) > 1 else []
    for micro in [*micro_batches, *again]:
        (total_loss(model, micro) / count).backward()


@pytest.mark.parametrize(
    ("step", "cause"),
    [(divides_each_time, "weighted-by-place"), (repeats_the_first, "duplicated-examples")],
)
def test_weights_by_place_are_told_from_repeats(step: Callable[..., None], cause: str) -> None:
    assert micro_batch_axis(step=step).cause == cause


def by_rows_divided_again(model: nn.Module, micro_batches: list[dict[str, Tensor]]) -> None:
    rows = sum(len(micro["labels"]) for micro in micro_batches)
    for micro in micro_batches:
        mean = total_loss(model, micro) / num_targets(micro)
        (mean * len(micro["labels"]) / rows / len(micro_batches)).backward()


def mean_of_all_but_the_last(model: nn.Module, micro_batches: list[dict[str, Tensor]]) -> None:
    used = micro_batches[:-1] or micro_batches
    for micro in used:
        (total_loss(model, micro) / num_targets(micro) / len(micro_batches)).backward()


@pytest.mark.parametrize(
    ("step", "cause", "beside"),
    [
        (by_rows_divided_again, "example-weighted", "divided-twice"),
        (mean_of_all_but_the_last, "dropped-examples", "mean-of-means"),
    ],
)
def test_two_laws_that_act_on_the_same_gradients_are_both_named(
    step: Callable[..., None], cause: str, beside: str
) -> None:
    axis = micro_batch_axis(step=step)
    assert (axis.cause, axis.also) == (cause, (beside,))


def test_a_fault_that_only_another_order_shows_is_named_from_that_order() -> None:
    def step(model: nn.Module, micro_batches: list[dict[str, Tensor]]) -> None:
        count = sum(map(num_targets, micro_batches))
        for micro in micro_batches:
            width = int((micro["labels"][0] != -100).sum())  # of the first row
            cut = {name: value[:, :width] for name, value in micro.items()}
            (total_loss(model, cut) / count).backward()

    longest_first = sorted(rows(), key=len, reverse=True)
    loop = subject(step=step, examples=longest_first)
    by_micro_batch, by_order = check(loop, ["micro-batch", "order"]).axes
    assert by_micro_batch.verdict == "exact"
    assert by_order.cause == "dropped-examples"


def normalised(each: bool) -> Callable[..., None]:
    """Gradients are brought to unit length: of each micro-batch, or once at the end."""

    def step(model: nn.Module, micro_batches: list[dict[str, Tensor]]) -> None:
        count = sum(map(num_targets, micro_batches))
        weights = list(model.parameters())
        total = [torch.zeros_like(weight) for weight in weights]
        for micro in micro_batches:
            found = torch.autograd.grad(total_loss(model, micro) / count, weights)
            length = nn.utils.get_total_norm(found) if each else 1.0
            total = [old + new / length for old, new in zip(total, found, strict=True)]
        length = nn.utils.get_total_norm(total) if not each else 1.0
        for weight, gradient in zip(weights, total, strict=True):
            weight.grad = gradient / length

    return step


@pytest.mark.parametrize(("each", "cause"), [(True, "clip-per-micro-batch"), (False, None)])
def test_gradients_brought_to_one_length_each_are_clipped_each(each: bool, cause: str) -> None:
    assert micro_batch_axis(step=normalised(each)).cause == cause
