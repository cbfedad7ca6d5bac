"""How a model's weights are distributed over the ranks, and what follows for its gradients.

Replicated weights (plain modules, or inside DDP) are summed over ranks by the step itself, once, in
float32 or above: DDP would average, in the weights' own dtype, and would need a backward of every
weight on every rank, so that a rank without targets could not take part.

Sharded weights (FSDP2) are summed by FSDP2 as each backward passes; the step asks it for sums
instead of means, and gives every rank the same number of backwards.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

from samestep.engine.collectives import Result, all_gather_object, gather_results, world_size
from samestep.engine.counts import input_tokens
from samestep.engine.terms import LossResult, MicroBatch, term_tensors
from samestep.errors import ConfigError

_replicas_checked: WeakSet[nn.Module] = WeakSet()
"""Models whose replicas were equal on all ranks when they were first stepped."""

Schedule: TypeAlias = list[tuple[MicroBatch, int | None]]
"""The micro-batches that a rank runs, each with its number; None: its result counts for nothing."""


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
        _check_parallelism(model, parameters)
    return parameters


def _prepare_sharded(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # After an evaluation the root still holds unsharded weights, which no optimizer has.
            module.reshard()
            # Sums, not means: the counts are already those of all ranks.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _check_parallelism(model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
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
    if not is_sharded(model) and model not in _replicas_checked:
        _check_replicas_equal(parameters)
        _replicas_checked.add(model)


@torch.no_grad()
def _check_replicas_equal(parameters: Sequence[nn.Parameter]) -> None:
    """Replicas must start equal: then equal gradients keep them equal."""
    moments = [(float(w.double().sum()), float(w.double().square().sum())) for w in parameters]
    digest = hash(tuple(number for pair in moments for number in pair))
    digests = all_gather_object([len(moments), digest])
    if any(digest != digests[0] for digest in digests):
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
    """Run micro-batches on every rank and share the results.

    Args:
        model: The model that they are run on.
        work: Runs this rank's micro-batches; returns anything small that JSON holds.

    Returns:
        The results in the order of the ranks, on every rank.

    Raises:
        Exception: As for `samestep.engine.collectives.gather_results`; but not on the other ranks
            under FSDP2: they wait in the model's own collectives, where no error reaches them, and
            end with the failed rank's process.
    """
    return all_gather_object(work()) if is_sharded(model) else gather_results(work)


@dataclass(frozen=True)
class Idle:
    """A micro-batch that counts for nothing, for a rank that has none.

    Under FSDP2 every rank must run the model; this one is run with its objective times 0. In all
    other layouts it is left out.

    Attributes:
        micro_batch: Any micro-batch that the loss takes.

    Example:
        A rank without rows passes one; it changes neither counts nor gradients:

        >>> import torch, samestep
        >>> model = torch.nn.Linear(1, 1)
        >>> def loss_fn(model, micro_batch):
        ...     return samestep.Term(model(micro_batch["x"]).square().sum(), unit="row")
        >>> counters = {"row": lambda micro_batch: len(micro_batch["x"])}
        >>> batch = {"x": torch.ones(3, 1)}
        >>> report = samestep.evaluate(
        ...     model, [batch, samestep.Idle(batch)], loss_fn, counters=counters
        ... )
        >>> report.counts, report.micro_batches
        ({'row': 3.0}, 1)
    """

    micro_batch: MicroBatch


def schedule_micro_batches(
    model: nn.Module, micro_batches: Sequence[MicroBatch | Idle]
) -> Schedule:
    """What this rank runs, so that all ranks run FSDP2's collectives equally often.

    Args:
        model: The model.
        micro_batches: This rank's micro-batches.

    Returns:
        The micro-batches, numbered; under FSDP2 then, as often as others have more, this rank's
        smallest one with None in the place of its number: it must count for nothing.

    Raises:
        ConfigError: Under FSDP2 a rank has no micro-batch to run, not even an `Idle` one.
    """
    counted = [item for item in micro_batches if not isinstance(item, Idle)]
    schedule: Schedule = [(micro_batch, index) for index, micro_batch in enumerate(counted)]
    if world_size() == 1 or not is_sharded(model):
        return schedule
    numbers = all_gather_object([len(micro_batches), len(counted)])
    empty_ranks = [rank for rank, (all_items, _) in enumerate(numbers) if all_items == 0]
    if empty_ranks and len(empty_ranks) < len(numbers):
        raise ConfigError(
            f"rank {empty_ranks[0]} has no micro-batch: under fully_shard every rank must run the "
            "model. Give it samestep.Idle(micro_batch) with any micro-batch: it counts for nothing"
        )
    repeats = max(number for _, number in numbers) - len(counted)
    if repeats == 0:
        return schedule
    runnable = [item.micro_batch if isinstance(item, Idle) else item for item in micro_batches]
    return schedule + [(min(runnable, key=input_tokens), None)] * repeats


def zero_loss(result: LossResult) -> Tensor:
    """Zero, with the graph of all that a loss returned: its backward adds exactly nothing.

    Args:
        result: What the loss returned.

    Returns:
        0-d, float64.
    """
    tensors = [tensor for tensor in term_tensors(result).values() if tensor.requires_grad]
    return torch.stack([0 * tensor.double().sum() for tensor in tensors]).sum()
