"""How a run lays its model out over the ranks: replicated, or in shards."""

import logging
from typing import Any, Literal

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from samestep.engine.collectives import world_size
from samestep.errors import ConfigError
from samestep.train.config import TrainConfig

log = logging.getLogger("samestep")

ADAM_BYTES = 12
"""Bytes a trained weight needs beside itself: gradient and two moments in float32."""

SHARE = 0.6
"""The part of a device's memory that weights, gradients and moments may fill under ``auto``; the
rest is for activations."""


def choose_layout(
    model: nn.Module, config: TrainConfig, device: torch.device
) -> Literal["ddp", "fsdp2"]:
    """The layout: as asked for; by itself, replicated if that fits on one device.

    Args:
        model: The whole model.
        config: ``parallel`` and what belongs to it.
        device: Of this rank.

    Raises:
        ConfigError: FSDP2 without ranks, or its options without it.
    """
    wanted = config.parallel
    if wanted == "auto":
        wanted = "ddp"
        if device.type == "cuda" and world_size() > 1:
            needed, room = resident_bytes(model), torch.cuda.mem_get_info(device)[1]
            wanted = "fsdp2" if needed > SHARE * room else "ddp"
            log.info("parallel: %s (%.1f GB to hold of %.1f)", wanted, needed / 1e9, room / 1e9)
    if wanted == "fsdp2" and not dist.is_initialized():
        raise ConfigError(
            "parallel: fsdp2 shards the model over ranks: start them by torchrun, or set ranks"
        )
    options = [name for name in ("mixed_precision", "cpu_offload") if getattr(config, name)]
    if wanted == "ddp" and options:
        raise ConfigError(f"{', '.join(options)}: only with parallel fsdp2")
    if wanted == "fsdp2" and config.merge:
        raise ConfigError("merge: not under fsdp2; save the adapter and merge it afterwards")
    return wanted


def resident_bytes(model: nn.Module) -> int:
    """Bytes of the weights, and of the gradients and Adam moments of those that train."""
    return sum(
        weight.numel() * (weight.element_size() + ADAM_BYTES * weight.requires_grad)
        for weight in model.parameters()
    )


def shard(model: Any, config: TrainConfig, device: torch.device) -> Any:
    """Shard a model over all ranks with FSDP2, a group of weights for each of its blocks.

    Args:
        model: A transformers or PEFT model, whole, on the CPU; changed in place.
        config: ``dtype``, ``mixed_precision``, ``cpu_offload``.
        device: Where the shards go.

    Returns:
        The model, whose head stays in the root's group: the loss applies it by itself.
    """
    low = config.mixed_precision or config.dtype == "bfloat16"
    policy: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (world_size(),)),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if config.mixed_precision else None,
            # Low-precision gradients are added up over the ranks in float32.
            reduce_dtype=torch.float32 if low else None,
        ),
    }
    if config.cpu_offload:
        policy["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    kinds = set(model._no_split_modules or ())
    for module in list(model.modules()):
        if type(module).__name__ in kinds:
            fully_shard(module, **policy)
    return fully_shard(model, **policy)
