"""Settings of evaluation: the sets, the metrics beside the loss, and what is chosen by them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from samestep.utils.flags import leaf
from samestep.utils.messages import describe_validation_errors
from samestep.utils.plugins import is_reference, nearest
from samestep.utils.sources import DataSource, Source, parts_of


@dataclass(frozen=True)
class MetricRow:
    """A row of `METRICS`.

    Attributes:
        about: What it is, for the docs.
        higher: Whether a higher value is better.
    """

    about: str
    higher: bool


METRICS = {
    "perplexity": MetricRow("exp of the mean negative log likelihood of a target", False),
    "token_accuracy": MetricRow("share of targets that are the likeliest token", True),
    "sequence_accuracy": MetricRow("share of rows with every target the likeliest token", True),
    "exact_match": MetricRow(
        "share of rows whose generated answer is their completion (`answer_pattern`)", True
    ),
}
"""What ``metrics`` may name."""

METRIC_OBJECTIVES = ("causal_lm", "vision_language", "distillation")
"""The objectives whose micro-batches the metrics of the table read."""

ANSWER_OBJECTIVES = ("causal_lm", "distillation")
"""The objectives whose models answer prompts."""

_LOWER = ("loss", "nll", "perplexity", "error")
_HIGHER = ("accuracy", "match", "reward", "margin", "f1", "bleu", "rouge")


def one_or_several(value: Any) -> Any:
    """One source as itself, as it always was; several as a tuple."""
    if isinstance(value, list | tuple):
        sources = tuple(map(_source, value))
        return sources[0] if len(sources) == 1 else sources
    return _source(value)


def _source(value: Any) -> Any:
    """A source that a file gives by fields, checked; anything else as it is."""
    if not isinstance(value, Mapping):
        return value
    try:
        return DataSource(**value)
    except ValidationError as error:
        lines = describe_validation_errors(error, DataSource.model_fields)
        raise PydanticCustomError(
            "no_source",
            "{place}: {lines}",
            {"place": value.get("path", "a source"), "lines": "; ".join(lines)},
        ) from None


def _named_sets(value: Any) -> Any:
    if not isinstance(value, Mapping) or "path" in value:
        return one_or_several(value)
    wrong = [name for name in value if not isinstance(name, str) or not name or "/" in name]
    if wrong or not value:
        raise PydanticCustomError(
            "names_of_sets",
            "the sets need names without a slash, as in 'math: math.jsonl' ({wrong})",
            {"wrong": f"not {', '.join(map(repr, wrong))}" if wrong else "there is none"},
        )
    return {name: one_or_several(source) for name, source in value.items()}


def _check_metrics(names: tuple[str, ...]) -> tuple[str, ...]:
    wrong = [name for name in names if name not in METRICS and not is_reference(name)]
    if wrong:
        raise PydanticCustomError(
            "no_metric",
            "there is no metric {wrong} (known: {known}, or file.py:name of one of your own)",
            {
                "wrong": ", ".join(f"{name!r}{nearest(name, METRICS)}" for name in wrong),
                "known": ", ".join(METRICS),
            },
        )
    return names


class EvaluationFields(BaseModel):
    """The fields of a run's settings that say how it is evaluated, and what follows from it."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    eval_data: Annotated[
        Source | dict[str, Source] | None,
        BeforeValidator(_named_sets),
        leaf("SOURCE ..."),
    ] = None
    """Rows to evaluate on, before, after, and every --eval-every steps. In YAML several sets may
    have names, as in {math: a.jsonl, code: b.jsonl}: each is evaluated by itself."""
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations."""
    metrics: Annotated[
        tuple[str, ...], AfterValidator(_check_metrics), leaf("NAME ...", many=True)
    ] = ()
    """What to report beside the loss: perplexity, token_accuracy, sequence_accuracy, exact_match,
    or file.py:name of a function (model, micro-batch) to terms."""
    answer_pattern: str | None = None
    """exact_match: a regular expression; what it finds in answer and completion is compared."""
    samples: int = Field(default=0, ge=0)
    """Answers to so many rows of each set are written to OUT/samples.jsonl at every evaluation."""
    sample_tokens: int = Field(default=64, ge=1)
    """Tokens that an answer of exact_match and samples has at most."""
    best: str | None = None
    """Choose the model by this number of the evaluations (loss, a term or a metric; SET/NAME where
    sets have names): the best checkpoint is kept, and becomes OUT/model."""
    best_is: Literal["auto", "lowest", "highest"] = "auto"
    """Which value of --best is best; auto knows it of losses, perplexities and accuracies."""
    patience: int | None = Field(default=None, ge=1)
    """End the run after this many evaluations in a row that were not better than the best."""
    min_improvement: float = Field(default=0.0, ge=0)
    """By how much a value of --best has to be better to count as better."""


CHOSEN_BY = ("eval_data", "eval_every", "metrics", "answer_pattern", "sample_tokens")
"""Fields that a resumed run may change, but not where ``best`` chooses by what they say."""

EVALUATION_MAY_CHANGE = (*CHOSEN_BY, "samples", "patience")
"""Fields that a resumed run may change."""


def evaluation_sets(settings: EvaluationFields) -> dict[str, Source]:
    """The sets to evaluate on, by name; the name of one that has none is empty.

    Args:
        settings: ``eval_data``.

    Returns:
        Sources by name, in the order of the settings.
    """
    data = settings.eval_data
    if not data:
        return {}
    return dict(data) if isinstance(data, dict) else {"": data}


def split_best(best: str) -> tuple[str, str]:
    """The set and the number that ``best`` names; the set is empty where there is no slash."""
    name, slash, value = best.partition("/")
    return (name, value) if slash else ("", best)


def higher_is_better(settings: EvaluationFields) -> bool | None:
    """Whether a higher value of ``best`` is better; None: nobody says so.

    Args:
        settings: ``best``, ``best_is``.

    Returns:
        The answer.
    """
    assert settings.best is not None
    if settings.best_is != "auto":
        return settings.best_is == "highest"
    name = split_best(settings.best)[1]
    if name in METRICS:
        return METRICS[name].higher
    lower, higher = (any(word in name for word in words) for words in (_LOWER, _HIGHER))
    return None if lower == higher else higher


def evaluation_problems(settings: EvaluationFields, objective: str) -> list[str]:
    """Contradictions between the settings of evaluation, a line each.

    Args:
        settings: Each field right by itself.
        objective: Its name.

    Returns:
        The lines.
    """
    problems = []
    sets = evaluation_sets(settings)
    own = [name for name in settings.metrics if name in METRICS]
    if own and objective not in METRIC_OBJECTIVES and not is_reference(objective):
        problems.append(
            f"metrics: {', '.join(own)} belong to objective {', '.join(METRIC_OBJECTIVES)}, and "
            f"this is {objective}; file.py:name of a function of your own goes with any"
        )
    shares = [
        part.path
        for source in sets.values()
        for part in parts_of(source)
        if part.weight or part.rows
    ]
    if shares:
        problems.append(
            f"eval_data: {', '.join(shares)} must have neither weight nor rows: a set is evaluated "
            "whole"
        )
    problems += _problems_of_answers(settings, objective)
    needing = [name for name in ("metrics", "samples", "best") if getattr(settings, name)]
    if needing and not sets:
        problems.append(f"{' and '.join(needing)}: there is nothing to evaluate on: give eval_data")
    if settings.best is None:
        with_best = {"patience": None, "min_improvement": 0.0, "best_is": "auto"}
        given = [name for name, default in with_best.items() if getattr(settings, name) != default]
        problems += [f"{name} is given without best" for name in given]
        return problems
    return problems + _problems_of_best(settings, sets)


def _problems_of_answers(settings: EvaluationFields, objective: str) -> list[str]:
    problems = []
    if settings.samples and objective not in ANSWER_OBJECTIVES:
        problems.append(f"samples belongs to objective {', '.join(ANSWER_OBJECTIVES)}")
    if "exact_match" in settings.metrics and objective not in ANSWER_OBJECTIVES:
        problems.append(f"exact_match belongs to objective {', '.join(ANSWER_OBJECTIVES)}")
    if settings.answer_pattern is None:
        return problems
    if "exact_match" not in settings.metrics:
        problems.append("answer_pattern is given without exact_match in metrics")
    try:
        re.compile(settings.answer_pattern)
    except re.error as error:
        problems.append(
            f"answer_pattern: {settings.answer_pattern!r} is no regular expression ({error})"
        )
    return problems


def _problems_of_best(settings: EvaluationFields, sets: Mapping[str, Source]) -> list[str]:
    assert settings.best is not None
    problems = []
    if settings.eval_every is None:
        problems.append(
            "best: without eval_every the model is evaluated once, at the end: give eval_every"
        )
    name, _ = split_best(settings.best)
    if sets and name not in sets:
        known = ", ".join(sets)
        problems.append(
            f"best: {settings.best!r} must say of which set, as SET/NAME (sets: {known})"
            if not name
            else f"best: there is no set {name!r}{nearest(name, sets)}"
            + (f" (sets: {known})" if known else ": eval_data names none")
        )
    if higher_is_better(settings) is None:
        problems.append(
            f"best: whether a high {settings.best} is good is not known: give best_is, lowest or "
            "highest"
        )
    return problems
