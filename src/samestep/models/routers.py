"""The routers of a mixture of experts: recording what they decide in a forward, and their biases.

transformers' routers (``...TopKRouter``) return logits, scores and choices, for every token in
reading order. Forward hooks record them: that works whatever a model returns, and under gradient
checkpointing too, where the second run of a layer must not be recorded.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

_BIAS = "e_score_correction_bias"
"""transformers' name of the bias that is added to scores to choose experts, and only then."""


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
    """The routers of a model by name, in the order of its layers.

    Args:
        model: Any model.

    Returns:
        Empty if it is no mixture of experts of transformers.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__.lower().endswith("topkrouter")
    }


@contextmanager
def record_routing(model: nn.Module) -> Iterator[dict[str, Routing]]:
    """Record what the routers decide in the forwards of this block; of several, in the last.

    Args:
        model: A model with `routers`.

    Yields:
        Filled while the model runs, by the router's name.
    """
    recorded: dict[str, Routing] = {}

    def recorder(name: str) -> Callable[[nn.Module, Any, tuple[Tensor, Tensor, Tensor]], None]:
        def hook(_: nn.Module, __: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            recorded[name] = Routing(*output)

        return hook

    hooks = [m.register_forward_hook(recorder(name)) for name, m in routers(model).items()]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()


def router_biases(model: nn.Module) -> dict[str, Tensor]:
    """The biases that choose experts, where a router has one as a buffer.

    Args:
        model: A model with `routers`.

    Returns:
        Each bias [experts], by the router's name; a router without one is left out.
    """
    buffers = dict(model.named_buffers())
    biases = {}
    for name in routers(model):
        # The bias belongs to the router or to the module that holds the router.
        for owner in (name, name.rpartition(".")[0]):
            if f"{owner}.{_BIAS}" in buffers:
                biases[name] = buffers[f"{owner}.{_BIAS}"]
    return biases
