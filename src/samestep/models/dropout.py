"""Dropout whose random numbers belong to the example, not to the micro-batch.

PyTorch's dropout draws from one stream in the order of computation, so a different split gives
different masks. Here each element's number is a hash of (seed, step, example, position, layer,
feature): the step stays a function of the effective batch, a resumed run needs no generator state,
and gradient checkpointing draws the same mask again. The hash is integer arithmetic on tensors, so
it has the same bits on every device, costs no loop over sequences, and compiles with its layer.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from samestep.engine.device_copy import copy_without_waiting
from samestep.engine.targets import sequence_spans
from samestep.errors import ConfigError

_MASK = 2**32 - 1
_GOLDEN = 0x9E3779B9  # 2**32 over the golden ratio: multiples of it are spread evenly
_WHOLE_SEQUENCE = 2**32 - 1
"""The position of a state that stands for a whole sequence."""


def hash_(numbers: Tensor) -> Tensor:
    """A hash of 32-bit numbers, in place: one to one, each bit of a number moves half of all bits.

    The constants are of Chris Wellons' hash-prospector; below 2**31, so that no product overflows.

    Args:
        numbers: int64 in [0, 2**32); overwritten.

    Returns:
        The same tensor, with int64 in [0, 2**32).

    Examples:
        >>> hash_(torch.tensor([0, 1, 2]))
        tensor([         0, 2261973619,  229111015])
    """
    numbers ^= numbers >> 16
    numbers.mul_(0x21F0AAAD).bitwise_and_(_MASK)
    numbers ^= numbers >> 15
    numbers.mul_(0x735A2D97).bitwise_and_(_MASK)
    numbers ^= numbers >> 15
    return numbers


class ExampleDropout(nn.Module):
    """Replaces an ``nn.Dropout``; `key_dropout` sets the keys of each micro-batch.

    Args:
        p: Probability that an element is dropped.
        layer: The number of this layer in its model.

    Attributes:
        layer: Its number, int64. A tensor, since what compiles layers would take a plain number
            for part of the code, and make other graphs for each layer.
        keys: Of each position: two 32-bit numbers [2, rows, length], int64.
        sequence_keys: Of each sequence as a whole [2, sequences], int64.
    """

    layer: Tensor

    def __init__(self, p: float, layer: int) -> None:
        super().__init__()
        self.p = p
        self.register_buffer("layer", torch.tensor(layer), persistent=False)
        self.keys = torch.zeros(2, 0, 0, dtype=torch.int64)
        self.sequence_keys = torch.zeros(2, 0, dtype=torch.int64)

    def forward(self, states: Tensor) -> Tensor:
        """Drop elements; none in eval mode.

        Args:
            states: [rows, length, ...], or [sequences, width].

        Returns:
            The states, those that are kept divided by 1 - p.

        Raises:
            ConfigError: The states do not show which example they belong to.
        """
        if not self.training:
            return states
        if states.dim() == 2 and len(states) == self.sequence_keys.shape[1]:
            return self._drop(states, self.sequence_keys)
        if states.shape[:2] != self.keys.shape[1:]:
            raise ConfigError(
                f"dropout saw {tuple(states.shape)} in a micro-batch of "
                f"{tuple(self.keys.shape[1:])} tokens: it cannot tell the examples apart, so the "
                "step would depend on the split. Set this model's dropout to 0"
            )
        return self._drop(states, self.keys)

    def _drop(self, states: Tensor, keys: Tensor) -> Tensor:
        first, second = hash_(keys ^ hash_(self.layer + 1))[..., None]
        features = states[0].numel() if states.dim() == 2 else states[0, 0].numel()
        steps = torch.arange(features, device=states.device) * _GOLDEN
        drawn = hash_((first + steps).bitwise_and_(_MASK)).bitwise_xor_(second)
        kept = hash_(drawn) >= round(self.p * 2**32)
        return states * kept.view(states.shape) / (1 - self.p)


def replace_dropout(model: nn.Module) -> int:
    """Put an `ExampleDropout` in the place of every ``nn.Dropout`` with p > 0.

    Args:
        model: Changed in place.

    Returns:
        How many were replaced.

    Examples:
        >>> replace_dropout(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1), nn.Dropout(0.0)))
        1
    """
    dropouts = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if _drops(child)
    ]
    device = next((weight.device for weight in model.parameters()), None)
    for layer, (parent, name, child) in enumerate(dropouts):
        keyed = ExampleDropout(child.p, layer).train(child.training)
        setattr(parent, name, keyed.to(device))
    return len(dropouts)


def count_dropouts(model: nn.Module) -> int:
    """How many ``nn.Dropout`` with p > 0 a model has.

    Examples:
        >>> count_dropouts(nn.Sequential(nn.Dropout(0.1), nn.Dropout(0.0)))
        1
    """
    return sum(map(_drops, model.modules()))


def _drops(module: nn.Module) -> TypeGuard[nn.Dropout]:
    return type(module) is nn.Dropout and module.p > 0


def key_dropout(model: nn.Module, micro_batch: Mapping[str, Any], *, seed: int, step: int) -> None:
    """Set the sequences of the next forward in every `ExampleDropout`.

    The keys stay until the next call, so that the backward may run the forward again.

    Args:
        model: A model after `replace_dropout`.
        micro_batch: A micro-batch of `samestep.data.collate.collate_examples`.
        seed: The run's seed.
        step: The step's number.

    Examples:
        >>> model = nn.Sequential(nn.Dropout(0.5))
        >>> replace_dropout(model)
        1
        >>> micro_batch = {"input_ids": torch.ones(1, 8).long(), "example_ids": torch.tensor([3])}
        >>> key_dropout(model, micro_batch, seed=0, step=1)
        >>> states = torch.ones(1, 8, 4)
        >>> torch.equal(model(states), model(states))  # the same example in the same step
        True
    """
    layers = example_dropouts(model)
    if layers:
        examples = micro_batch["example_ids"].tolist()
        spans = sequence_spans(micro_batch)
        keys = [example_key(seed, step, example) for example in examples]
        set_keys(layers, micro_batch["input_ids"], spans=spans, keys=keys)


def example_dropouts(model: nn.Module) -> list[ExampleDropout]:
    """The layers that `replace_dropout` put into a model."""
    return [module for module in model.modules() if isinstance(module, ExampleDropout)]


def example_key(seed: int, step: int, example: int) -> np.uint64:
    """The key of an example in a step.

    Args:
        seed: The run's seed.
        step: The step's number.
        example: The example's number, of any size.

    Examples:
        >>> int(example_key(0, 1, 3)) == int(example_key(0, 2, 3))
        False
    """
    key: np.uint64 = np.random.SeedSequence([seed, step, example]).generate_state(1, np.uint64)[0]
    return key


def set_keys(
    layers: Iterable[ExampleDropout],
    ids: Tensor,
    *,
    spans: Sequence[tuple[int, slice]],
    keys: Sequence[np.uint64],
) -> None:
    """Set the sequences of the next forward in some layers.

    Args:
        layers: Of `example_dropouts`.
        ids: The tokens that the layers' states belong to [rows, length].
        spans: The row and the positions of each sequence.
        keys: Of each sequence, of `example_key`.
    """
    positions = np.zeros((2, *ids.shape), dtype=np.int64)
    whole = np.zeros((2, len(spans)), dtype=np.int64)
    for at, (key, (row, span)) in enumerate(zip(keys, spans, strict=True)):
        length = span.stop - span.start
        positions[:, row, span] = _position_keys(key, np.arange(length, dtype=np.uint64))
        whole[:, at] = _position_keys(key, np.array([_WHOLE_SEQUENCE], dtype=np.uint64))[:, 0]
    by_position, by_sequence = (
        copy_without_waiting(torch.from_numpy(one), ids.device) for one in (positions, whole)
    )
    for layer in layers:
        layer.keys, layer.sequence_keys = by_position, by_sequence


def _position_keys(key: Any, positions: Any) -> Any:
    """Two 32-bit numbers for each position of a sequence: SplitMix64 of its key, cut in two."""
    mixed = key + (positions + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    halves = [mixed >> np.uint64(32), mixed & np.uint64(_MASK)]
    return np.stack(halves).astype(np.int64)
