"""LoRA adapters, by PEFT."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from samestep.errors import ConfigError

_TASK_HEADS = {"TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}
"""Heads by PEFT's task type. PEFT trains them entirely; given adapters as well, it would fail."""


def add_lora(
    model: Any,
    rank: int,
    *,
    alpha: float,
    dropout: float,
    targets: Sequence[str],
    seed: int,
    task: str = "CAUSAL_LM",
) -> Any:
    """Add LoRA adapters (arXiv:2106.09685) to a model; only they train, and a classifier's head.

    Args:
        model: A transformers model; changed in place.
        rank: Of the adapters.
        alpha: The adapters' output is scaled by alpha / rank.
        dropout: Probability of dropout before the adapters.
        targets: Names of the modules that get an adapter; ("all-linear",) means every linear layer
            but the head.
        seed: Of the adapters' random weights.
        task: PEFT's task type; the heads of classifiers train too.

    Returns:
        A PEFT model around it.

    Raises:
        ConfigError: No module has such a name.
    """
    from peft import LoraConfig, get_peft_model  # heavy, and needed for adapters alone

    torch.manual_seed(seed)
    everywhere = "all-linear" if tuple(targets) == ("all-linear",) else None
    try:
        with warnings.catch_warnings():
            # PEFT asks for it by its former name.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
            return get_peft_model(
                model,
                LoraConfig(
                    r=rank,
                    lora_alpha=alpha,
                    lora_dropout=dropout,
                    target_modules=everywhere or list(targets),
                    exclude_modules=_TASK_HEADS.get(task),
                    task_type=task,
                ),
            )
    except ValueError as error:
        raise ConfigError(f"lora_targets: {error}") from error


def unwrap_peft(model: nn.Module) -> Any:
    """The model of transformers inside a PEFT model; its adapters stay active.

    Args:
        model: A model of transformers, plain or wrapped by PEFT.

    Returns:
        The model of transformers; ``model`` itself if it is not wrapped.
    """
    wrapped = dict(model.named_children()).get("base_model")
    return model if wrapped is None else wrapped.model
