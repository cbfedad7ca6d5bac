"""Loading a model with its linear layers in few bits, and giving it whole ones back."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from samestep.errors import ConfigError
from samestep.models.quantized import (
    WAS_TRANSPOSED,
    Quantization,
    QuantizedLinear,
    quiet_bitsandbytes,
)
from samestep.utils.extras import require_extra


def quantization_options(
    config: Any, quantization: Quantization | None, *, source: str
) -> dict[str, Any]:
    """What ``from_pretrained`` is told, so that it stores linear layers in few bits as it reads.

    Args:
        config: Of the model; it may say that its files are quantised already.
        quantization: What is asked for.
        source: Where the model is from, for messages.

    Returns:
        Keyword arguments; none without quantization.

    Raises:
        ConfigError: Its files are quantised, and not as asked for.
        MissingExtraError: bitsandbytes is not installed.
    """
    stored = _stored_quantization(config)
    if stored in ("4bit", "8bit") and stored != quantization:
        raise ConfigError(
            f"model: {source} is stored in {stored[0]} bits by bitsandbytes: train adapters over "
            f"it with lora_rank and quantization {stored}, or take the model in whole weights"
        )
    if quantization is None:
        return {}
    if stored not in (None, quantization):
        raise ConfigError(
            f"quantization: {source} is quantised already, by {stored}: take the model in whole "
            "weights"
        )
    with quiet_bitsandbytes():
        require_extra("quant", ("bitsandbytes", "accelerate"), what="quantization")
    chosen = BitsAndBytesConfig(
        load_in_4bit=quantization == "4bit",
        load_in_8bit=quantization == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
    )
    # Quantised from one type, so that the base is the same for every precision.
    found = {"dtype": torch.float32, "device_map": {"": "cpu"}}
    return found if stored else {**found, "quantization_config": chosen}


def _stored_quantization(config: Any) -> str | None:
    """How a model's files are quantised: 4bit, 8bit, the name of another method, or None."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    fields = dict(found) if isinstance(found, Mapping) else found.to_dict()
    if fields.get("load_in_4bit") or fields.get("load_in_8bit"):
        return "4bit" if fields.get("load_in_4bit") else "8bit"
    return str(fields.get("quant_method", "an unknown method"))


_MARKS = (
    *("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit"),
    "is_loaded_in_8bit",
)
"""By what transformers knows quantised models, whose types it lets nobody change."""


def read_quantized(
    read: Callable[..., tuple[Any, dict[str, Any]]], config: Any, options: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Read a model in few bits; layers that its files lack, as of a new head, stay whole.

    Args:
        read: ``from_pretrained``, of a config and options.
        config: Of the model.
        options: What `quantization_options` gave.

    Returns:
        What ``read`` gave.
    """
    model, loading = read(copy.deepcopy(config), **options)
    absent = {name.rpartition(".")[0] for name in loading["missing_keys"]}
    new = absent & _layers_of_few_bits(model).keys()
    if not new:
        return model, loading
    whole = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    chosen = copy.deepcopy(options.get("quantization_config", model.config.quantization_config))
    chosen.llm_int8_skip_modules = [*whole, *sorted(new)]
    config = copy.deepcopy(config)
    if "quantization_config" not in options:  # the files are quantised already
        config.quantization_config = chosen.to_dict()
        return read(config, **options)
    return read(config, **{**options, "quantization_config": chosen})


def _layers_of_few_bits(model: nn.Module) -> dict[str, Any]:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    return {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit | Linear8bitLt)}


def adopt_quantized(model: Any, dtype: torch.dtype) -> int:
    """Put `QuantizedLinear` in the place of bitsandbytes' layers; all other weights get a type.

    Args:
        model: As ``from_pretrained`` gave it; changed in place. It is an ordinary model after that.
        dtype: Of the weights that are not quantised.

    Returns:
        How many layers are quantised.

    Raises:
        ConfigError: None is.
    """
    layers = _layers_of_few_bits(model)
    if not layers:
        raise ConfigError(
            f"quantization: {type(model).__name__} has no linear layers that could be quantised"
        )
    for name, layer in layers.items():
        model.set_submodule(name, _adopted(layer, dtype))
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    for name in _MARKS:
        vars(model).pop(name, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.dtype = dtype
    return len(layers)


def _adopted(layer: Any, dtype: torch.dtype) -> QuantizedLinear:
    transposed = issubclass(getattr(layer, "source_cls", nn.Linear), Conv1D)
    return QuantizedLinear(layer, dtype, transposed=transposed)


def restore_conv1d(model: nn.Module) -> None:
    """Put back the transposed layers of GPT-2 where `dequantize` has left plain ones.

    Args:
        model: Without adapters; changed in place.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and vars(layer).get(WAS_TRANSPOSED):
            own = Conv1D(layer.out_features, layer.in_features)
            own.weight = nn.Parameter(layer.weight.data.t().contiguous(), requires_grad=False)
            own.bias = layer.bias
            model.set_submodule(name, own)
