"""What the gradient noise scale says about the batch itself."""

import math
from dataclasses import dataclass

from samestep.study.noise import noise_scale
from samestep.study.results import Results, Run
from samestep.study.spec import parts
from samestep.study.statistics import Estimate


@dataclass(frozen=True)
class BatchAdvice:
    """What the gradient noise scale says about the batch of one group.

    Attributes:
        group: The group.
        batch: Its effective batch, in examples.
        scale: The noise scale in examples, with its 95 % interval.
        steps: How many step estimates it is from.
        words: What it means.
    """

    group: str
    batch: int
    scale: Estimate
    steps: int
    words: str


def advise(results: Results) -> list[BatchAdvice]:
    """The noise scale of each group that has an exact arm with accumulation.

    Of several such arms the one with the most micro-batches is used.

    Args:
        results: The results.

    Returns:
        The advice, in the order of the groups.
    """
    advice = []
    for group, arms in results.groups().items():
        usable = [arm for arm in arms if any(run.noise.signal for run in arm.finished())]
        if not usable:
            continue
        arm = min(usable, key=lambda one: parts(one.split)[0])
        runs = arm.finished()
        found = noise_scale([run.noise for run in runs])
        if found is None:
            continue
        each = _targets_an_example(runs, arm.batch)
        scale = Estimate(found.value / each, found.low / each, found.high / each)
        steps = sum(len(run.noise.signal) for run in runs)
        words = _advice_words(scale, arm.batch)
        advice.append(BatchAdvice(group, arm.batch, scale, steps, words))
    return advice


def _targets_an_example(runs: list[Run], batch: int) -> float:
    targets = [number for run in runs for number in run.steps.targets]
    return sum(targets) / (len(targets) * batch)


def _advice_words(scale: Estimate, batch: int) -> str:
    if math.isnan(scale.value):
        return (
            "Not resolved: the gradient's signal could not be told from its noise. That happens "
            "where the noise scale is far above the batch; more steps or seeds would tell."
        )
    high = f"{scale.high:.3g}" if math.isfinite(scale.high) else "no upper bound"
    ways = ", ".join(
        f"{name} the batch {_steps(scale.value, batch, times):.2f} times the steps and "
        f"{_steps(scale.value, batch, times) * times:.2f} times the examples"
        for name, times in (("half", 0.5), ("twice", 2.0))
    )
    return (
        f"Noise scale {scale.value:.3g} examples (95 % interval {scale.low:.3g} to {high}). To the "
        f"same loss, by its model, {ways} of batch {batch}."
    )


def _steps(scale: float, batch: int, times: float) -> float:
    """Steps to a loss with another batch, over those with this one: they go as 1 + scale / batch.

    McCandlish et al., section 2.2, for SGD at the best learning rate of each batch.
    """
    return (1 + scale / (batch * times)) / (1 + scale / batch)
