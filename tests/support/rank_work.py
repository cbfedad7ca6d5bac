"""What the ranks of the distributed tests do: importable, so that another process finds it."""

from collections.abc import Sequence
from typing import Any

import torch
from cases import build, cut, gradients, ragged
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import samestep
from samestep import ranks
from samestep.data.examples import Example
from samestep.targets import IGNORE

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
    number, rank = ranks.world(), ranks.rank()
    if deal == "even" or number == 1:
        return list(examples[rank::number])
    tail = number - 1
    if deal == "uneven":
        start = len(examples) - 2 * tail
        return list(examples[:start] if rank == 0 else examples[start + 2 * (rank - 1) :][:2])
    if rank < tail:
        return list(examples[rank::tail])
    if deal == "idle":
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
    loss_fn = samestep.CausalLMLoss(normalize=normalize)
    loss, _ = samestep.backward(model, micros, loss_fn)
    return loss, whole(gradients(model))


def inner(model: nn.Module) -> Any:
    return model.module if isinstance(model, DistributedDataParallel) else model


def rank_local_gradient(mode: str, deal: str) -> tuple[float, dict[str, torch.Tensor]]:
    """What DDP and FSDP2 give by themselves when every rank divides by its own count."""
    model = spread(build("llama"), mode)
    mine = share(ragged(22, weighted=True), mode, deal)
    micros = cut(inner(model), mine, [len(mine)], "none")
    totals = samestep.CausalLMLoss()(model if mode == "fsdp2" else inner(model), micros[0])
    own = totals["nll"].total / samestep.terms.count(micros)["token"]
    own.backward()
    found = whole(gradients(model))
    if mode == "ddp":
        found = {name: ranks.sum_over_ranks(value) / ranks.world() for name, value in found.items()}
    return float(own), found
