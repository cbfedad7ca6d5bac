"""Which evaluation was the best so far, and whether the run has waited long enough for a better."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from samestep.engine.evaluate import EvalReport
from samestep.errors import ConfigError
from samestep.train.settings.evaluation import EvaluationFields, higher_is_better, split_best
from samestep.utils.plugins import nearest


@dataclass(frozen=True)
class Choice:
    """What is known of the best evaluation; a checkpoint keeps it.

    Attributes:
        judged: The step of the last evaluation that counted; 0: none did yet.
        step: The step of the best one; None: there is none yet.
        value: Its value.
        worse: Evaluations since then, none of which was better.
    """

    judged: int = 0
    step: int | None = None
    value: float | None = None
    worse: int = 0

    def after(
        self, step: int, value: float, *, higher: bool, min_improvement: float = 0.0
    ) -> "Choice":
        """The choice after one more evaluation; of equal values the first stays the best.

        Args:
            step: After which step.
            value: What the choice goes by.
            higher: Whether a higher value is better.
            min_improvement: By how much it has to be better.

        Returns:
            The new choice.
        """
        gain = math.inf
        if self.value is not None:
            gain = value - self.value if higher else self.value - value
        if not math.isnan(value) and gain > min_improvement:
            return Choice(judged=step, step=step, value=value)
        return replace(self, judged=step, worse=self.worse + 1)


def value_of_best(settings: EvaluationFields, reports: Mapping[str, EvalReport]) -> float:
    """The number that ``best`` names.

    Args:
        settings: ``best``.
        reports: The evaluations of a step by the name of their set.

    Returns:
        The number.

    Raises:
        ConfigError: The evaluation has no such number.
    """
    assert settings.best is not None
    name, value = split_best(settings.best)
    values = {"loss": reports[name].loss, **reports[name].terms}
    check_best(settings, values)
    return values[value]


def check_best(settings: EvaluationFields, names: Mapping[str, Any]) -> None:
    """Refuse a ``best`` that no evaluation has.

    Args:
        settings: ``best``.
        names: What an evaluation has, "loss" included.

    Raises:
        ConfigError: It is not among them.
    """
    assert settings.best is not None
    value = split_best(settings.best)[1]
    if value not in names:
        raise ConfigError(
            f"best: the evaluation has no {value!r}{nearest(value, names)} (it has: "
            f"{', '.join(names)}; metrics adds others)"
        )


def judge(
    choice: Choice, reports: Mapping[str, EvalReport], *, step: int, settings: EvaluationFields
) -> Choice:
    """The choice after the evaluations of a step; that before the first step does not count.

    Args:
        choice: Before.
        reports: The evaluations by the name of their set.
        step: After which step.
        settings: ``best``, ``best_is``, ``min_improvement``.

    Returns:
        After; the same where nothing is chosen.

    Raises:
        ConfigError: As for `value_of_best`.
    """
    if settings.best is None:
        return choice
    value, higher = value_of_best(settings, reports), higher_is_better(settings)
    if step == 0 or choice.judged == step:
        return choice
    assert higher is not None
    margin = settings.min_improvement
    return choice.after(step, value, higher=higher, min_improvement=margin)
