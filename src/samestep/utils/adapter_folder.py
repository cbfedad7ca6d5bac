"""A folder of adapters that PEFT has saved, and what it says of itself. No PyTorch."""

import json
from typing import Any

from samestep.errors import ConfigError
from samestep.utils.files import user_path

_CONFIG = "adapter_config.json"

ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""The file of an adapter folder that holds its weights."""


def is_adapter(model: str) -> bool:
    """Whether what a setting names as a model is a folder of adapters.

    Args:
        model: A path, or a name of the Hub.

    Returns:
        Whether it is one, readable or not.
    """
    return (user_path(model) / _CONFIG).is_file()


def read_adapter(model: str) -> dict[str, Any]:
    """What an adapter folder says of itself.

    Args:
        model: Its path.

    Returns:
        The fields of its adapter_config.json; "base_model_name_or_path" is one of them.

    Raises:
        ConfigError: It cannot be read, is of another kind than LoRA, names no base, or its weights
            are missing; all of it.
    """
    folder = user_path(model)
    path = folder / _CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"model: {path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"model: {path} holds a {type(found).__name__}, not fields of an adapter")
    problems = []
    if found.get("peft_type") != "LORA":
        problems.append(f"{path} is of peft_type {found.get('peft_type')}: only LORA can be read")
    base = found.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        problems.append(f"{path} names no base: set base_model_name_or_path there to the model")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        problems.append(
            f"{model} has no {ADAPTER_WEIGHTS} (it holds: "
            f"{', '.join(sorted(each.name for each in folder.iterdir())[:8])}); pickled weights "
            "are not read"
        )
    if problems:
        raise ConfigError("\n".join(f"model: {problem}" for problem in problems))
    return found
