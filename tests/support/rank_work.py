"""What the ranks of the distributed tests do: importable, so that another process finds it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from cases import build, cut, gradients, ragged
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import samestep
from samestep.data.examples import Example
from samestep.engine import collectives
from samestep.engine.counts import count_units
from samestep.engine.parallel import Idle
from samestep.engine.targets import IGNORE
from samestep.models import activations

MICRO = 3


def spread(model: nn.Module, mode: str) -> nn.Module:
    """The model laid out over the ranks: "plain", "ddp" or "fsdp2"."""
    if mode == "ddp":
        return DistributedDataParallel(model)
    if mode.startswith("fsdp2"):
        wide = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        policy = wide if mode == "fsdp2-wide" else MixedPrecisionPolicy()
        for layer in model.model.layers if hasattr(model, "model") else model.transformer.h:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    return model


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Full tensors of shards, and names without DDP's prefix."""
    return {
        name.removeprefix("module."): value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in tensors.items()
    }


def share(examples: Sequence[Example], mode: str, deal: str) -> list[Example]:
    """This rank's examples: "even", "uneven" (most on rank 0), or "bare" (the last rank's have no
    targets), "idle" (the last rank has none)."""
    number, rank = collectives.world_size(), collectives.rank()
    if deal == "even" or number == 1:
        return list(examples[rank::number])
    tail = number - 1
    if deal == "uneven":
        start = len(examples) - 2 * tail
        return list(examples[:start] if rank == 0 else examples[start + 2 * (rank - 1) :][:2])
    if rank < tail:
        return list(examples[rank::tail])
    if deal.startswith("idle"):
        return []
    ids = examples[0].input_ids
    return [Example(ids, torch.full_like(ids, IGNORE), 1.0, 99)]


def gradient(
    name: str, mode: str, deal: str, dtype: torch.dtype, normalize: Any = "token", number: int = 22
) -> tuple[float, dict[str, torch.Tensor]]:
    """The objective and the gradient of a ragged batch that is dealt out over the ranks."""
    model = spread(build(name, dtype), mode)
    mine = share(ragged(number, weighted=True), mode, deal)
    micros = cut(inner(model), mine, [MICRO], "none")
    if mode == "fsdp2" and deal == "idle-right" and not micros:
        micros = [Idle(cut(inner(model), ragged(1), [1], "none")[0])]
    loss_fn = samestep.CausalLMLoss(normalize=normalize)
    loss, _ = samestep.backward(model, micros, loss_fn)
    return loss, whole(gradients(model))


def inner(model: nn.Module) -> Any:
    return model.module if isinstance(model, DistributedDataParallel) else model


def offloaded_gradient() -> tuple[list[tuple[int, ...]], dict[str, torch.Tensor]]:
    """Under FSDP2: the shapes of what is offloaded, and the gradient."""
    model: Any = spread(build("llama"), "fsdp2")
    moved: list[tuple[int, ...]] = []

    class Noted(activations._Offloaded):
        def __init__(self, tensor: torch.Tensor, *, number: int) -> None:
            moved.append(tuple(tensor.shape))
            super().__init__(tensor, number=number)

    def offloaded(model: nn.Module, micro: Any) -> Any:
        with activations.ActivationOffload(model):
            return samestep.CausalLMLoss()(model, micro)

    kept = activations._Offloaded, activations._MIN_OFFLOAD_BYTES
    activations._Offloaded, activations._MIN_OFFLOAD_BYTES = Noted, 0  # type: ignore[misc]
    try:
        micros = cut(model, share(ragged(22, weighted=True), "fsdp2", "even"), [MICRO], "none")
        samestep.backward(model, micros, offloaded)
    finally:
        activations._Offloaded, activations._MIN_OFFLOAD_BYTES = kept  # type: ignore[misc]
    return moved, whole(gradients(model))


def rank_local_gradient(mode: str, deal: str) -> tuple[float, dict[str, torch.Tensor]]:
    """What DDP and FSDP2 give by themselves when every rank divides by its own count."""
    model = spread(build("llama"), mode)
    mine = share(ragged(22, weighted=True), mode, deal)
    micros = cut(inner(model), mine, [len(mine)], "none")
    totals = samestep.CausalLMLoss()(model if mode == "fsdp2" else inner(model), micros[0])
    own = totals["nll"].total / count_units(micros)["token"]
    own.backward()
    found = whole(gradients(model))
    if mode == "ddp":
        found = {
            name: collectives.all_reduce_sum(value) / collectives.world_size()
            for name, value in found.items()
        }
    return float(own), found


def reduced_numbers() -> tuple[int, int]:
    """How many numbers a step puts into all-reduces, and how many weights train."""
    model = build("llama")
    sent, real = [], torch.distributed.all_reduce

    def counted(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        sent.append(tensor.numel())
        return real(tensor, *arguments, **options)

    torch.distributed.all_reduce = counted
    try:
        samestep.backward(model, cut(model, ragged(4), [1], "none"), samestep.CausalLMLoss())
    finally:
        torch.distributed.all_reduce = real
    return sum(sent), sum(weight.numel() for weight in model.parameters())


class Moments(nn.Module):
    """A small network for the coupled terms."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(5, 8), nn.Tanh())
        self.outer = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(self.inner(x))


def coupled_loss(net: nn.Module, micro: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A sum, a term coupled by its moments, and one by all its rows."""
    out = net(micro["x"])
    moments = torch.cat([out.new_tensor([len(out)]), out.sum(0), out.square().sum(0)])
    return {
        "square": samestep.Term(out.square().sum(), "row", 0.3),
        "spread": samestep.Coupled(moments, spread_of, weight=0.7),
        "contrast": samestep.Coupled(out, contrast_of, gather="rows", weight=-1.3),
    }


def spread_of(s: torch.Tensor) -> torch.Tensor:
    return ((s[5:9] / s[0] - (s[1:5] / s[0]).square()).sum()).log()


def contrast_of(s: torch.Tensor) -> torch.Tensor:
    return (s @ s.t()).fill_diagonal_(-torch.inf).logsumexp(1).mean()


ROWS = {"row": lambda micro: len(micro["x"])}


def coupled_gradient(
    mode: str, sizes: Sequence[Sequence[int]]
) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, evaluation and gradient; ``sizes`` are the micro-batches of each rank."""
    net: nn.Module = Moments().double()
    if mode == "fsdp2":
        fully_shard(net.inner)
        fully_shard(net)
    elif mode == "ddp":
        net = DistributedDataParallel(net)
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start = sum(map(sum, sizes[: collectives.rank()]))
    own = sizes[collectives.rank()]
    micros = [{"x": part} for part in x[start : start + sum(own)].split(list(own))] if own else []
    loss_fn = samestep.TwoPass(coupled_loss)
    evaluated = samestep.evaluate(net, micros, loss_fn, counters=ROWS)
    loss, _ = samestep.backward(net, micros, loss_fn, counters=ROWS)
    return loss, evaluated.loss, whole(gradients(net))


def evaluation(mode: str, deal: str) -> Any:
    """The report over a ragged set, without its time."""
    model = spread(build("llama"), mode)
    micros = cut(inner(model), share(ragged(22, weighted=True), mode, deal), [MICRO], "none")
    report = samestep.evaluate(model, micros, samestep.CausalLMLoss())
    return report.loss, report.terms, report.counts, report.tokens


def three_steps(mode: str, dtype: torch.dtype) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Three clipped AdamW steps with evaluations between them; the last batch is short."""
    model = spread(build("llama", dtype), mode)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    reports = []
    for start, end in ((0, 16), (16, 32), (32, 37)):
        mine = ragged(37)[start:end][collectives.rank() :: collectives.world_size()]
        micros = cut(inner(model), mine, [3], "none")
        samestep.evaluate(model, micros, samestep.CausalLMLoss())
        report = samestep.step(model, optimizer, micros, samestep.CausalLMLoss(), max_grad_norm=0.5)
        reports.append((report.loss, report.grad_norm, report.counts, report.tokens))
    return reports, whole({n: w.detach() for n, w in model.named_parameters()})


def training(folder: str, **changes: Any) -> Any:
    """A run of the trainer on these ranks: its summary."""
    from runs import run_config

    from samestep.train.trainer import train

    return train(run_config(Path(folder), **changes))


def drawn_start() -> list[float]:
    """The weights of a model that each rank has drawn by a generator of its own."""
    from samestep.train.sharding import start_as_rank_0

    torch.manual_seed(collectives.rank())
    model = nn.Linear(3, 2)
    model.weight = nn.Parameter(torch.randn(3, 2).t())  # libraries leave some so
    start_as_rank_0(model)
    return [float(one) for weight in model.parameters() for one in weight.flatten()]


def verifying(out: str) -> tuple[int, str, int, int]:
    """`samestep verify` on these ranks: its exit code, and what its verdict says."""
    from samestep.train.command import read_settings
    from samestep.train.verify import report, verify

    settings = read_settings([f"{out}/config.yaml"]).model_copy(update={"out": out})
    verdict = verify(settings, steps=None)
    return report(verdict, out), verdict.difference.split(" (")[0], verdict.first, verdict.last


def training_on_a_slow_disk(folder: str, **changes: Any) -> Any:
    """The same where rank 0, which writes, waits for its disk at each file."""
    import os
    import time

    real = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(0.3)
        real(descriptor)

    os.fsync = slow if collectives.rank() == 0 else real
    try:
        return training(folder, **changes)
    finally:
        os.fsync = real


def trained(config: Any) -> None:
    """A run of the trainer on these ranks, which are no process of the tests themselves."""
    from transformers import GotOcr2Processor

    from samestep.train.trainer import train

    GotOcr2Processor.num_image_tokens = 16  # of tiny images; a folder does not keep it
    train(config)


def measuring(folder: str, costs: list[list[float]]) -> Any:
    """What each rank takes for the costs if it measures other ones; rank 0 finds its own cached.

    A real micro-batch is run on the ranks that measure: it must wait for nobody.
    """
    from runs import run_config

    from samestep.train import micro_tokens
    from samestep.train.setup import set_up

    setup = set_up(run_config(Path(folder), micro_batch=4))
    sizes: list[int] = []

    def measured(model: Any, objective: Any, **_: Any) -> Any:
        micros = list(setup.micro_batches.batches(range(4 * collectives_rank), 0))
        samestep.backward(model, micros, objective.loss_fn)
        sizes.append(collectives.world_size())
        return micro_tokens.Costs(*costs[collectives_rank])

    collectives_rank = collectives.rank()
    real = micro_tokens._measure, micro_tokens.cached_costs
    micro_tokens._measure = measured
    cached = micro_tokens.Costs(*costs[0])
    micro_tokens.cached_costs = lambda _, measure: measure() if collectives_rank else cached
    try:
        found = micro_tokens.measured_costs(
            setup.model, setup.objective, settings=setup.recipe.settings, cut=lambda _: []
        )
    finally:
        micro_tokens._measure, micro_tokens.cached_costs = real
    assert found is not None
    return [found.seconds, found.seconds_per_token, found.bytes, found.bytes_per_token], sizes


def faulty_training(folder: str, fault: str, **changes: Any) -> Any:
    """A run in which one rank alone meets a fault: its summary, or its error's class and text.

    "memory" fails in micro-batches of more than 110 tokens, "sequence" in every one, and "number"
    makes the loss of one row not finite; each on the last rank only.
    """
    from samestep.errors import SamestepError
    from samestep.train import trainer

    real = trainer.key_dropout

    def faulty(model: Any, micro: Any, **options: Any) -> None:
        real(model, micro, **options)
        if collectives.rank() < collectives.world_size() - 1:
            return
        if fault == "sequence" or (fault == "memory" and micro["input_ids"].numel() > 110):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        if fault == "number":

            def overflow(_: Any, __: Any, states: torch.Tensor) -> torch.Tensor:
                hook.remove()
                return states * torch.inf

            hook = model.get_input_embeddings().register_forward_hook(overflow)

    trainer.key_dropout = faulty
    try:
        return training(folder, **changes)
    except SamestepError as error:
        return type(error).__name__, str(error)
    finally:
        trainer.key_dropout = real
