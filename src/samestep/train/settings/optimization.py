"""Settings of the optimizer and of the learning rate, what they apply to, and their average."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

import tyro
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from samestep.train.optim import COOLDOWNS, OPTIMIZERS, OPTIONS, SCHEDULES
from samestep.utils.flags import leaf
from samestep.utils.plugins import is_reference


def row_of(table: Mapping[str, Any]) -> Any:
    """Checks a field that names a row of a table, or by its form an object of the user's own.

    Args:
        table: Rows by name.

    Returns:
        What to annotate the field with.
    """

    def check(name: str) -> str:
        if name not in table and not is_reference(name):
            raise PydanticCustomError(
                "not_in_table",
                "should be {expected}, or file.py:name or package.module:name of one of your own",
                {"expected": " or ".join(repr(row) for row in table)},
            )
        return name

    return AfterValidator(check)


def shown_as(table: Mapping[str, Any]) -> Any:
    """How ``--help`` shows the values of such a field.

    Args:
        table: Rows by name.

    Returns:
        What to annotate the field with.
    """
    names = "{" + ",".join(table) + "}"
    own = "FILE.py:NAME|MODULE:NAME"
    # Beside many names the short form leaves the line within 80 columns; the page tells both.
    return tyro.conf.arg(metavar=f"{names}|{own if len(names) < 48 else 'FILE:NAME'}")


def _problem_of(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        return f"{pattern!r} is no regular expression ({error})"
    return ""


def check_patterns(patterns: Any) -> Any:
    """Check that names or patterns can be read as regular expressions.

    Args:
        patterns: Texts, or a mapping by texts.

    Returns:
        The same.

    Raises:
        PydanticCustomError: Those that cannot.
    """
    wrong = [problem for problem in map(_problem_of, patterns) if problem]
    if wrong:
        raise PydanticCustomError("no_pattern", "{wrong}", {"wrong": "; ".join(wrong)})
    return patterns


def pairs_of_flags(value: Any) -> Any:
    """What flags give as NAME=VALUE, as a mapping; anything else as it is.

    Args:
        value: A text or several, or what a file holds.

    Returns:
        The mapping.
    """
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        return value
    if not all("=" in text for text in texts):
        raise PydanticCustomError("no_pairs", "should be NAME=VALUE, one or several")
    return dict(text.rsplit("=", 1) for text in texts)


ByName = Annotated[
    dict[str, Annotated[float, Field(ge=0)]],
    AfterValidator(check_patterns),
    BeforeValidator(pairs_of_flags),
    leaf("PATTERN=NUMBER ..."),
]
"""Numbers by a regular expression that is searched for in the names of weights."""


class OptimizationFields(BaseModel):
    """The fields of a run's settings that say how a gradient becomes an update."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    optimizer: Annotated[str, row_of(OPTIMIZERS), shown_as(OPTIMIZERS)] = "adamw"
    """Update rule: PyTorch's own, or a subclass of torch.optim.Optimizer of one's own."""
    betas: tuple[float, float] | None = None
    """adamw, and adamw's part of muon: how slowly both averages move; PyTorch's 0.9 0.999."""
    eps: float | None = Field(default=None, gt=0)
    """adamw: what is added to the root of the second average; PyTorch's 1e-8."""
    momentum: float | None = Field(default=None, ge=0, lt=1)
    """sgd, muon: the share of the last direction that stays; 0, and for muon 0.95."""
    lr: float = Field(default=2e-5, gt=0)
    """Peak learning rate; with --lora-rank ten times as high by default, 2e-4."""
    lr_by_name: ByName = Field(default={})
    """Another peak for weights in whose name a regular expression is found; the first decides."""
    schedule: Annotated[str, row_of(SCHEDULES), shown_as(SCHEDULES)] = "linear"
    """How the learning rate falls after warm-up; linear and cosine end at 0."""
    warmup: float = Field(default=0.0, ge=0)
    """Warm-up: a share of the steps if below 1, else a number of steps."""
    cooldown: float = Field(default=0.1, gt=0)
    """wsd, cooldown: the steps at the end in which the rate falls, a share if below 1."""
    min_lr_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Where the schedule ends, as a share of the peak."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay, on matrices only."""
    weight_decay_by_name: ByName = Field(default={})
    """Another weight decay for weights by name, as --lr-by-name; vectors too."""
    freeze: Annotated[
        tuple[str, ...], AfterValidator(check_patterns), leaf("PATTERN ...", many=True)
    ] = ()
    """Weights that do not train: those in whose name a regular expression is found."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Clip the gradient's global norm; None: do not."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Average the weights, once a step: the share of the average that stays, such as 0.999. The
    average is what is evaluated and becomes OUT/model."""


def optimization_problems(settings: OptimizationFields) -> list[str]:
    """Contradictions between the settings of the optimizer and the learning rate, a line each.

    Args:
        settings: Each field right by itself.

    Returns:
        The lines.
    """
    problems = []
    row = OPTIMIZERS.get(settings.optimizer)
    if row is not None:
        given = [name for name in OPTIONS if getattr(settings, name) is not None]
        takes = " and ".join(row.takes) or "none of these"
        problems += [
            f"{name}: {settings.optimizer} takes {takes}" for name in given if name not in row.takes
        ]
    if settings.betas is not None and not all(0 <= beta < 1 for beta in settings.betas):
        shown = " ".join(map(str, settings.betas))
        problems.append(f"betas: each from 0 up to, not with, 1, not {shown}")
    if any(rate == 0 for rate in settings.lr_by_name.values()):
        problems.append("lr_by_name: a rate of 0 trains nothing: name those weights in freeze")
    default = OptimizationFields.model_fields["cooldown"].default
    if settings.cooldown != default and settings.schedule not in COOLDOWNS:
        problems.append(
            f"cooldown belongs to schedule {' and '.join(COOLDOWNS)}, and this is "
            f"{settings.schedule}"
        )
    if settings.min_lr_ratio and settings.schedule == "constant":
        problems.append("min_lr_ratio: schedule constant never falls")
    shares = [value for value in (settings.warmup, settings.cooldown) if value < 1]
    if settings.schedule in COOLDOWNS and len(shares) == 2 and sum(shares) > 1:
        problems.append(
            f"warmup and cooldown: {settings.warmup:g} and {settings.cooldown:g} of the steps are "
            "more than all"
        )
    return problems
