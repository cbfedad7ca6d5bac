"""Random numbers of a loop's own, which no seed of the audit reaches: seen where they are drawn."""

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeAlias
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from samestep.audit.experiments import Experiments
from samestep.audit.gradients import relative_difference
from samestep.audit.subject import Gradient, Split

Run: TypeAlias = tuple[Split, Mapping[str, object]]
"""A split, and the settings that it is run under."""


class _Draws:
    """Counts what draws random numbers inside of a block.

    Args:
        skips: Let every one draw once in vain before, so that it gets other numbers.

    Attributes:
        calls: How often something was drawn.
        numbers: How many numbers.
    """

    def __init__(self, *, skips: bool = False) -> None:
        self.calls = self.numbers = 0
        self.skips = skips

    def draw(self, function: Callable[[], Any], in_vain: Callable[[], Any]) -> Any:
        """What a function draws, seen."""
        if self.skips:
            in_vain()
        result = function()
        self.calls += 1
        self.numbers += result.numel() if isinstance(result, Tensor) else np.size(result)
        return result

    @contextlib.contextmanager
    def watched(self) -> Iterator["_Draws"]:
        """A block in which PyTorch's operations are seen, and generators that are made in it."""
        generator = self._seen(np.random.Generator, "random")

        def default_rng(*args: Any, **options: Any) -> Any:
            return generator(made(*args, **options).bit_generator)

        made = np.random.default_rng
        with (
            _Operations(self),
            mock.patch.object(np.random, "default_rng", default_rng),
            mock.patch.object(np.random, "Generator", generator),
            mock.patch.object(
                np.random, "RandomState", self._seen(np.random.RandomState, "random_sample")
            ),
            mock.patch.object(random, "Random", self._seen(random.Random, "random")),
        ):
            yield self

    def _seen(self, kind: type, draw: str) -> Any:
        """A kind of generator of which every method is seen."""
        draws = self

        class Seen(kind):  # type: ignore[misc]
            def __getattribute__(self, name: str) -> Any:
                value = super().__getattribute__(name)
                if not callable(value) or name.startswith("_"):
                    return value
                in_vain = super().__getattribute__(draw)

                def drawn(*args: Any, **options: Any) -> Any:
                    return draws.draw(partial(value, *args, **options), in_vain)

                return drawn

        return Seen


class _Operations(TorchDispatchMode):
    """Sees PyTorch's operations that draw, of whatever generator."""

    def __init__(self, draws: _Draws) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._draws = draws

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        run = partial(function, *args, **(kwargs or {}))
        draws = torch.Tag.nondeterministic_seeded in function.tags
        return self._draws.draw(run, run) if draws else run()


def drawn_otherwise(experiments: Experiments, run: Run, reference: Run) -> float | None:
    """How far a gradient changes with random numbers that another run draws otherwise, relative.

    Args:
        experiments: The subject's.
        run: The one at fault.
        reference: What it should be.

    Returns:
        None if both draw as often and as many, as where each example has numbers of its own; or if
        what is drawn does not matter.
    """
    try:
        own, drawn = _watched(experiments, run)
        _, expected = _watched(experiments, reference)
        if (drawn.calls, drawn.numbers) == (expected.calls, expected.numbers):
            return None
        other, _ = _watched(experiments, run, skips=True)
    except Exception:  # some compiled code cannot run under a watch
        return None
    moved = relative_difference(other, own)
    return moved if moved > experiments.residual_tolerance else None


def _watched(experiments: Experiments, run: Run, *, skips: bool = False) -> tuple[Gradient, _Draws]:
    split, changes = run
    with _Draws(skips=skips).watched() as draws:
        return experiments.rerun(split, **changes).gradient, draws
