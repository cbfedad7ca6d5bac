"""Reward functions of the user's own: found and checked before a run, called prompt by prompt.

A call sees the completions of one prompt. So what it says of them depends neither on the batch nor
on the rank that generated them, and an error names the row.
"""

import inspect
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import Tensor

from samestep.data.readers.prompts import PromptRow, PromptRows
from samestep.errors import ConfigError, DataError, RolloutError, StopRequestedError
from samestep.train.settings.rollouts import RolloutFields, reward_names
from samestep.utils.plugins import load_object, nearest

_GIVEN = ("prompts", "completions", "completion_ids")
"""What a function may take beside the columns; named as in TRL."""


@dataclass(frozen=True)
class RewardFunction:
    """A function of the user's own.

    Attributes:
        reference: As the settings name it.
        name: What the log calls it.
        weight: Its factor.
        function: The function.
        takes: The arguments that it takes by name; None: any.
        needs: Those that have no default.
    """

    reference: str
    name: str
    weight: float
    function: Callable[..., Any]
    takes: frozenset[str] | None
    needs: tuple[str, ...]


def load_rewards(settings: RolloutFields) -> list[RewardFunction]:
    """The reward functions that the settings name.

    Args:
        settings: ``reward_funcs``, ``reward_weights``.

    Returns:
        The functions.

    Raises:
        ConfigError: There is no such function, or it is none; says it of all of them.
    """
    names = reward_names(settings.reward_funcs)
    weights = settings.reward_weights or (1.0,) * len(names)
    given = zip(settings.reward_funcs, names, weights, strict=True)
    found = [_load_or_problem(*each) for each in given]
    problems = [each for each in found if isinstance(each, str)]
    if problems:
        raise ConfigError("\n".join(problems))
    return [each for each in found if not isinstance(each, str)]


def _load_or_problem(reference: str, name: str, weight: float) -> RewardFunction | str:
    try:
        return _load(reference, name=name, weight=weight)
    except ConfigError as error:
        return str(error)


def _load(reference: str, *, name: str, weight: float) -> RewardFunction:
    function = load_object(reference, what="reward_funcs")
    if isinstance(function, type) or not callable(function):
        raise ConfigError(
            f"reward_funcs: {reference} is {type(function).__name__}, not a function (prompts, "
            "completions, **columns) that returns a number for each completion; name it as "
            "file.py:function"
        )
    if inspect.iscoroutinefunction(function):
        raise ConfigError(f"reward_funcs: {reference} is async: give a plain function")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C: it is called with everything
        return RewardFunction(reference, name, weight, function, None, ())
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    by_name = {each.name: each for each in parameters if each.kind not in variable}
    any_name = any(each.kind == each.VAR_KEYWORD for each in parameters)
    needs = tuple(name for name, each in by_name.items() if each.default is each.empty)
    takes = None if any_name else frozenset(by_name)
    return RewardFunction(reference, name, weight, function, takes, needs)


def check_columns(functions: Iterable[RewardFunction], rows: PromptRows) -> None:
    """Refuse rows that lack what a reward function needs, before anything is generated.

    Args:
        functions: Of `load_rewards`.
        rows: Of the prompts.

    Raises:
        DataError: A column is missing; says it of all of them.
    """
    known = dict.fromkeys(name for row in rows for name in row.columns)
    problems = []
    for each in functions:
        for name in each.needs:
            if name not in {*_GIVEN, *known}:
                columns = ", ".join(known) or "none beside prompt"
                problems.append(
                    f"reward_funcs: {each.reference} needs {name!r}, which no row has"
                    f"{nearest(name, [*_GIVEN, *known])} (columns: {columns}; beside them it may "
                    f"take {', '.join(_GIVEN)})"
                )
    if problems:
        raise DataError("\n".join(problems))


@dataclass(frozen=True)
class Scored:
    """The rewards of a prompt's completions.

    Attributes:
        parts: By function, one for each completion.
        problems: What was wrong, a line each; then the rewards mean nothing.
        timed_out: Whether a function took too long.
    """

    parts: Mapping[str, list[float]]
    problems: tuple[str, ...] = ()
    timed_out: bool = False


def score(
    functions: Sequence[RewardFunction],
    row: PromptRow,
    *,
    completions: Sequence[str],
    ids: Sequence[Sequence[int]],
    timeout: float,
    beat: Callable[[], None] = lambda: None,
) -> Scored:
    """The rewards of a prompt's completions.

    Args:
        functions: Of `load_rewards`.
        row: The prompt, and its other columns.
        completions: Their texts; where the prompt is a conversation, a function gets messages.
        ids: Their tokens.
        timeout: Seconds that a function may take.
        beat: Called at least once a second.

    Returns:
        What was found, problems included.
    """
    number = len(completions)
    texts = [[{"role": "assistant", "content": text}] for text in completions]
    given = {
        **{name: [value] * number for name, value in row.columns.items()},
        "prompts": [row.prompt] * number,
        "completions": texts if row.is_conversation else list(completions),
        "completion_ids": [list(each) for each in ids],
    }
    parts: dict[str, list[float]] = {}
    problems = []
    timed_out = False
    for each in functions:
        taken = {name: given[name] for name in given if each.takes is None or name in each.takes}
        outcome = _outcome(each, taken, completions=completions, timeout=timeout, beat=beat)
        if isinstance(outcome, list):
            parts[each.name] = outcome
            continue
        timed_out = outcome is None
        what = f"takes longer than {timeout:g} s (--reward-timeout)" if timed_out else outcome
        problems.append(f"{row.origin}: {each.reference} {what}")
        if timed_out:
            break
    return Scored(parts, tuple(problems), timed_out)


def _outcome(
    each: RewardFunction,
    arguments: Mapping[str, Any],
    *,
    completions: Sequence[str],
    timeout: float,
    beat: Callable[[], None],
) -> list[float] | str | None:
    """A function's rewards, or what is wrong with it; None: it took too long."""
    try:
        values = _within(timeout, each.function, arguments, beat=beat)
        return _numbers(values, completions)
    except TimeoutError:
        return None
    except StopRequestedError:
        raise
    except RolloutError as error:
        return str(error)
    except Exception as error:  # the user's code may raise anything
        return f"fails: {type(error).__name__}: {error}"


def _within(
    seconds: float,
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    *,
    beat: Callable[[], None],
) -> Any:
    """What a function returns, unless it takes too long; it is then left behind."""
    found: list[Any] = []
    failed: list[BaseException] = []

    def call() -> None:
        try:
            found.append(function(**arguments))
        except BaseException as error:
            failed.append(error)

    # A daemon: one that never ends does not keep the process.
    thread = threading.Thread(target=call, daemon=True, name="samestep-reward")
    thread.start()
    deadline = time.monotonic() + seconds
    while thread.is_alive() and (left := deadline - time.monotonic()) > 0:
        beat()
        thread.join(min(1.0, left))
    if thread.is_alive():
        raise TimeoutError
    if failed:
        error = failed[0]
        if isinstance(error, TimeoutError) or not isinstance(error, Exception):
            raise RolloutError(f"fails: {type(error).__name__}: {error}")
        raise error
    return found[0]


def _numbers(values: Any, completions: Sequence[str]) -> list[float]:
    """The rewards that a function returned, one for each completion."""
    if isinstance(values, Tensor) or hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, list | tuple):
        raise RolloutError(
            f"returns {_shown(values)}; it must return a list of numbers, one for each of the "
            f"{len(completions)} completions"
        )
    if len(values) != len(completions):
        raise RolloutError(f"returns {len(values)} numbers for {len(completions)} completions")
    numbers = []
    for at, value in enumerate(values):
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        try:
            number = float(value) if isinstance(value, Real) else math.nan
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise RolloutError(
                f"returns {_shown(value)} for completion {at + 1} ({_shown(completions[at])}); a "
                "reward must be a finite number"
            )
        numbers.append(number)
    return numbers


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
