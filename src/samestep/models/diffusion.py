"""Models of diffusers, which predict from noisy latents."""

from pathlib import Path
from typing import Any, Literal

import torch

from samestep.errors import ConfigError


def load_diffusion(
    source: str, *, init: Literal["pretrained", "random"], dtype: torch.dtype, seed: int
) -> Any:
    """A model of diffusers, in train mode on the CPU.

    Args:
        source: A folder with config.json (and the weights), or a Hub name.
        init: "pretrained" weights or "random" ones.
        dtype: Of the weights.
        seed: Of random weights.

    Returns:
        The model that ``_class_name`` of its config names.

    Raises:
        ConfigError: diffusers is not installed, the model cannot be loaded, or it has dropout,
            whose masks are not tied to the examples here.
    """
    try:
        import diffusers
    except ImportError:
        raise ConfigError(
            "this objective needs diffusers: pip install 'samestep[diffusion]'"
        ) from None
    try:
        config = diffusers.AutoModel.load_config(source)
        kind = getattr(diffusers, config["_class_name"])
        torch.manual_seed(seed)
        if init == "random":
            model = kind.from_config(config).to(dtype)
        else:
            model = kind.from_pretrained(source, torch_dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model: {source} could not be loaded as a model of diffusers: {reason}. It takes the "
            "folder of the transformer itself, with config.json and *.safetensors"
        ) from error
    drops = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
    if drops:
        raise ConfigError(
            f"model: {Path(source).name} has dropout ({drops[0]}, ...), whose masks would depend "
            "on the split: set it to 0 in config.json"
        )
    return model.train()
