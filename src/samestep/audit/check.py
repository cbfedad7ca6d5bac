"""The audit from Python: every axis that a subject can run, and one verdict."""

import contextlib
import functools
import inspect
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from samestep.audit.adapters.functions import LoopFunctions
from samestep.audit.adapters.held import HeldState
from samestep.audit.adapters.knobs import Knobs
from samestep.audit.adapters.loop import LoopSubject
from samestep.audit.axes.axis import Axis, AxisResult, run_axis
from samestep.audit.axes.table import AXES, DEFAULT_AXES
from samestep.audit.blame import blamed
from samestep.audit.causes import Cause, with_causes
from samestep.audit.experiments import Experiments
from samestep.audit.source import NO_FILE
from samestep.audit.subject import Subject
from samestep.errors import CheckError
from samestep.utils.plugins import load_object

PACKAGES = (
    *("samestep", "torch", "transformers", "trl", "accelerate", "lightning"),
    "sentence_transformers",
)
"""Those whose versions a report names."""


@dataclass(frozen=True)
class CheckReport:
    """The result of an audit.

    Attributes:
        subject: Its name.
        verdict: "exact" if no axis is inexact.
        axes: The results, in the order in which they ran.
        examples: Examples of the effective batch.
        dtype: What the gradients were computed in.
        seed: Of the weights and of every run.
        versions: Of Python and of the packages that are installed.

    Example:
        >>> from samestep import CheckReport
        >>> report = CheckReport(
        ...     subject="loop.py", verdict="exact", axes=(), examples=8, dtype="float64", seed=0,
        ...     versions={},
        ... )
        >>> report.verdict
        'exact'
    """

    subject: str
    verdict: Literal["exact", "inexact"]
    axes: tuple[AxisResult, ...]
    examples: int
    dtype: str
    seed: int
    versions: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def check(
    subject: Any, axes: Sequence[str | Axis] | None = None, *, causes: Sequence[Cause] = ()
) -> CheckReport:
    """Audit a training loop: does its step depend on how the batch was split, and why?

    Args:
        subject: ``"FILE.py"`` or ``"FILE.py:NAME"``; or a module, class, object or mapping with
            ``model``, ``examples``, ``collate`` and ``step`` or ``train``, or ``make_trainer``.
        axes: Names of `samestep.audit.axes.table.AXES`, and axes of your own; None: all of the
            table but those that change the loop itself (dropout, low precision).
        causes: Causes of your own, beside those of `samestep.audit.causes.CAUSES`.

    Returns:
        The report: a verdict for each axis, and a cause with its evidence where it is inexact.

    Raises:
        CheckError: The subject cannot be run, shows its own error; or an axis or a cause is wrong.

    Example:
        >>> import torch
        >>> from samestep import check
        >>> class Loop:
        ...     examples = [torch.full((n, 2), float(n)) for n in (1, 4, 2, 3)]
        ...     model = staticmethod(lambda: torch.nn.Linear(2, 1))
        ...     collate = staticmethod(torch.cat)
        ...     def step(self, model, micro_batches):
        ...         for micro_batch in micro_batches:  # a mean of means
        ...             (model(micro_batch).square().mean() / len(micro_batches)).backward()
        >>> report = check(Loop, axes=["micro-batch"])
        >>> report.verdict
        'inexact'
    """
    loop = load_subject(subject) if isinstance(subject, str) else as_subject(subject)
    return check_subject(loop, axes, causes=causes)


def assert_same_step(
    subject: Any, axes: Sequence[str | Axis] | None = None, *, causes: Sequence[Cause] = ()
) -> None:
    """Fail a test unless a training loop's step is the same under every split.

    Args:
        subject: As for `check`.
        axes: As for `check`.
        causes: As for `check`.

    Raises:
        AssertionError: An axis is inexact; names each with its cause and what to change.
        CheckError: The subject cannot be run.

    Example:
        >>> import torch
        >>> from samestep import assert_same_step
        >>> class Loop:
        ...     examples = [torch.full((n, 2), float(n)) for n in (1, 4, 2, 3)]
        ...     model = staticmethod(lambda: torch.nn.Linear(2, 1))
        ...     collate = staticmethod(torch.cat)
        ...     def step(self, model, micro_batches):
        ...         count = sum(len(micro_batch) for micro_batch in micro_batches)
        ...         for micro_batch in micro_batches:
        ...             (model(micro_batch).square().sum() / count).backward()
        >>> assert_same_step(Loop, axes=["micro-batch"])
    """
    report = check(subject, axes, causes=causes)
    lines = [describe_fault(axis) for axis in report.axes if axis.verdict == "inexact"]
    if lines:
        raise AssertionError(f"{report.subject} depends on the split:\n" + "\n".join(lines))


def describe_fault(axis: AxisResult) -> str:
    """An inexact axis on a line: its cause, the numbers, and what to change."""
    return f"{axis.name}: {axis.cause} ({_numbers(axis)}). {axis.advice} [{axis.evidence}]"


def _numbers(axis: AxisResult) -> str:
    if axis.relative_difference is None or axis.noise_floor is None:
        return axis.reason
    difference, noise = axis.relative_difference, axis.noise_floor
    return f"relative difference {difference:.2e}, noise {noise:.0e}"


def check_subject(
    subject: Subject,
    axes: Sequence[str | Axis] | None = None,
    *,
    causes: Sequence[Cause] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> CheckReport:
    """Audit a subject.

    Args:
        subject: Made by `as_subject` or an adapter of `samestep.audit.adapters`.
        axes: As for `check`.
        causes: As for `check`.
        progress: Called with the name of each axis before it runs.

    Returns:
        The report. An axis that the subject cannot run is "skipped" with the reason.

    Raises:
        CheckError: An unknown axis, or the subject cannot be run at all.
    """
    table = with_causes(causes)
    chosen = chosen_axes(axes)
    progress("first run")
    experiments = Experiments.start(subject, table)
    results = []
    for axis in chosen:
        progress(axis.name)
        results.append(run_axis(axis, experiments))
    inexact = any(result.verdict == "inexact" for result in results)
    if not inexact:
        refuse_hidden_scale(experiments)
    dtype = experiments.settings.dtype
    return CheckReport(
        subject=subject.name,
        verdict="inexact" if inexact else "exact",
        axes=tuple(results),
        examples=subject.size,
        dtype="native" if dtype is None else str(dtype).split(".")[-1],
        seed=experiments.settings.seed,
        versions=_versions(),
    )


def start_experiments(subject: Any, causes: Sequence[Cause] = ()) -> Experiments:
    """Run a subject for the first time.

    Args:
        subject: As for `check`.
        causes: As for `check`.

    Raises:
        CheckError: It cannot be run.
    """
    loop = load_subject(subject) if isinstance(subject, str) else as_subject(subject)
    return Experiments.start(loop, with_causes(causes))


def refuse_hidden_scale(experiments: Experiments) -> None:
    """Refuse to call a subject exact whose updates do not show how long its gradient was.

    Raises:
        CheckError: It is one.
    """
    if experiments.hides_scale:
        raise CheckError(
            f"{experiments.subject.name} cannot be judged: its update is as long whatever the "
            "length of the gradient (Adam or sign descent by hand?), which hides wrong scales. Let "
            "step leave the gradient in .grad, or update by an optimizer of torch.optim, whose "
            "input is seen"
        )


def chosen_axes(axes: Sequence[str | Axis] | None) -> list[Axis]:
    """The axes that are named, and those of the user's; None: those that run by default.

    Raises:
        CheckError: There is no axis of a name, or a name is taken.
    """
    axes = DEFAULT_AXES if axes is None else axes
    own = [axis.name for axis in axes if isinstance(axis, Axis)]
    taken = [name for number, name in enumerate(own) if name in AXES or name in own[:number]]
    if taken:
        raise CheckError(f"axes: {', '.join(taken)} is taken; choose another name")
    unknown = [name for name in axes if isinstance(name, str) and name not in AXES]
    if unknown:
        raise CheckError(f"no such axis: {', '.join(unknown)}; there are {', '.join(AXES)}")
    return [AXES[axis] if isinstance(axis, str) else axis for axis in axes]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def load_subject(reference: str) -> Subject:
    """The subject in a Python file.

    Args:
        reference: ``FILE.py`` (its own names are the custom loop, or ``make_trainer``), or
            ``FILE.py:NAME`` for a class, a factory of trainers or another object in it.

    Returns:
        The subject.

    Raises:
        CheckError: The file or the name is missing, or holds no subject; the file's own error is
            shown if it cannot be imported.
    """
    source = load_object(reference, what="subject", error=CheckError, hint=NO_FILE)
    path, _, name = reference.partition(":")
    return as_subject(source, name=name or Path(path).stem)


def as_subject(source: Any, *, name: str | None = None) -> Subject:
    """A subject of an object.

    Args:
        source: A module, class, instance or mapping with the names of a custom loop or with
            ``make_trainer``; such a factory itself; or a subject.
        name: For the report.

    Returns:
        The subject.

    Raises:
        CheckError: It is none of these; lists the names that are missing.
    """
    label = name or str(getattr(source, "__name__", type(source).__name__))
    if inspect.isclass(source):
        source = source()
    if isinstance(source, Subject):
        subject: Subject = source
        return subject
    factory = _trainer_factory(source)
    if factory is not None:
        # Imports the trainers' libraries, which other subjects do not need.
        try:
            from samestep.audit.adapters.trainer import TrainerSubject
        except ModuleNotFoundError as error:
            if error.name not in ("transformers", "accelerate"):
                raise
            raise CheckError(
                f"{label} makes trainers, and {error.name} is not installed here: "
                "pip install 'transformers[torch]'"
            ) from error
        declared = getattr(factory, "knobs", None) or _member(source, "knobs")
        knobs = Knobs.of(declared, functions=[factory], holder=source, open_ended=True)
        held = HeldState([factory], except_for=knobs.values)
        return TrainerSubject(held.before(factory), name=label, knobs=knobs)
    functions = LoopFunctions.of(source)
    try:
        return LoopSubject(functions, name=label)
    except CheckError:
        raise
    except Exception as error:  # the subject is the user's code: anything may come
        raise CheckError(f"{label} could not be run: {blamed(error)}") from error


def _trainer_factory(source: Any) -> Callable[..., Any] | None:
    """The factory of trainers that an object is, or has under the name ``make_trainer``."""
    if inspect.isroutine(source) or isinstance(source, functools.partial):
        factory: Callable[..., Any] = source
        return factory
    made: Callable[..., Any] | None = _member(source, "make_trainer")
    return made


def _member(source: Any, name: str) -> Any:
    """What a mapping or an object has under a name; None if nothing."""
    return source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)
