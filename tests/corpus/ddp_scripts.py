"""Loops on two ranks: who counts, who reduces, who waits."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from kit import Case, nll, targets, tokens
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler


def synchronised(model: Any, last: bool) -> Any:
    return contextlib.nullcontext() if last else model.no_sync()


def everywhere(number: float) -> Tensor:
    total = torch.tensor(float(number), dtype=torch.float64)
    distributed.all_reduce(total)
    return total


def script(
    factor: Callable[[list[Any], int], Any], last: Callable[[int, int], bool] | None = None
) -> Callable[..., None]:
    """Each micro-batch's summed loss times a factor, reduced with the last one."""

    def step(model: Any, micros: list[Any]) -> None:
        times = factor(micros, distributed.get_world_size())
        for at, micro in enumerate(micros):
            final = at == len(micros) - 1 if last is None else last(at, len(micros))
            with synchronised(model, final):
                (nll(model, micro) * times).backward()

    return step


def global_count(micros: list[Any], world: int) -> Any:
    return world / everywhere(targets(micros))


def global_count_forgetting_the_average(micros: list[Any], world: int) -> Any:
    return 1 / everywhere(targets(micros))


def own_count(micros: list[Any], world: int) -> Any:
    return 1 / max(1, targets(micros))


def own_count_times_world(micros: list[Any], world: int) -> Any:
    return world / max(1, targets(micros))


def counted_twice(micros: list[Any], world: int) -> Any:
    """Loss over the global count, times world, on top of a sum over ranks."""
    return world**2 / everywhere(targets(micros))


def means_of_ranks(model: Any, micros: list[Any]) -> None:
    for at, micro in enumerate(micros):
        with synchronised(model, at == len(micros) - 1):
            share = targets([micro]) / max(1, targets(micros))
            (nll(model, micro, "sum") / max(1, targets([micro])) * share).backward()


def by_hand(divide: bool, count: Callable[[list[Any]], Any]) -> Callable[..., None]:
    """Gradients reduced without a wrapper."""

    def step(model: nn.Module, micros: list[Any]) -> None:
        number = count(micros)
        for micro in micros:
            (nll(model, micro) / number).backward()
        for weight in model.parameters():
            distributed.all_reduce(weight.grad)
            if divide:
                weight.grad /= distributed.get_world_size()

    return step


def forgets_a_weight(model: nn.Module, micros: list[Any]) -> None:
    number = everywhere(targets(micros))
    for micro in micros:
        (nll(model, micro) / number).backward()
    for name, weight in model.named_parameters():
        if name != "head.bias":
            distributed.all_reduce(weight.grad)


def updates(model: Any, micros: list[Any]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    script(global_count)(model, micros)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()


def clips_before_reducing(model: nn.Module, micros: list[Any]) -> None:
    number = everywhere(targets(micros))
    for micro in micros:
        (nll(model, micro) / number).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    for weight in model.parameters():
        distributed.all_reduce(weight.grad)


def local_penalty_updates(model: nn.Module, micros: list[Any]) -> None:
    """Each rank updates from its own gradient, reduced only after the optimizer has read it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    number = everywhere(targets(micros))
    for micro in micros:
        (nll(model, micro) / number).backward()
    optimizer.step()
    for weight in model.parameters():
        distributed.all_reduce(weight.grad)


def contrast_on_each_rank(model: nn.Module, micros: list[Any]) -> None:
    """In-batch negatives of one micro-batch only; alone it sees one micro-batch a step."""
    rows = everywhere(sum(len(micro["labels"]) for micro in micros))
    for micro in micros:
        vectors = functional.normalize(model(micro["input_ids"])[:, 0], dim=-1)
        logits = vectors @ vectors.detach().roll(1, -1).T / 0.2
        losses = functional.cross_entropy(logits, torch.arange(len(vectors)), reduction="sum")
        (losses / rows).backward()
    for weight in model.parameters():
        if weight.grad is not None:
            distributed.all_reduce(weight.grad)


def dealt(indices: list[int], rank: int, world: int) -> Sequence[int]:
    return list(DistributedSampler(indices, num_replicas=world, rank=rank, shuffle=False))


def dealt_once(indices: list[int], rank: int, world: int) -> Sequence[int]:
    return indices[rank::world]


def skips_without_targets(model: Any, micros: list[Any]) -> None:
    """A rank without targets does not call backward, and the others wait for it."""
    times = global_count(micros, distributed.get_world_size())
    for at, micro in enumerate(micros):
        if targets([micro]):
            with synchronised(model, at == len(micros) - 1):
                (nll(model, micro) * times).backward()


def ddp(step: Any, **names: Any) -> Any:
    return tokens(step, wrap=DistributedDataParallel, **names)


def bare(step: Any, **names: Any) -> Any:
    return tokens(step, wrap=None, **names)


def case(name: str, build: Any, cause: str | None = None, **more: Any) -> Case:
    return Case(name, build, cause, "ranks", **more)


CASES = [
    case("count everywhere, times ranks", ddp(script(global_count))),
    case("count everywhere, dealt without repeats", ddp(script(global_count), shard=dealt_once)),
    case("AdamW on ranks", tokens(updates, train=updates, wrap=DistributedDataParallel)),
    case("summed by hand", bare(by_hand(False, lambda micros: everywhere(targets(micros))))),
    case("each rank its own count", ddp(script(own_count)), "rank-local-count"),
    case("each rank its own mean", ddp(means_of_ranks), "rank-local-count"),
    case("averaged by hand, own count", bare(by_hand(True, lambda m: max(1, targets(m)))),
         "rank-local-count"),
    case("own count, times ranks", ddp(script(own_count_times_world)), "world-scaled"),
    case("summed by hand, own count", bare(by_hand(False, lambda m: max(1, targets(m)))),
         "world-scaled"),
    case("times ranks twice", ddp(script(counted_twice)), "world-scaled"),
    case("forgets that DDP averages", ddp(script(global_count_forgetting_the_average)),
         "world-divided"),
    case("averaged by hand, global count",
         bare(by_hand(True, lambda micros: everywhere(targets(micros)))), "world-divided"),
    case("never synchronised", ddp(script(global_count, lambda at, number: False)),
         "ranks-not-synchronised"),
    case("synchronises the first only", ddp(script(global_count, lambda at, number: at == 0)),
         "ranks-not-synchronised"),
    case("one weight is not reduced", bare(forgets_a_weight), "ranks-not-synchronised"),
    case("reduced after the update",
         tokens(local_penalty_updates, train=local_penalty_updates, wrap=None),
         "ranks-not-synchronised"),
    case("clips before reducing", bare(clips_before_reducing), "clip-per-micro-batch"),
    case("in-batch contrast on ranks", bare(contrast_on_each_rank), "batch-coupled-term"),
    case("a sampler that repeats", ddp(script(global_count), shard=dealt), "duplicated-examples"),
    case("a rank without targets stays away", ddp(skips_without_targets),
         "ranks-not-synchronised"),
]  # fmt: skip
