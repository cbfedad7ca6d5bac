"""Loading models of diffusers, which predict from noisy latents."""

from pathlib import Path
from typing import Any, Literal

import torch

from samestep.errors import ConfigError
from samestep.models.files import check_finite, check_safetensors
from samestep.models.load import first_line
from samestep.models.placement import DRAWN, building, reading
from samestep.models.weightless import is_weightless
from samestep.utils.extras import MissingExtraError, missing_text


def load_diffusion(
    source: str, *, init: Literal["pretrained", "random"], dtype: torch.dtype, seed: int
) -> Any:
    """A model of diffusers, which predicts from noisy latents.

    Args:
        source: A folder with config.json (and the weights), or a Hub name.
        init: "pretrained" weights or "random" ones.
        dtype: Of the weights.
        seed: Of random weights.

    Returns:
        The model that ``_class_name`` of its config names, in train mode, where
        `samestep.models.placement.made_on` says.

    Raises:
        ConfigError: diffusers is not installed, the model cannot be loaded, or it has dropout,
            whose masks are not tied to the examples here.
    """
    try:
        import diffusers
    except ImportError:
        raise MissingExtraError(
            missing_text("diffusion", ["diffusers"], what="this objective")
        ) from None
    try:
        config = diffusers.AutoModel.load_config(source)
        model_class = getattr(diffusers, config["_class_name"])
        torch.manual_seed(seed)
        if init == "random" or is_weightless():
            with building():
                model = model_class.from_config(config).to(dtype)
        else:
            check_safetensors(source, "diffusion_pytorch_model.safetensors.index.json")
            model = model_class.from_pretrained(
                source, torch_dtype=dtype, use_safetensors=True, **reading()
            )
            check_finite(source, model)
    except Exception as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"model: {source} could not be loaded as a model of diffusers: "
            f"{first_line(error)}. It takes the folder of the transformer itself, "
            "with config.json and *.safetensors"
        ) from error
    dropouts = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
    if dropouts:
        raise ConfigError(
            f"model: {Path(source).name} has dropout ({dropouts[0]}, ...), whose masks would "
            "depend on the split: set it to 0 in config.json"
        )
    setattr(model, DRAWN, init == "random")
    return model.train()
