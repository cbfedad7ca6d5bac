"""Windows that are never applied, values that meet the wrong rows, rows cut or repeated."""

from typing import Any

import torch
from kit import Case, collate, nll, targets, tokens, trained
from pairs import Convolved, Recurrent, on_vectors, pair, points
from torch import Tensor, nn
from torch.nn import functional


def steps_in_full_windows(right: bool) -> Any:
    """The step is made where a window is full; right: or where the data end."""

    def train(model: nn.Module, micros: list[Any], accumulation: int) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for at, micro in enumerate(micros, start=1):
            (nll(model, micro) / targets(micros)).backward()
            if at % accumulation == 0 or (right and at == len(micros)):
                optimizer.step()
                optimizer.zero_grad()

    return trained(train, model=Recurrent)


def counts_down(right: bool) -> Any:
    """The same on vectors: it counts what is missing."""

    def train(model: nn.Module, micros: list[Any], accumulation: int) -> None:
        optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
        missing = min(accumulation, len(micros)) if right else accumulation
        for micro in micros:
            losses = functional.cross_entropy(model(micro["x"]), micro["kind"], reduction="sum")
            (losses / points(micros)).backward()
            missing -= 1
            if not missing:
                optimizer.step()

    return on_vectors(train, train=train)


def descends_in_full_windows(right: bool) -> Any:
    """By hand, over rows."""

    def train(model: nn.Module, micros: list[Any], accumulation: int) -> None:
        rows = sum(len(micro["labels"]) for micro in micros)
        for micro in micros:
            (nll(model, micro) / rows).backward()
        if right or len(micros) >= accumulation:
            with torch.no_grad():
                for weight in model.parameters():
                    weight -= 0.05 * weight.grad

    return trained(train, model=Convolved)


def weights_from_the_front(right: bool) -> Any:
    """Importance weights are kept in one list."""

    def step(model: nn.Module, micros: list[Any]) -> None:
        every, at = torch.cat([micro["weight"] for micro in micros]), 0
        for micro in micros:
            size = len(micro["x"])
            own = every[at : at + size] if right else every[:size]
            errors = (model(micro["x"])[:, 0] - micro["value"]).square()
            ((errors * own).sum() / points(micros)).backward()
            at += size

    return on_vectors(step)


def scores_from_the_back(right: bool) -> Any:
    """Scores of rows are taken off the end of a list, which holds them from the first row on."""

    def step(model: nn.Module, micros: list[Any]) -> None:
        scores = [float(row.sum() % 11) - 5.5 for micro in micros for row in micro["input_ids"]]
        for micro in micros:
            size = len(micro["labels"])
            own, scores = (scores[:size], scores[size:]) if right else (scores[-size:], scores)
            if not right:
                scores = scores[:-size]
            logits = model(micro["input_ids"])[:, :-1].transpose(1, 2)
            losses = functional.cross_entropy(logits, micro["labels"][:, 1:], reduction="none")
            (losses.sum(1) @ losses.new_tensor(own) / 40).backward()

    return tokens(step, model=Recurrent)


def values_of_the_one_before(right: bool) -> Any:
    """Targets are looked up by the row's place in its micro-batch."""

    def step(model: nn.Module, micros: list[Any]) -> None:
        table, at = torch.cat([micro["value"] for micro in micros]), 0
        for micro in micros:
            places = torch.arange(len(micro["x"])) + (at if right else 0)
            errors = model(micro["x"])[:, 1] - table[places]
            (functional.huber_loss(errors, torch.zeros_like(errors), reduction="sum")
             / points(micros)).backward()  # fmt: skip
            at += len(micro["x"])

    return on_vectors(step)


def trimmed(right: bool) -> Any:
    """Rows end where three quarters of the longest row of their micro-batch do."""

    def step(model: nn.Module, micros: list[Any]) -> None:
        for micro in micros:
            kept = micro["labels"].clone()
            if not right:
                kept[:, 1 + 3 * kept.shape[1] // 4 :] = -100
            (nll(model, {**micro, "labels": kept}) / targets(micros)).backward()

    return tokens(step, model=Convolved)


def short_answers(right: bool) -> Any:
    """The longest rows are cut to the mean length of their micro-batch."""

    def step(model: nn.Module, micros: list[Any]) -> None:
        for micro in micros:
            lengths = (micro["labels"] != -100).sum(1)
            most = int(lengths.double().mean()) + 1 if not right else micro["labels"].shape[1]
            one = {key: value[:, :most] for key, value in micro.items()}
            (nll(model, one) / targets(micros)).backward()

    return tokens(step, model=Recurrent)


def cut_in_the_collator(right: bool) -> Any:
    """The collator cuts all rows to the second shortest."""

    def cut(examples: list[Tensor]) -> dict[str, Tensor]:
        lengths = sorted(map(len, examples))
        most = lengths[-1] if right else lengths[min(1, len(lengths) - 1)]
        return collate([row[:most] for row in examples])

    def step(model: nn.Module, micros: list[Any]) -> None:
        for micro in micros:
            (nll(model, micro) / targets(micros)).backward()

    return tokens(step, model=Convolved, collate=cut)


def wraps_around(right: bool) -> Any:
    """A window is filled to six micro-batches by the first ones."""

    def step(model: nn.Module, micros: list[Any]) -> None:
        filled = list(micros)
        while not right and len(micros) > 1 and len(filled) % 3:
            filled.append(micros[len(filled) - len(micros)])
        for micro in filled:
            (nll(model, micro) / targets(micros)).backward()

    return tokens(step, model=Convolved)


def repeats_the_last_point(right: bool) -> Any:
    """Odd micro-batches repeat their last point."""

    def even(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        filled = [*examples, *(examples[-1:] if len(examples) % 2 and not right else [])]
        return {
            "x": torch.stack([one["x"] for one in filled]),
            "kind": torch.tensor([one["kind"] for one in filled]),
        }

    def step(model: nn.Module, micros: list[Any]) -> None:
        for micro in micros:
            losses = functional.cross_entropy(model(micro["x"]), micro["kind"], reduction="sum")
            (losses / 10).backward()

    return on_vectors(step, collate=even)


def skips_losses_that_are_large(right: bool) -> Any:
    """A micro-batch of one row is no batch, and is left out; right: it is taken."""

    def step(model: nn.Module, micros: list[Any]) -> None:
        for micro in micros:
            if right or len(micro["x"]) > 1 or len(micros) == 1:
                errors = (model(micro["x"])[:, 2] - micro["value"]).abs()
                (errors.sum() / points(micros)).backward()

    return on_vectors(step)


DROPPED, MISALIGNED = "dropped-examples", "misaligned-values"

CASES: list[Case] = [
    *pair("a window that is never full", steps_in_full_windows, DROPPED, "short-window"),
    *pair("a window that counts down", counts_down, DROPPED, "short-window"),
    *pair("a short window by hand", descends_in_full_windows, DROPPED, "short-window"),
    *pair("weights from the front", weights_from_the_front, MISALIGNED),
    *pair("scores from the back", scores_from_the_back, MISALIGNED),
    *pair("values of the rows before", values_of_the_one_before, MISALIGNED),
    *pair("three quarters of the longest", trimmed, DROPPED),
    *pair("cut to the mean length", short_answers, DROPPED),
    *pair("cut to the second shortest", cut_in_the_collator, DROPPED),
    *pair("a window that wraps around", wraps_around, "duplicated-examples"),
    *pair("odd micro-batches repeat a point", repeats_the_last_point, "duplicated-examples"),
    *pair("single points left out", skips_losses_that_are_large, DROPPED),
]
