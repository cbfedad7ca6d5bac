"""How a model's weights lie on the ranks, and what follows for its gradients.

Replicated weights (plain modules, or inside DDP) are summed over ranks by the step itself, once, in
float32 or above: DDP would average, in the weights' own dtype, and would need a backward of every
weight on every rank, so that a rank without targets could not take part.

Sharded weights (FSDP2) are summed by FSDP2 as each backward passes; the step asks it for sums
instead of means, and gives every rank the same number of backwards.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

from samestep.engine.collectives import Result, all_gather_object, gather_results, world_size
from samestep.engine.counts import input_tokens
from samestep.engine.terms import LossResult, MicroBatch, Term, named_terms
from samestep.errors import ConfigError

_known_equal: WeakSet[nn.Module] = WeakSet()


def unwrap(model: nn.Module) -> nn.Module:
    """The module that computes: what DDP wraps, else the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 (`fully_shard`) holds the model's weights in shards."""
    return isinstance(model, FSDPModule)


def prepare_for_step(model: nn.Module) -> list[nn.Parameter]:
    """Get a model ready for a step: check its kind, and put its weights in their resting state.

    Args:
        model: A plain module, DDP, or the root of FSDP2.

    Returns:
        The weights that train, in the model's order.

    Raises:
        ConfigError: Weights that the step cannot sum over ranks, or that differ between ranks.
    """
    if isinstance(model, FullyShardedDataParallel | DataParallel):
        raise ConfigError(
            f"{type(model).__name__} averages gradients by itself, out of the step's sight: use "
            "torch.distributed.fsdp.fully_shard, DistributedDataParallel, or a plain module"
        )
    if is_sharded(model):
        _prepare_sharded(model)
    parameters = [weight for weight in unwrap(model).parameters() if weight.requires_grad]
    if world_size() > 1:
        _check_kind(model, parameters)
    return parameters


def _prepare_sharded(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # After an evaluation the root still holds whole weights, which no optimizer knows.
            module.reshard()
            # Sums, not means: the counts are already those of all ranks.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _check_kind(model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    meshes = {weight.device_mesh.size() for weight in parameters if isinstance(weight, DTensor)}
    if is_sharded(model) and meshes != {world_size()}:
        raise ConfigError(
            f"fully_shard over {' and '.join(map(str, sorted(meshes)))} of {world_size()} ranks: "
            "every rank must hold a part of the batch and a shard of the weights"
        )
    if not is_sharded(model) and meshes:
        raise ConfigError(
            f"{type(model).__name__} has sharded weights (DTensor) but is not the root of "
            "fully_shard: call fully_shard on the model itself, last"
        )
    if not is_sharded(model) and model not in _known_equal:
        _check_equal(parameters)
        _known_equal.add(model)


@torch.no_grad()
def _check_equal(parameters: Sequence[nn.Parameter]) -> None:
    """Replicas must start equal: then equal gradients keep them equal."""
    prints = [[float(w.double().sum()), float(w.double().square().sum())] for w in parameters]
    digest = hash(tuple(number for pair in prints for number in pair))
    found = all_gather_object([len(prints), digest])
    if any(other != found[0] for other in found):
        raise ConfigError(
            "the weights differ between ranks: load or seed them the same on every rank, or wrap "
            "the model in DistributedDataParallel, which copies those of rank 0"
        )


@contextmanager
def no_gradient_sync(model: nn.Module) -> Iterator[None]:
    """Keep DDP from averaging: the step sums."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    else:
        yield


def gather_micro_batch_results(model: nn.Module, work: Callable[[], Result]) -> list[Result]:
    """Run micro-batches on every rank and share what each found, as JSON.

    An error on one rank is raised on all of them, but not under FSDP2: there the others wait in
    the model's own collectives, where they cannot be told; they end with that rank's process.
    """
    return all_gather_object(work()) if is_sharded(model) else gather_results(work)


@dataclass(frozen=True)
class Idle:
    """A micro-batch that counts for nothing, for a rank that has none.

    Under FSDP2 every rank must run the model; this one is run with its objective times 0. In all
    other layouts it is left out.

    Attributes:
        micro: Any micro-batch that the loss takes.
    """

    micro: MicroBatch


def schedule_micro_batches(
    model: nn.Module, micros: Sequence[MicroBatch | Idle]
) -> list[tuple[MicroBatch, int | None]]:
    """What this rank runs, so that all ranks run FSDP2's collectives equally often.

    Args:
        model: The model.
        micros: This rank's micro-batches.

    Returns:
        The micro-batches, numbered; under FSDP2 then, as often as others have more, this rank's
        smallest one with None in the place of its number: it must count for nothing.

    Raises:
        ConfigError: Under FSDP2 a rank has no micro-batch to run, not even an `Idle` one.
    """
    real = [micro for micro in micros if not isinstance(micro, Idle)]
    runs: list[tuple[MicroBatch, int | None]] = [(micro, at) for at, micro in enumerate(real)]
    if world_size() == 1 or not is_sharded(model):
        return runs
    numbers = all_gather_object([len(micros), len(real)])
    bare = [rank for rank, (any_at_all, _) in enumerate(numbers) if not any_at_all]
    if bare and len(bare) < len(numbers):
        raise ConfigError(
            f"rank {bare[0]} has no micro-batch: under fully_shard every rank must run the model. "
            "Give it samestep.Idle(micro) with any micro-batch: it counts for nothing"
        )
    every = [micro.micro if isinstance(micro, Idle) else micro for micro in micros]
    missing = max(number for _, number in numbers) - len(real)
    return runs + [(min(every, key=input_tokens), None)] * missing if missing else runs


def term_tensors(result: LossResult) -> dict[str, Tensor]:
    """What a loss returned, by name, without units: totals, and parts of coupled terms."""
    return {
        name: term.total if isinstance(term, Term) else term.part
        for name, term in named_terms(result).items()
    }


def zero_loss(result: LossResult) -> Tensor:
    """Zero, with the graph of all that a loss returned: its backward adds exactly nothing."""
    tensors = [tensor for tensor in term_tensors(result).values() if tensor.requires_grad]
    return torch.stack([0 * tensor.double().sum() for tensor in tensors]).sum()
