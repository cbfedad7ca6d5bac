"""LoRA adapters, by PEFT."""

from collections.abc import Sequence
from typing import Any

from samestep.errors import ConfigError

HEADS = {"TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}
"""Heads that PEFT trains whole, by kind of model, and would also give adapters, then fail."""


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
    """The model with LoRA adapters (arXiv:2106.09685); only they train.

    Args:
        model: A transformers model.
        rank: Of the adapters.
        alpha: The adapters' output is scaled by alpha / rank.
        dropout: Before the adapters.
        targets: Names of the modules that get one; ("all-linear",) means every linear layer but
            the head.
        seed: Of the adapters' random weights.
        task: PEFT's name for the kind of the model; the heads of classifiers train too.

    Returns:
        A PEFT model around it.

    Raises:
        ConfigError: No module has such a name.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    try:
        return get_peft_model(
            model,
            LoraConfig(
                r=rank,
                lora_alpha=alpha,
                lora_dropout=dropout,
                target_modules="all-linear" if tuple(targets) == ("all-linear",) else list(targets),
                exclude_modules=HEADS.get(task),
                task_type=task,
            ),
        )
    except ValueError as error:
        raise ConfigError(f"lora_targets: {error}") from error
