"""What is done to gradients inside the accumulation loop, and rows that are cut there."""

from typing import Any

from kit import Case, nll, targets, tokens
from pairs import Convolved, Recurrent, on_vectors, pair, points
from torch import Tensor, nn
from torch.nn import functional


def over_how_many_came(right: bool) -> Any:
    """Divided by the number of this micro-batch, counted from 1, as if it were the window's."""

    def step(model: nn.Module, micros: list[Any]) -> None:
        count = targets(micros)
        for at, micro in enumerate(micros, start=1):
            (nll(model, micro) / (count if right else targets([micro]) * at)).backward()

    return tokens(step, model=Recurrent)


def divided_each_time(right: bool) -> Any:
    """All that is in .grad is divided by the accumulation after every backward."""

    def step(model: nn.Module, micros: list[Any]) -> None:
        for micro in micros:
            losses = functional.mse_loss(model(micro["x"])[:, 0], micro["value"], reduction="sum")
            (losses / points(micros)).backward()
            for weight in model.parameters():
                if weight.grad is not None and not right:
                    weight.grad /= len(micros)

    return on_vectors(step)


def smoothed_gradients(right: bool) -> Any:
    """A moving average over the micro-batches where a sum is meant."""

    def step(model: nn.Module, micros: list[Any]) -> None:
        kept: list[Tensor] | None = None
        for micro in micros:
            model.zero_grad()
            (nll(model, micro) / targets(micros)).backward()
            own = [weight.grad.clone() for weight in model.parameters()]
            old, new = (1.0, 1.0) if right else (0.75, 0.25)
            kept = (
                own if kept is None else [old * a + new * b for a, b in zip(kept, own, strict=True)]
            )
        for weight, gradient in zip(model.parameters(), kept or [], strict=True):
            weight.grad = gradient

    return tokens(step, model=Convolved)


def as_long_as_the_first(right: bool) -> Any:
    """Rows are cut to the length of the first one of their micro-batch."""

    def step(model: nn.Module, micros: list[Any]) -> None:
        count = targets(micros)
        for micro in micros:
            held = int((micro["labels"][0] != -100).sum())  # none of a row without targets
            width = micro["labels"].shape[1] if right or not held else held
            cut = {key: value[:, :width] for key, value in micro.items()}
            (nll(model, cut) / count).backward()

    return tokens(step, model=Recurrent)


def over_own_width(right: bool) -> Any:
    """Sums over the width that a micro-batch was padded to, weighted by rows."""

    def step(model: nn.Module, micros: list[Any]) -> None:
        rows = sum(len(micro["labels"]) for micro in micros)
        for micro in micros:
            width = 64 if right else micro["labels"].shape[1]
            (nll(model, micro) / width / rows).backward()

    return tokens(step)


def weights_of_mean_one(right: bool) -> Any:
    """Weights of tokens that are divided by their mean over the micro-batch."""

    def step(model: nn.Module, micros: list[Any]) -> None:
        for micro in micros:
            real = micro["labels"][:, 1:] != -100
            scores = model(micro["input_ids"])[:, :-1].transpose(1, 2)
            losses = functional.cross_entropy(scores, micro["labels"][:, 1:], reduction="none")
            weights = (1 + micro["input_ids"][:, 1:] % 5) * real
            mean = 1.0 if right else weights.sum() / real.sum()
            ((losses * weights).sum() / mean / targets(micros)).backward()

    return tokens(step, model=Recurrent)


CASES: list[Case] = [
    *pair("means over how many came", over_how_many_came, "weighted-by-place"),
    *pair("divided after every backward", divided_each_time, "weighted-by-place"),
    *pair("gradients smoothed", smoothed_gradients, "weighted-by-place"),
    *pair("as long as the first row", as_long_as_the_first, "dropped-examples"),
    *pair("over the width of the rows", over_own_width, "padding-counted"),
    *pair("weights of mean one", weights_of_mean_one, "batch-coupled-term",
          also=("example-weighted",)),
]  # fmt: skip
