"""What full-size weights need: formulas, evaluated for the class at its published size."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from named_models import Named

TRAINED = 16
"""Bytes that a trained weight needs in float32: itself, its gradient, two moments of Adam."""

FROZEN = 2
"""Bytes of a weight in bfloat16 that does not train."""

ROOM = 0.8 * 80e9
"""Bytes of a device of 80 GB that weights, gradients and moments may fill; the rest is for
activations."""

RANK = 16


@dataclass(frozen=True)
class Size:
    """What a full-size model needs.

    Attributes:
        parameters: How many there are.
        adapters: How many LoRA's would be, of rank 16, on every linear layer but the head.
    """

    parameters: int
    adapters: int

    @property
    def bytes_to_train_all(self) -> float:
        """All weights, with AdamW in float32: 16 bytes each."""
        return TRAINED * self.parameters

    @property
    def bytes_to_train_adapters(self) -> float:
        """2 bytes a frozen weight in bfloat16, 16 bytes a weight of the adapters."""
        return FROZEN * self.parameters + TRAINED * self.adapters

    @staticmethod
    def ranks(needed: float) -> int:
        """Devices of 80 GB over which FSDP2 spreads so many bytes."""
        return max(1, math.ceil(needed / ROOM))


def full_size(named: Named) -> Size:
    """Count the parameters of the class at full size, without memory for them."""
    with torch.device("meta"):
        model = build_full(named)
    parameters = sum(weight.numel() for weight in {id(w): w for w in model.parameters()}.values())
    head = None if named.objective == "flow_matching" else model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    adapters = sum(RANK * (layer.in_features + layer.out_features) for layer in linears)
    return Size(parameters, adapters)


def build_full(named: Named) -> Any:
    """The model at full size, on whatever device is the default."""
    if named.objective == "flow_matching":
        import diffusers

        return getattr(diffusers, named.kind)(**named.size)
    import transformers

    kind = getattr(transformers, named.kind)
    settings: dict[str, Any] = dict(named.size)
    if named.text:
        settings["text_config"] = {"model_type": "deepseek_v3", **named.text}
    model = kind(kind.config_class(**settings))
    model.tie_weights()
    return model
