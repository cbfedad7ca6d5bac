"""Optimizers of bitsandbytes: AdamW whose moments have 8 bits, and Lion with 32 or 8."""

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from samestep.errors import ConfigError
from samestep.models.quantized import quiet_bitsandbytes
from samestep.train.optim import OPTIMIZERS, OptimizerSettings
from samestep.utils.extras import require_extra

_CLASSES = {"adamw_8bit": "AdamW8bit", "lion": "Lion", "lion_8bit": "Lion8bit"}


def few_bits(groups: list[dict[str, Any]], settings: OptimizerSettings) -> Optimizer:
    """The optimizer of ``optimizer: adamw_8bit``, ``lion`` and ``lion_8bit``.

    Args:
        groups: Parameter groups of `samestep.train.optim.build_optimizer`.
        settings: ``optimizer``, ``lr``, ``betas``, ``eps``.

    Returns:
        The optimizer.

    Raises:
        ConfigError: Weights are in shards, or in float64.
        MissingExtraError: bitsandbytes is not installed.
    """
    name = settings.optimizer
    row = OPTIMIZERS[name]
    with quiet_bitsandbytes():
        require_extra("quant", row.needs, what=f"optimizer {name}")
    from bitsandbytes import optim

    weights = [weight for group in groups for weight in group["params"]]
    if any(isinstance(weight, DTensor) for weight in weights):
        raise ConfigError(f"optimizer: {name} needs whole weights: not under parallel fsdp2")
    if any(weight.dtype == torch.float64 for weight in weights):
        raise ConfigError(
            f"optimizer: {name} has moments of 32 bits at most: not under precision float64"
        )
    given = {option: getattr(settings, option) for option in row.takes}
    chosen = {option: value for option, value in given.items() if value is not None}
    built: Optimizer = getattr(optim, _CLASSES[name])(groups, lr=settings.lr, **chosen)
    return built
