"""`samestep.windows`: the micro-batches of an accelerate loader, each with its loss's factor."""

import functools
from collections.abc import Iterator
from typing import Any

from samestep.engine.collectives import gather_results
from samestep.errors import ConfigError, StepError
from samestep.loops.units import Unit, check_unit, count_units, first_rows, first_tensor


def windows(loader: Any, accelerator: Any, *, unit: Unit) -> Iterator[tuple[Any, float]]:
    """Yield the micro-batches of a loader, each with what its mean loss is multiplied by.

    A window of ``gradient_accumulation_steps`` micro-batches is fetched and counted, over the
    ranks too, before its first one is yielded. With the factor the gradient of the window is the
    sum over all units divided once, also in a short last window. Everything else of the loop
    stays: ``accelerator.accumulate``, ``backward``, clipping.

    Args:
        loader: Made by ``accelerator.prepare``.
        accelerator: The `accelerate.Accelerator`.
        unit: What the loss is a mean over: ``labels`` (those that are not -100),
            ``shifted-labels`` (next tokens), ``rows``, or a function that counts in a micro-batch.

    Returns:
        Pairs of a micro-batch and its factor; 0 for one without units, whose mean may be NaN: take
        ``logits.sum() * 0`` for its loss then.

    Raises:
        ConfigError: The unit is unknown, or the loader was not prepared by this accelerator.
        StepError: A micro-batch cannot be counted.

    Example:
        >>> import torch, samestep
        >>> from accelerate import Accelerator
        >>> accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        >>> rows = [torch.ones(3), torch.ones(1), torch.ones(4)]
        >>> loader = accelerator.prepare(torch.utils.data.DataLoader(rows, batch_size=None))
        >>> [factor for _, factor in samestep.windows(loader, accelerator, unit=len)]
        [1.5, 0.5, 2.0]
    """
    check_unit(unit)
    if not hasattr(loader, "end_of_dataloader"):
        raise ConfigError(
            f"windows() takes a loader that accelerator.prepare made, not {type(loader).__name__}: "
            "the accelerator steps at the end of those alone"
        )
    if not accelerator.gradient_state.sync_with_dataloader:
        raise ConfigError(
            "windows() needs sync_with_dataloader=True (the default): without it the last window "
            "of an epoch is finished by the next one, which is not counted yet"
        )
    return _windows(loader, accelerator, unit)


def _windows(loader: Any, accelerator: Any, unit: Unit) -> Iterator[tuple[Any, float]]:
    steps: int = accelerator.gradient_accumulation_steps
    if accelerator.step % steps:
        raise StepError(
            f"a window begins after {accelerator.step % steps} of {steps} micro-batches of another "
            "one: let accelerator.accumulate finish each window, or set accelerator.step = 0"
        )
    batches = iter(loader)
    ended = False
    while not ended:
        window: list[Any] = []
        for micro in batches:
            window.append(micro)
            ended = bool(loader.end_of_dataloader)
            if ended or len(window) == steps:
                break
        else:
            ended = True
        if not window:
            return
        if ended:
            window[-1], repeats_only = _without_repeats(window[-1], accelerator)
        counts = _count(window, unit, repeats_only=ended and repeats_only)
        total = sum(gather_results(functools.partial(sum, counts)))
        scale = steps * accelerator.num_processes / total if total else 0.0
        for at, (micro, number) in enumerate(zip(window, counts, strict=True)):
            # The accelerator steps where the loader ends: that is its last one, not the first.
            loader.end_of_dataloader = ended and at == len(window) - 1
            yield micro, number * scale
    for _ in batches:  # lets the loader tell the accelerator that it is done
        pass


def _count(window: list[Any], unit: Unit, *, repeats_only: bool) -> list[float]:
    counts = [count_units(micro, unit) for micro in window]
    return [*counts[:-1], 0.0] if repeats_only else counts


def _without_repeats(micro: Any, accelerator: Any) -> tuple[Any, bool]:
    """The last micro-batch without rows that fill it up to be as long as those of other ranks."""
    remainder = accelerator.gradient_state.remainder
    if accelerator.num_processes == 1 or remainder <= 0:
        return micro, False
    rows = len(first_tensor(micro))
    keep = min(rows, max(0, remainder - accelerator.process_index * rows))
    return (first_rows(micro, keep, rows), False) if keep else (micro, True)
