"""The routers of a mixture of experts: what they decided in a forward, and their biases.

transformers' routers (``...TopKRouter``) return logits, scores and choices, for every token in
reading order. They are overheard by hooks: that works whatever a model returns, under gradient
checkpointing too, where the second run of a layer must not be heard again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

BIAS = "e_score_correction_bias"
"""What transformers calls the bias that is added to scores to choose experts, and only then."""


@dataclass(frozen=True)
class Routing:
    """What one router decided.

    Attributes:
        logits: [tokens, experts].
        scores: Of the chosen experts [tokens, k].
        choices: The chosen experts [tokens, k].
    """

    logits: Tensor
    scores: Tensor
    choices: Tensor


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """The routers of a model by name, in the order of its layers."""
    found = model.named_modules()
    return {
        n: module for n, module in found if type(module).__name__.lower().endswith("topkrouter")
    }


@contextmanager
def overheard(model: nn.Module) -> Iterator[dict[str, Routing]]:
    """What the routers decide in the forwards of this block; of several forwards, in the last.

    Args:
        model: A model with `routers`.

    Yields:
        Filled while the model runs, by the router's name.
    """
    found: dict[str, Routing] = {}

    def listener(name: str) -> Callable[[nn.Module, Any, tuple[Tensor, Tensor, Tensor]], None]:
        def keep(_: nn.Module, __: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            found[name] = Routing(*output)

        return keep

    hooks = [m.register_forward_hook(listener(name)) for name, m in routers(model).items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def router_biases(model: nn.Module) -> dict[str, Tensor]:
    """The bias [experts] of each router that has one as a buffer, by the router's name."""
    buffers = dict(model.named_buffers())
    found = {}
    for name in routers(model):
        for owner in (name, name.rpartition(".")[0]):
            if f"{owner}.{BIAS}" in buffers:
                found[name] = buffers[f"{owner}.{BIAS}"]
    return found
