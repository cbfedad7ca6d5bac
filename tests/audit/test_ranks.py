"""The axis of ranks, on real processes."""

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from samestep.audit.axes.ranks import rank_shares
from samestep.audit.check import check

V = 23


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, 8)
        self.head = nn.Linear(8, V)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids).cumsum(1)))


def collate(rows: list[Tensor]) -> dict[str, Tensor]:
    pad = nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(rows, batch_first=True),
        "labels": pad(rows, batch_first=True, padding_value=-100),
    }


def nll(model: nn.Module, micro: dict[str, Tensor], reduction: str = "sum") -> Tensor:
    logits, targets = model(micro["input_ids"])[:, :-1], micro["labels"][:, 1:]
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


def targets(micros: list[dict[str, Tensor]]) -> Tensor:
    return sum((micro["labels"][:, 1:] != -100).sum() for micro in micros).double()


def loop(scale: Callable[[Tensor, int], Tensor], *, synchronise: bool = True) -> Any:
    def step(model: Any, micros: list[Any]) -> None:
        for number, micro in enumerate(micros):
            last = number == len(micros) - 1 and synchronise
            with contextlib.nullcontext() if last else model.no_sync():
                factor = scale(targets(micros), distributed.get_world_size())
                (nll(model, micro) * factor).backward()

    return step


def everywhere(count: Tensor, world: int) -> Tensor:
    distributed.all_reduce(count)
    return world / count


def reduced_by_hand(model: nn.Module, micros: list[Any]) -> None:
    count = targets(micros)
    distributed.all_reduce(count)
    for micro in micros:
        (nll(model, micro) / count).backward()
    for weight in model.parameters():
        distributed.all_reduce(weight.grad)


def reduced_each_time(model: nn.Module, micros: list[Any], *, divide: int = 1) -> None:
    """What was summed over ranks is still in .grad when it is summed again; a mean of it is not."""
    count = targets(micros)
    distributed.all_reduce(count)
    for micro in micros:
        (nll(model, micro) * divide / count).backward()
        for weight in model.parameters():
            distributed.all_reduce(weight.grad)
            weight.grad /= divide


def means_each_time(model: nn.Module, micros: list[Any]) -> None:
    reduced_each_time(model, micros, divide=distributed.get_world_size())


def skips_empty(model: Any, micros: list[Any]) -> None:
    count = everywhere(targets(micros), distributed.get_world_size())
    for micro in micros:
        if targets([micro]):
            (nll(model, micro) * count).backward()


def dealt(indices: list[int], rank: int, world: int) -> Sequence[int]:
    return list(DistributedSampler(indices, num_replicas=world, rank=rank, shuffle=False))


def subject(step: Any) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(3)
    rows = [torch.randint(0, V, (n,), generator=draw) for n in (5, 14, 3, 9, 11, 4, 16)]
    return {"model": Tiny, "examples": rows, "collate": collate, "step": step}


def result(step: Any, **names: Any) -> Any:
    return check({**subject(step), "wrap": DistributedDataParallel, **names}, ["ranks"]).axes[0]


def test_sound_loops_are_exact() -> None:
    assert result(loop(everywhere)).verdict == "exact"
    assert result(reduced_by_hand, wrap=None).verdict == "exact"
    assert result(means_each_time, wrap=None).verdict == "exact"


def test_sums_that_are_summed_again_are_named() -> None:
    found = result(reduced_each_time, wrap=None)
    assert (found.verdict, found.cause) == ("inexact", "world-scaled")
    assert "summed again" in found.evidence


@pytest.mark.parametrize(
    ("step", "cause"),
    [
        (loop(lambda count, world: 1 / count), "rank-local-count"),
        (loop(lambda count, world: world / count), "world-scaled"),
        (loop(lambda count, world: everywhere(count, 1)), "world-divided"),
        # Over a constant: half of the whole is the mean of what the ranks give alone, too.
        (loop(lambda count, world: torch.tensor(1 / 64)), "world-divided"),
        (loop(everywhere, synchronise=False), "ranks-not-synchronised"),
    ],
)
def test_bugs_are_named(step: Any, cause: str) -> None:
    found = result(step)
    assert (found.verdict, found.cause) == ("inexact", cause), found


def balanced(model: nn.Module, micros: list[Any]) -> None:
    """Exact token loss, and a term of the mean of each rank's own outputs."""
    count = everywhere(targets(micros), distributed.get_world_size())
    for micro in micros:
        mean = model(micro["input_ids"])[micro["labels"] != -100].mean(0)
        (nll(model, micro) * count + mean.square().sum() / len(micros)).backward()


def test_a_term_of_each_ranks_own_batch_is_named() -> None:
    found = result(balanced)
    assert (found.verdict, found.cause) == ("inexact", "batch-coupled-term"), found


def test_a_sampler_that_repeats_rows_is_named() -> None:
    found = result(loop(everywhere), shard=dealt)
    assert (found.verdict, found.cause) == ("inexact", "duplicated-examples"), found


def test_a_rank_without_targets_that_hangs_is_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from samestep.audit.adapters import processes

    monkeypatch.setattr(processes, "PATIENCE", 2.0)
    found = result(skips_empty)
    assert (found.verdict, found.cause) == ("inexact", "ranks-not-synchronised"), found


def test_a_wrapped_model_is_gone_when_its_group_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that outlives its group waits for the group's threads, some of the time for ever."""
    wrapped: list[weakref.ref[nn.Module]] = []
    alive: list[nn.Module | None] = []
    destroy = distributed.destroy_process_group

    def wrap(model: nn.Module) -> nn.Module:
        parallel = DistributedDataParallel(model)
        wrapped.append(weakref.ref(parallel))
        return parallel

    def watched() -> None:
        alive.extend(reference() for reference in wrapped)
        destroy()

    monkeypatch.setattr(distributed, "destroy_process_group", watched)
    names = {"wrap": wrap, "evaluate": lambda model, batches: float(len(batches[0]["labels"]))}
    report = check({**subject(loop(lambda count, world: 1 / count)), **names})
    assert report.verdict == "inexact"
    assert wrapped
    assert not any(model is not None for model in alive)


def test_without_ranks_the_axis_is_skipped() -> None:
    def step(model: nn.Module, micros: list[Any]) -> None:
        (nll(model, micros[0]) / targets(micros)).backward()

    names = {"model": Tiny, "examples": [torch.arange(5)] * 4, "collate": collate, "step": step}
    axis = check(names, ["ranks"]).axes[0]
    assert axis.verdict == "skipped"
    assert "wrap" in axis.reason


@pytest.mark.parametrize("size", range(4, 12))
@pytest.mark.parametrize("micros", [1, 2])
def test_shares_hold_every_example_once(size: int, micros: int) -> None:
    found = rank_shares(size, num_micro_batches=micros)
    assert [index for share in found for micro in share for index in micro] == list(range(size))
    assert len({len(share) for share in found}) == 1
    assert all(micro for share in found for micro in share)
