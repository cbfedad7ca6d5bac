"""How a run lays its model out over the ranks: replicated and made in place, or in shards."""

import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from samestep.engine.collectives import run_or_fail_together, world_size
from samestep.errors import ConfigError
from samestep.models.placement import has_drawn_weights
from samestep.models.weightless import without_weights
from samestep.train.settings.base import TrainSettings

log = logging.getLogger("samestep")

_ADAM_BYTES = 12
"""Bytes a trained weight needs beside itself: gradient and two moments in float32."""

_MEMORY_SHARE = 0.6
"""The part of a device's memory that weights, gradients and moments may fill under ``auto``; the
rest is for activations."""


def lay_out(
    load: Callable[[torch.device], Any], settings: TrainSettings, *, device: torch.device
) -> Any:
    """The model on its device: made straight there if it is replicated, or sharded from the CPU.

    Args:
        load: Makes the model on a device.
        settings: ``parallel`` and what belongs to it.
        device: Of this rank.

    Returns:
        The model.

    Raises:
        ConfigError: As for `choose_parallelism`, or the model cannot be loaded.
    """

    def choose() -> str | None:
        if not _depends_on_size(settings, device):
            return choose_parallelism(None, settings, device=device)
        sized = _without_weights(load, device)
        return None if sized is None else choose_parallelism(sized, settings, device=device)

    mode = run_or_fail_together(choose)
    place = device if mode == "ddp" else torch.device("cpu")
    model = run_or_fail_together(lambda: load(place))
    if mode is None:
        mode = run_or_fail_together(lambda: choose_parallelism(model, settings, device=device))
    if mode == "fsdp2":
        return shard(model, settings, device=device)
    model = model.to(device)
    if device.type != "cpu" and has_drawn_weights(model):
        start_as_rank_0(model)
    return model


def _without_weights(load: Callable[[torch.device], Any], device: torch.device) -> Any:
    """The model as far as its size shows, unheard; None if it takes the weights to know."""
    log.disabled = True  # what is said of the model is said as it is loaded
    try:
        with without_weights():
            return load(device)
    except ConfigError:  # code of the user's own may look at weights; else loading says it again
        return None
    finally:
        log.disabled = False


def _depends_on_size(settings: TrainSettings, device: torch.device) -> bool:
    """Whether the layout follows from the size of the model."""
    several = device.type == "cuda" and world_size() > 1
    return settings.parallel == "auto" and several and settings.quantization is None


def choose_parallelism(
    model: nn.Module | None, settings: TrainSettings, *, device: torch.device
) -> Literal["ddp", "fsdp2"]:
    """As the settings say; under auto replicated, if that fits on one device.

    Args:
        model: The model, not yet sharded, with or without its weights; None if the settings or
            the device decide.
        settings: ``parallel`` and what belongs to it.
        device: Of this rank.

    Returns:
        Replicated ("ddp") or in shards ("fsdp2").

    Raises:
        ConfigError: FSDP2 without ranks, or its options without it.
    """
    mode = settings.parallel
    if mode == "auto":
        mode = "ddp"
        if _depends_on_size(settings, device):
            assert model is not None
            needed, room = _resident_bytes(model), torch.cuda.mem_get_info(device)[1]
            mode = "fsdp2" if needed > _MEMORY_SHARE * room else "ddp"
            log.info("parallel: %s (%.1f GB to hold of %.1f)", mode, needed / 1e9, room / 1e9)
    if mode == "fsdp2" and not dist.is_initialized():
        raise ConfigError(
            "parallel: fsdp2 shards the model over ranks: start them by torchrun, or set ranks"
        )
    options = [name for name in ("cpu_offload",) if getattr(settings, name)]
    if mode == "ddp" and options:
        raise ConfigError(f"{', '.join(options)}: only with parallel fsdp2")
    if mode == "fsdp2" and settings.merge:
        raise ConfigError("merge: not under fsdp2; save the adapter and merge it afterwards")
    if mode == "fsdp2":
        _refuse_whole_weights(settings)
    return mode


def _refuse_whole_weights(settings: TrainSettings) -> None:
    """Adapters that read whole weights in their forward, where a rank has a shard alone."""
    given = [
        name
        for name in ("use_dora", "modules_to_save", "trainable_token_indices", "target_parameters")
        if getattr(settings, name)
    ]
    tokens = ("add_tokens", "add_special_tokens") if settings.lora_rank is not None else ()
    given += [name for name in tokens if getattr(settings, name)]
    if given:
        raise ConfigError(
            f"{', '.join(given)}: not under parallel fsdp2, where no test shows them to be exact; "
            "use ddp"
        )


def _resident_bytes(model: nn.Module) -> int:
    """Bytes of the weights, and of the gradients and Adam moments of those that train."""
    return sum(
        weight.numel() * (weight.element_size() + _ADAM_BYTES * weight.requires_grad)
        for weight in model.parameters()
    )


@torch.no_grad()
def start_as_rank_0(model: nn.Module) -> None:
    """Give every rank the weights of rank 0, where each has drawn its own from the same seed.

    Devices of another kind may draw other numbers from it.

    Args:
        model: Replicated; changed in place.
    """
    if world_size() > 1:
        for weight in model.parameters():
            whole = weight.contiguous()  # which libraries need not leave it, and NCCL asks for
            dist.broadcast(whole, src=0)
            weight.copy_(whole)


def shard(model: Any, settings: TrainSettings, *, device: torch.device) -> Any:
    """Shard a model over all ranks with FSDP2, a group of weights for each of its blocks.

    Args:
        model: A transformers or PEFT model, unsharded, on the CPU; changed in place.
        settings: ``precision``, ``cpu_offload``.
        device: Where the shards go.

    Returns:
        The model, whose head stays in the root's group: the loss applies it by itself.
    """
    mixed = settings.precision == "mixed"
    policy: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (world_size(),)),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if mixed else None,
            # Low-precision gradients are added up over the ranks in float32.
            reduce_dtype=torch.float32 if mixed or settings.precision == "bfloat16" else None,
        ),
    }
    if settings.cpu_offload:
        policy["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    blocks = set(model._no_split_modules or ())
    for module in list(model.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, **policy)
    return fully_shard(model, **policy)
