"""What makes two runs of a loop alike: seeds, and no dropout."""

import random
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

DROPOUTS = (
    functional.dropout,
    functional.dropout1d,
    functional.dropout2d,
    functional.dropout3d,
    functional.alpha_dropout,
    functional.feature_alpha_dropout,
    torch.dropout,
)


class WithoutDropout(TorchFunctionMode):
    """While it is on, no call of a dropout function drops anything."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = dict(kwargs or {})
        if function in DROPOUTS:
            return args[0] if args else given["input"]
        if function is functional.scaled_dot_product_attention:
            # Its fifth argument, by position or by name.
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            given |= {} if len(args) > 4 else {"dropout_p": 0.0}
        return function(*args, **given)


def seed_all(seed: int) -> None:
    """Seed every random number generator that a loop may draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def silence_dropout(model: nn.Module) -> None:
    """Set every dropout probability of a model to 0, as modules and as numbers on modules."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
