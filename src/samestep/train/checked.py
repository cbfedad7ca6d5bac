"""A configuration checked against itself, and its dependent defaults."""

from typing import Any

from samestep.errors import ConfigError
from samestep.train.config import TrainConfig


def checked(config: TrainConfig) -> TrainConfig:
    """The configuration with dependent defaults filled in, its fields checked against each other.

    Raises:
        ConfigError: All contradictions, in one message.
    """
    problems = config.problems()
    if config.batch_size is not None and config.batch_tokens is not None:
        problems.append("batch_size and batch_tokens are both given: keep one")
    if config.steps is not None and config.epochs is not None:
        problems.append("steps and epochs are both given: keep one")
    if isinstance(config.micro_tokens, int) and config.micro_tokens < 1:
        problems.append(f"micro_tokens: at least 1, or 'auto', not {config.micro_tokens}")
    if config.micro_batch is not None and config.micro_tokens != "auto":
        problems.append("micro_batch and micro_tokens are both given: keep one")
    if config.activation_offload and config.gradient_checkpointing in ("selective", "full"):
        problems.append("activation_offload: it needs gradient_checkpointing none")
    if config.resume and config.overwrite:
        problems.append("resume and overwrite contradict each other")
    if config.lora_rank is None:
        lora = ("lora_alpha", "lora_dropout", "lora_targets", "merge")
        defaults = TrainConfig.model_fields
        set_anyway = [name for name in lora if getattr(config, name) != defaults[name].default]
        problems += [f"{name} is given without lora_rank" for name in set_anyway]
    if problems:
        raise ConfigError("\n".join(problems))
    filled: dict[str, Any] = {}
    if config.batch_size is None and config.batch_tokens is None:
        filled["batch_size"] = 32
    if config.steps is None and config.epochs is None:
        filled["epochs"] = 1
    if config.lora_rank is not None and config.lora_alpha is None:
        filled["lora_alpha"] = 2.0 * config.lora_rank
    return config.model_copy(update=filled)
