"""PyTorch's optimizers, and the learning rate as a function of the step."""

import math

import torch
from torch import nn
from torch.optim import Optimizer

from samestep.train.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """The optimizer over the weights that require gradients.

    Args:
        model: The model.
        config: ``optimizer``, ``lr``, ``weight_decay`` (on tensors of two dimensions and more:
            biases and norms do not decay).

    Returns:
        The optimizer.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [w for w in weights if w.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [w for w in weights if w.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr)
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=config.lr)
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def learning_rate(step: int, *, total: int, config: TrainConfig) -> float:
    """The learning rate of a step: a pure function, so a resumed run needs no schedule state.

    Args:
        step: From 0.
        total: Steps of the whole run.
        config: ``lr``, ``schedule``, ``warmup``.

    Returns:
        The learning rate. It rises linearly over the warm-up, reaches ``lr``, and (unless
        constant) falls so that it would be 0 at step ``total``.
    """
    warmup = config.warmup if config.warmup >= 1 else config.warmup * total
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1.0, total - warmup)
    if config.schedule == "linear":
        return config.lr * (1 - progress)
    if config.schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * progress)) / 2
    return config.lr


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Give every parameter group the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
