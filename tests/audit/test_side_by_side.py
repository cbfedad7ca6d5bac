"""Names that need more than one law: sizes, norms of a part, padding scored, masks drawn again."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from samestep.audit.axes.axis import AxisResult
from samestep.audit.check import check
from samestep.audit.diagnose.sizes import shortened_after_adding

LENGTHS = (5, 17, 3, 9, 12, 4, 21, 7)


class Loop:
    """A sound loop over tokens."""

    examples = tuple((torch.arange(n) * 7 + 3 * n) % 47 + 1 for n in LENGTHS)

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Embedding(50, 8), nn.Tanh(), nn.Linear(8, 50))

    def collate(self, rows: list[Tensor]) -> dict[str, Tensor]:
        pad = nn.utils.rnn.pad_sequence
        labels = pad(rows, batch_first=True, padding_value=-100)
        return {"input_ids": pad(rows, batch_first=True), "labels": labels}

    def count(self, micros: list[Any]) -> int:
        return sum(int((micro["labels"][:, 1:] != -100).sum()) for micro in micros)

    def sum_of(self, model: nn.Module, micro: dict[str, Tensor]) -> Tensor:
        logits = model(micro["input_ids"])[:, :-1].flatten(0, 1)
        return functional.cross_entropy(logits, micro["labels"][:, 1:].flatten(), reduction="sum")

    def step(self, model: nn.Module, micros: list[Any]) -> Any:
        total = 0.0
        for micro in micros:
            loss = self.sum_of(model, micro) / self.count(micros)
            loss.backward()
            total += float(loss.detach())
        return total


def axis_of(subject: Any, name: str = "micro-batch") -> AxisResult:
    return next(axis for axis in check(subject, [name]).axes if axis.name == name)


class ConstantDividedAgain(Loop):
    """A sound sum over a constant, divided by the accumulation once more."""

    def step(self, model: nn.Module, micros: list[Any]) -> None:
        for micro in micros:
            (self.sum_of(model, micro) / 512 / len(micros)).backward()


def test_a_constant_divided_again_is_divided_twice() -> None:
    assert axis_of(ConstantDividedAgain).cause == "divided-twice"


class TwoPasses(Loop):
    """The second pass takes the mean over a chunk for its sum."""

    second = "mean"

    def step(self, model: nn.Module, micros: list[Any]) -> None:
        rows = sum(len(micro["labels"]) for micro in micros)
        held = [model(micro["input_ids"][:, :2]).detach().requires_grad_() for micro in micros]
        (torch.cat(held) - 0.3).square().sum().div(rows).backward()
        for micro, each in zip(micros, held, strict=True):
            products = (model(micro["input_ids"][:, :2]) * each.grad).sum((1, 2))
            getattr(products, self.second)().backward()


class TwoPassesOfSums(TwoPasses):
    second = "sum"


def test_a_mean_in_a_second_pass_weighs_by_size() -> None:
    axis = axis_of(TwoPasses)
    assert axis.cause == "weighted-by-size"
    assert "1 x 8" in axis.evidence  # a micro-batch of one weighs eight times what it should
    assert axis_of(TwoPassesOfSums).verdict == "exact"


class SizesByThree(Loop):
    """Micro-batches weigh by a third of their rows: whole multiples, but no repeats."""

    def step(self, model: nn.Module, micros: list[Any]) -> None:
        for micro in micros:
            times = 1.0 if len(micros) == 1 else len(micro["labels"]) / 3
            (self.sum_of(model, micro) / self.count(micros) * times).backward()


class Repeats(Loop):
    """The first two micro-batches come twice."""

    def step(self, model: nn.Module, micros: list[Any]) -> None:
        for micro in [*micros, *micros[: 2 * (len(micros) > 1)]]:
            (self.sum_of(model, micro) / self.count(micros)).backward()


def test_whole_multiples_are_repeats_unless_they_follow_sizes() -> None:
    assert axis_of(SizesByThree).cause == "weighted-by-size"
    assert axis_of(Repeats).cause == "duplicated-examples"


class LastNormOnly(Loop):
    """Clips all that was added up by the norm of the last micro-batch's gradient."""

    def step(self, model: nn.Module, micros: list[Any]) -> None:
        for micro in micros:
            before = [w.grad.clone() if w.grad is not None else 0 for w in model.parameters()]
            (self.sum_of(model, micro) / self.count(micros)).backward()
        last = [w.grad - old for w, old in zip(model.parameters(), before, strict=True)]
        norm = torch.cat([each.flatten() for each in last]).norm()
        for weight in model.parameters():
            weight.grad *= (0.01 / norm).clamp(max=1)


def test_the_norm_of_a_part_is_told_from_clipping_each() -> None:
    assert axis_of(LastNormOnly).cause == "partial-norm"
    whole = {"a": torch.tensor([3.0, 4.0]).double(), "b": torch.tensor([1.0, 2.0]).double()}
    shards = {"a": whole["a"] * 0.2, "b": whole["b"] * 0.5}
    named = shortened_after_adding(shards, whole, bound=1e-6)
    assert named is not None
    assert named.cause == "partial-norm"
    turned = {"a": torch.tensor([3.0, 1.0]).double(), "b": whole["b"]}
    assert shortened_after_adding(turned, whole, bound=1e-6) is None


class RateBeside(Loop):
    """A mean of means, and a schedule that moves at every micro-batch."""

    def train(self, model: nn.Module, micros: list[Any]) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for micro in micros:
            (self.sum_of(model, micro) / self.count([micro]) / len(micros)).backward()
            optimizer.param_groups[0]["lr"] *= 0.9
        optimizer.step()

    step: Any = None


def test_what_stands_beside_a_cause_is_said_with_its_advice() -> None:
    subject = RateBeside()
    names = {name: getattr(subject, name) for name in ("model", "examples", "collate", "train")}
    axis = axis_of(names)
    assert (axis.cause, axis.also) == ("mean-of-means", ("state-per-micro-batch",))
    assert "scheduler.step" in axis.advice
    assert "learning rate" in axis.evidence


class LawsOfWeights(Loop):
    """The head keeps its last gradient, the embedding is averaged twice: nothing is exact."""

    def step(self, model: nn.Module, micros: list[Any]) -> None:
        for micro in micros:
            model[2].zero_grad()
            (self.sum_of(model, micro) / self.count(micros)).backward()
        model[0].weight.grad /= len(micros)


def test_weights_may_follow_laws_of_their_own() -> None:
    axis = axis_of(LawsOfWeights)
    assert {axis.cause, *axis.also} == {"last-micro-batch-only", "divided-twice"}


class Scores(Loop):
    """Accuracy over all places, or over those with labels."""

    padding = True

    def evaluate(self, model: nn.Module, batches: list[Any]) -> dict[str, float]:
        hits = places = 0
        with torch.no_grad():
            for batch in batches:
                guesses = model(batch["input_ids"]).topk(25).indices
                right = (guesses == batch["input_ids"][..., None]).any(-1)
                kept = torch.ones_like(right) if self.padding else batch["labels"] != -100
                hits += int((right & kept).sum())
                places += int(kept.sum())
        return {"accuracy": hits / places}


class ScoresLabels(Scores):
    padding = False


def test_padding_that_is_scored_is_named() -> None:
    assert axis_of(Scores, "evaluation-batch").cause == "padding-scored"
    assert axis_of(ScoresLabels, "evaluation-batch").verdict == "exact"


class Recomputes(nn.Module):
    def __init__(self, keeps: bool) -> None:
        super().__init__()
        self.keeps = keeps
        self.embed, self.mix, self.head = nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 50)

    def forward(self, ids: Tensor) -> Tensor:
        def block(hidden: Tensor) -> Tensor:
            return functional.dropout(torch.tanh(self.mix(hidden)), 0.3, self.training)

        return self.head(
            checkpoint(block, self.embed(ids), use_reentrant=False, preserve_rng_state=self.keeps)
        )


@pytest.mark.parametrize("reports", [True, False])
@pytest.mark.parametrize("keeps", [True, False])
def test_masks_that_are_drawn_again_are_named(keeps: bool, reports: bool) -> None:
    loop = Loop()
    names: dict[str, Any] = {"examples": Loop.examples, "collate": loop.collate}
    names["model"] = lambda: Recomputes(keeps)
    names["step"] = loop.step if reports else lambda model, micros: [loop.step(model, micros)]
    assert axis_of(names, "dropout").cause == ("rng" if keeps else "recomputed-differently")


def test_no_layer_that_runs_again_drops_anything_unless_asked() -> None:
    names: dict[str, Any] = {"examples": Loop.examples, "collate": Loop().collate}
    names |= {"model": lambda: Recomputes(keeps=True), "step": Loop().step}
    with set_checkpoint_early_stop(False):
        report = check(names, ["micro-batch", "reported"])
    assert [axis.verdict for axis in report.axes] == ["exact", "exact"]
