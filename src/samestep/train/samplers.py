"""Samplers of the user's own, such as a server: asked, asked again while out of reach, checked."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypeVar

from samestep.engine.collectives import on_rank_0
from samestep.errors import ConfigError, RolloutError, StopRequestedError
from samestep.train.sampling import Completion
from samestep.utils.plugins import load_object

log = logging.getLogger("samestep")

_LONGEST_PAUSE = 30.0
_NO_CONNECTION = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""Errors of the system that asking again does not mend."""
_BUSY = (408, 425, 429)
"""Answers of a server below 500 that mean "later"."""

Beat = Callable[[], None]
Result = TypeVar("Result")


@dataclass(frozen=True)
class SampleRequest:
    """What a sampler is asked for.

    Attributes:
        prompts: Token ids of each prompt.
        seeds: A number for each completion of each prompt, below 2**32: a function of the run's
            seed, the step, the row and the completion alone.
        max_tokens: How many tokens a completion has at most.
        temperature: Of sampling.
        end_tokens: Those that end a completion, and are its last one.
        vocabulary: How many tokens there are.
        step: The number of the step, from 0.
        tokenizer: Of the model.
    """

    prompts: Sequence[Sequence[int]]
    seeds: Sequence[Sequence[int]]
    max_tokens: int
    temperature: float
    end_tokens: Sequence[int]
    vocabulary: int
    step: int
    tokenizer: Any


class OutsideSampler:
    """A sampler by reference.

    Args:
        reference: ``file.py:name`` or ``package.module:name`` of a function of a `SampleRequest`,
            or of a class whose instances are called so. What has a method ``update(model, step)``
            is given the weights with it, on rank 0, before each step.
        timeout: Seconds for which it is asked again while it cannot be reached.

    Raises:
        ConfigError: There is none, or it cannot be called.
    """

    def __init__(self, reference: str, *, timeout: float) -> None:
        found = load_object(reference, what="sampler")
        if isinstance(found, type):
            try:
                found = found()
            except TypeError as error:
                raise ConfigError(
                    f"sampler: {reference} must take no arguments: {error}"
                ) from error
        if not callable(found):
            raise ConfigError(
                f"sampler: {reference} is {type(found).__name__}, not a function (request) to "
                "token ids; name it as file.py:function"
            )
        self._reference, self._timeout, self._sampler = reference, timeout, found

    def update(self, model: Any, step: int, *, beat: Beat) -> None:
        """Give it the weights of a step, if it takes them; every rank must call this.

        Args:
            model: The policy.
            step: The step's number.
            beat: Called while it waits.

        Raises:
            RolloutError: It cannot be reached, or fails.
        """
        update = getattr(self._sampler, "update", None)
        if update is not None:
            on_rank_0(lambda: self._ask(lambda: update(model, step), beat))

    def __call__(
        self, request: SampleRequest, rows: Sequence[str], *, beat: Beat
    ) -> list[list[Completion]]:
        """The completions of some prompts.

        Args:
            request: What is asked for.
            rows: Where each prompt is from, for messages.
            beat: Called while it waits.

        Returns:
            Those of each prompt.

        Raises:
            RolloutError: It cannot be reached, fails, or answers something else.
        """
        answer = self._ask(lambda: self._sampler(request), beat)
        try:
            answers = _sequence(answer, "the answer", length=len(request.prompts), of="prompts")
            return [
                [
                    _completion(each, f"{row}, completion {at}", request)
                    for at, each in enumerate(
                        _sequence(group, row, length=len(seeds), of="completions"), 1
                    )
                ]
                for group, row, seeds in zip(answers, rows, request.seeds, strict=True)
            ]
        except ValueError as error:
            raise RolloutError(f"sampler: {self._reference}: {error}") from None

    def _ask(self, question: Callable[[], Result], beat: Beat) -> Result:
        deadline, pause = time.monotonic() + self._timeout, 1.0
        while True:
            beat()
            try:
                return question()
            except (StopRequestedError, RolloutError):
                raise
            except Exception as error:  # the user's code may raise anything
                said = f"{type(error).__name__}: {error}"
                if not _may_pass(error):
                    raise RolloutError(f"sampler: {self._reference} fails: {said}") from error
                left = deadline - time.monotonic()
                if left <= 0:
                    raise RolloutError(
                        f"sampler: {self._reference} could not be reached for "
                        f"{self._timeout:g} s (--sampler-timeout): {said}"
                    ) from error
                log.warning("sampler: %s; asked again in %.0f s", said, min(pause, left))
            _wait(min(pause, left), beat)
            pause = min(2 * pause, _LONGEST_PAUSE)


def _may_pass(error: Exception) -> bool:
    """Whether an error is of a connection or a server, which may be there again in a while."""
    if not isinstance(error, OSError) or isinstance(error, _NO_CONNECTION):
        return False
    response = getattr(error, "response", None)
    status = getattr(error, "code", None) or getattr(response, "status_code", None)
    return not isinstance(status, int) or status >= 500 or status in _BUSY


def _wait(seconds: float, beat: Beat) -> None:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        beat()
        time.sleep(min(1.0, left))


def _sequence(value: Any, what: str, *, length: int, of: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{what} is {type(value).__name__}, not a list of {length} {of}")
    if len(value) != length:
        raise ValueError(f"{what} has {len(value)} {of}, and {length} were asked for")
    return value


def _completion(value: Any, what: str, request: SampleRequest) -> Completion:
    """A completion from token ids, or from ``ids`` with ``log_p``."""
    numbers: Any = ()
    if isinstance(value, Mapping):
        numbers, value = value.get("log_p") or (), value.get("ids")
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, list | tuple) or not all(isinstance(each, Integral) for each in value):
        raise ValueError(f"{what} must be token ids, or {{ids, log_p}}, found {str(value)[:60]!r}")
    ids = tuple(int(each) for each in value)
    if not 0 < len(ids) <= request.max_tokens:
        raise ValueError(
            f"{what} has {len(ids)} tokens; at least 1, at most {request.max_tokens} "
            "(max_completion_length)"
        )
    wrong = [each for each in ids if not 0 <= each < request.vocabulary]
    if wrong:
        raise ValueError(f"{what} has token {wrong[0]}, and there are {request.vocabulary}")
    inner = next((at for at, each in enumerate(ids[:-1]) if each in request.end_tokens), None)
    if inner is not None:
        raise ValueError(f"{what} goes on after token {ids[inner]}, which ends it")
    if not all(isinstance(each, Real) and float(each) <= 1e-6 for each in numbers):
        raise ValueError(f"{what} has log_p that are no log-probabilities")
    if len(numbers) not in (0, len(ids)):
        raise ValueError(f"{what} has {len(numbers)} log_p for {len(ids)} tokens")
    return Completion(ids, ids[-1] in request.end_tokens, tuple(map(float, numbers)))
