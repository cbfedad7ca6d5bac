"""Adapters that were saved, put on their base again."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from samestep.errors import ConfigError
from samestep.models.lora import load_peft, quiet_peft
from samestep.models.vocabulary import grow_embeddings
from samestep.models.weightless import is_weightless
from samestep.utils.adapter_folder import ADAPTER_WEIGHTS


def saved_rows(folder: Path, model: Any) -> int:
    """How many rows of embeddings adapters bring along: PEFT saves them where tokens were added.

    Args:
        folder: Of the adapters.
        model: Their base.

    Returns:
        Their number; 0 where they bring none.

    Raises:
        ConfigError: Their file cannot be read.
    """
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            keys = [
                key
                for key in file.keys()  # noqa: SIM118  (a file is no mapping)
                if f".{name}." in key and key.endswith("weight") and "lora" not in key
            ]
            shapes = [file.get_slice(key).get_shape() for key in keys]
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"model: the adapter in {folder} cannot be loaded: {error}") from error
    return max((rows for rows, width in shapes if width == embedding.embedding_dim), default=0)


def continue_lora(model: Any, folder: Path, *, dropout: float | None = None) -> Any:
    """Put adapters that were saved on their base; they train on from where they are.

    Args:
        model: Their base; changed in place.
        folder: Of the adapters, as PEFT saves them.
        dropout: Before the adapters; None: as they had it.

    Returns:
        A PEFT model around it, the adapters' weights in the type that they are saved in.

    Raises:
        ConfigError: They do not fit the model; the message says all that does not.
    """
    peft = load_peft()
    try:
        grow_embeddings(model, saved_rows(folder, model))
        config = peft.LoraConfig.from_pretrained(str(folder))
        config.inference_mode = False
        if dropout is not None:
            config.lora_dropout = dropout
        with quiet_peft():
            model = peft.get_peft_model(model, config)
        if is_weightless():
            return model
        weights = load_file(folder / ADAPTER_WEIGHTS)
    except (ValueError, TypeError, KeyError, OSError, SafetensorError) as error:
        raise ConfigError(f"model: the adapter in {folder} cannot be loaded: {error}") from error
    with quiet_peft():
        own = peft.get_peft_model_state_dict(model)
    problems = [f"{name} is missing" for name in own.keys() - weights.keys()]
    problems += [
        f"{name} is {list(weights[name].shape)}, where the base needs {list(own[name].shape)}"
        for name in own.keys() & weights.keys()
        if own[name].shape != weights[name].shape
    ]
    problems += [
        f"{name} is not finite" for name, each in weights.items() if not each.isfinite().all()
    ]
    if not problems:
        loaded = peft.set_peft_model_state_dict(model, weights)
        problems = [f"{name} has no place in the base" for name in loaded.unexpected_keys]
    if problems:
        raise ConfigError(
            "\n  - ".join(
                [
                    f"model: the adapter in {folder} does not fit its base:",
                    *sorted(problems)[:8],
                ]
            )
        )
    return model
