"""Means over groups, weights at fault by themselves, norms of a part, sizes, constants."""

from collections.abc import Callable
from typing import Any

import torch
from kit import Case, nll, targets, tokens
from pairs import Convolved, Recurrent, Vectors, on_vectors, pair, points, vectors
from torch import Tensor, distributed, nn
from torch.nn import functional


def numbers_by_group(micros: list[Any], group: int) -> int:
    return sum(int((micro["group"] == group).sum()) for micro in micros)


def groups_of(micros: list[Any]) -> list[int]:
    return sorted({int(group) for micro in micros for group in micro["group"]})


def sources_apart(right: bool) -> Any:
    """The mean over sources of the mean of each, weighted by points."""

    def step(model: nn.Module, micros: list[Any]) -> None:
        for micro in micros:
            errors = functional.cross_entropy(model(micro["x"]), micro["kind"], reduction="none")
            held = micros if right else [micro]
            share = 1.0 if right else len(errors) / points(micros)
            for group in groups_of([micro]):
                own = errors[micro["group"] == group].sum() / numbers_by_group(held, group)
                (own * share / len(groups_of(held))).backward(retain_graph=True)

    return on_vectors(step)


def spoken_rows(seed: int) -> list[tuple[Tensor, int]]:
    base = tokens(lambda: None)(seed)["examples"]
    return [(row, int(at in (1, 2, 5))) for at, row in enumerate(base)]


def spoken_batch(examples: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
    pad = nn.utils.rnn.pad_sequence
    rows = [row for row, _ in examples]
    return {
        "input_ids": pad(rows, batch_first=True),
        "labels": pad(rows, batch_first=True, padding_value=-100),
        "language": torch.tensor([language for _, language in examples]),
    }


def languages_apart(right: bool) -> Any:
    """Row means, a mean for each language; averaged over those that are there, by micro-batch."""

    def build(seed: int) -> Any:
        def step(model: nn.Module, micros: list[Any]) -> None:
            every = torch.cat([micro["language"] for micro in micros])
            for micro in micros:
                real = micro["labels"][:, 1:] != -100
                logits = model(micro["input_ids"])[:, :-1].transpose(1, 2)
                each = functional.cross_entropy(logits, micro["labels"][:, 1:], reduction="none")
                rows = each.sum(1) / real.sum(1).clamp(min=1)
                held = every if right else micro["language"]
                counts = torch.stack([(held == own).sum() for own in micro["language"]])
                loss = (rows / counts / len(held.unique())).sum()
                (loss if right else loss * len(rows) / len(every)).backward()

        names = {"model": Recurrent, "examples": spoken_rows(seed), "collate": spoken_batch}
        return {**names, "step": step}

    return build


def classes_apart(right: bool) -> Any:
    """A macro average over the classes of the micro-batch."""

    def step(model: nn.Module, micros: list[Any]) -> None:
        for micro in micros:
            held = micros if right else [micro]
            kinds = torch.cat([one["group"] for one in held])
            errors = (model(micro["x"]).sum(1) - micro["value"]).square()
            weights = torch.stack([1 / (kinds == own).sum() for own in micro["group"]])
            share = 1.0 if right else len(errors) / points(micros)
            ((errors * weights).sum() / len(kinds.unique()) * share).backward()

    return on_vectors(step)


def tokens_and_rows(right: bool) -> Any:
    """The mean over tokens, and a margin with a mean over rows, added up; a mean a micro-batch."""

    def step(model: nn.Module, micros: list[Any]) -> None:
        rows = sum(len(micro["labels"]) for micro in micros)
        for micro in micros:
            ends = model.states(micro["input_ids"]) * (micro["input_ids"] > 0)[..., None]
            margins = functional.softplus(1 - ends.abs().sum(-1).amax(1))
            own = (nll(model, micro) / targets([micro]), margins.mean())
            whole = (nll(model, micro) / targets(micros), margins.sum() / rows)
            (sum(whole) if right else sum(own) / len(micros)).backward()

    return tokens(step, model=Recurrent)


def bias_of_the_last(right: bool) -> Any:
    """A hook clears the biases' gradients at every backward."""

    def step(model: Convolved, micros: list[Any]) -> None:
        for micro in micros:
            if not right:
                model.near.bias.grad = None
                model.head.bias.grad = None
            (nll(model, micro) / targets(micros)).backward()

    return tokens(step, model=Convolved)


def thaws_late(right: bool) -> Any:
    """The embedding is trained in the first micro-batch, and frozen for the others."""

    def step(model: Recurrent, micros: list[Any]) -> None:
        for at, micro in enumerate(micros):
            model.embed.weight.requires_grad_(right or at == 0)
            (nll(model, micro) / targets(micros)).backward()
        model.embed.weight.requires_grad_(True)

    return tokens(step, model=Recurrent)


def head_left_out(right: bool) -> Any:
    """Where gradients are accumulated, the last layer's are not."""

    def step(model: Vectors, micros: list[Any]) -> None:
        frozen = len(micros) > 1 and not right
        model.two.requires_grad_(not frozen)
        for micro in micros:
            losses = functional.cross_entropy(model(micro["x"]), micro["kind"], reduction="sum")
            (losses / points(micros)).backward()
        model.two.requires_grad_(True)

    return on_vectors(step)


def total_of(micros: list[Any], count: Callable[[list[Any]], int]) -> Tensor:
    total = torch.tensor(float(count(micros)), dtype=torch.float64)
    distributed.all_reduce(total)
    return total


def shards(right: bool, of: Callable[[list[nn.Parameter]], list[list[nn.Parameter]]]) -> Any:
    """Gradients are added up over the ranks; each shard is then clipped."""

    def step(model: nn.Module, micros: list[Any]) -> None:
        for micro in micros:
            (nll(model, micro) / total_of(micros, targets)).backward()
        weights = list(model.parameters())
        for weight in weights:
            distributed.all_reduce(weight.grad)
        if distributed.get_world_size() == 1 or right:
            nn.utils.clip_grad_norm_(weights, 0.04)
        else:
            for shard in of(weights):
                nn.utils.clip_grad_norm_(shard, 0.04)

    return tokens(step, wrap=None)


def every_other(right: bool) -> Any:
    return shards(right, lambda weights: [weights[::2], weights[1::2]])


def body_and_head(right: bool) -> Any:
    return shards(right, lambda weights: [weights[:3], weights[3:]])


def norm_of_one_rank(right: bool) -> Any:
    """What is clipped is the sum over the ranks; the norm is the first rank's own."""

    def step(model: nn.Module, micros: list[Any]) -> None:
        for micro in micros:
            losses = functional.cross_entropy(model(micro["x"]), micro["kind"], reduction="sum")
            (losses / total_of(micros, points)).backward()
        own = torch.cat([weight.grad.flatten() for weight in model.parameters()]).norm()
        distributed.broadcast(own, 0)
        for weight in model.parameters():
            distributed.all_reduce(weight.grad)
        whole = torch.cat([weight.grad.flatten() for weight in model.parameters()]).norm()
        for weight in model.parameters():
            weight.grad *= (0.02 / (whole if right else own)).clamp(max=1)

    return on_vectors(step, wrap=None)


def norm_of_the_last(right: bool) -> Any:
    """All is clipped by the norm of what the last micro-batch brought."""

    def step(model: nn.Module, micros: list[Any]) -> None:
        weights, rows = list(model.parameters()), sum(len(one["labels"]) for one in micros)
        sums = [torch.zeros_like(weight) for weight in weights]
        for micro in micros:
            last = torch.autograd.grad(nll(model, micro) / rows, weights)
            for total, each in zip(sums, last, strict=True):
                total += each
        norm = torch.cat([each.flatten() for each in (sums if right else last)]).norm()
        for weight, total in zip(weights, sums, strict=True):
            weight.grad = total * (0.5 / norm).clamp(max=1)

    return tokens(step, model=Convolved)


def cached(right: bool) -> Any:
    """Vectors first; then each chunk meets its cached gradients, in a mean for a sum."""

    def step(model: Recurrent, micros: list[Any]) -> None:
        held = [
            model.states(micro["input_ids"])[:, 2].detach().requires_grad_() for micro in micros
        ]
        every = torch.cat(held)
        (every.square().sum(1) - 1).square().sum().div(len(every)).backward()
        for micro, each in zip(micros, held, strict=True):
            rows = (model.states(micro["input_ids"])[:, 2] * each.grad).sum(1)
            (rows.sum() if right else rows.mean()).backward()

    return tokens(step, model=Recurrent)


def size_twice(right: bool) -> Any:
    """A summed loss is multiplied by the size of the micro-batch once more."""

    def step(model: nn.Module, micros: list[Any]) -> None:
        for micro in micros:
            errors = (model(micro["x"])[:, 0] - micro["value"]).square()
            factor = 1 if right else len(errors)
            (errors.sum() * factor / 64).backward()

    def build(seed: int) -> Any:
        # Weights of targets: points of one size differ in nothing that could be counted.
        return {**on_vectors(step)(seed), "examples": vectors(seed)}

    return build


def by_roots(right: bool) -> Any:
    """Micro-batches weigh by the root of their rows."""

    def step(model: nn.Module, micros: list[Any]) -> None:
        for micro in micros:
            factor = 1.0 if right else len(micro["labels"]) ** -0.5
            (nll(model, micro) * factor / 100).backward()

    return tokens(step, model=Convolved)


def over_a_length(right: bool) -> Any:
    """Over the longest completion that is allowed, and over the micro-batches too."""

    def step(model: nn.Module, micros: list[Any]) -> None:
        for micro in micros:
            loss = nll(model, micro) / (16 * 40)
            (loss if right else loss / len(micros)).backward()

    return tokens(step, model=Recurrent)


def over_a_batch_size(right: bool) -> Any:
    """Over the batch size of the settings, and over the accumulation of the settings."""

    def step(model: nn.Module, micros: list[Any]) -> None:
        for micro in micros:
            losses = functional.cross_entropy(model(micro["x"]), micro["kind"], reduction="sum")
            losses = losses / 32
            (losses if right else losses / len(micros)).backward()

    return on_vectors(step)


def over_both(right: bool) -> Any:
    """Losses are divided by all targets, and gradients by the accumulation at the end."""

    def step(model: nn.Module, micros: list[Any]) -> None:
        for micro in micros:
            (nll(model, micro) / targets(micros)).backward()
        if not right:
            for weight in model.parameters():
                weight.grad /= len(micros)

    return tokens(step, model=Convolved)


RANKS = ("micro-batch", "ranks")

CASES: list[Case] = [
    *pair("sources, a mean each", sources_apart, "mean-of-means"),
    *pair("languages, a mean each", languages_apart, "mean-of-means"),
    *pair("groups of points, a macro average", classes_apart, "mean-of-means"),
    *pair("means of two units, averaged", tokens_and_rows, "mean-of-means"),
    *pair("biases of the last", bias_of_the_last, "last-micro-batch-only"),
    *pair("an embedding of the first", thaws_late, "last-micro-batch-only"),
    *pair("a head that is left out", head_left_out, "weights-left-out"),
    *pair("every other weight clipped apart", every_other, "partial-norm", "ranks", axes=RANKS),
    *pair("body and head clipped apart", body_and_head, "partial-norm", "ranks", axes=RANKS),
    *pair("the norm of one rank", norm_of_one_rank, "partial-norm", "ranks", axes=RANKS),
    *pair("the norm of the last", norm_of_the_last, "partial-norm"),
    *pair("cached gradients, a mean", cached, "weighted-by-size"),
    *pair("a size too many", size_twice, "weighted-by-size"),
    *pair("roots of sizes", by_roots, "weighted-by-size"),
    *pair("over a length, and again", over_a_length, "divided-twice"),
    *pair("over a batch size, and again", over_a_batch_size, "divided-twice"),
    *pair("over all targets, and again", over_both, "divided-twice"),
]
