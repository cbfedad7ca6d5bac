"""A pytest plug-in, found by every test once installed: a test of a loop, or one for each axis."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from samestep.audit.axes.axis import Axis
    from samestep.audit.experiments import Experiments

MARKER = "same_step"
_USAGE = f"@pytest.mark.{MARKER}(subject, axes=None, causes=(), known={{axis: cause}})"
_OPTIONS = {"axes", "causes", "known"}

Runs = dict[int, tuple[Any, "Experiments | Exception"]]


@pytest.fixture(name="assert_same_step")
def assert_same_step_fixture() -> Callable[..., None]:
    """`samestep.assert_same_step`, imported only by the tests that ask for it."""
    from samestep.audit.check import assert_same_step

    return assert_same_step


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    line = f"{MARKER}(subject, axes=None, causes=(), known=None): the loop of the fixture same_step"
    config.addinivalue_line("markers", line)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test of each axis, from one that asks for the fixture ``same_step``."""
    marker = metafunc.definition.get_closest_marker(MARKER)
    if MARKER not in metafunc.fixturenames:
        return
    if marker is None or len(marker.args) != 1 or not marker.kwargs.keys() <= _OPTIONS:
        raise pytest.UsageError(f"{metafunc.definition.nodeid} needs {_USAGE}")
    from samestep.audit.check import chosen_axes

    axes = chosen_axes(marker.kwargs.get("axes"))
    known = marker.kwargs.get("known") or {}
    unknown = sorted(known.keys() - {axis.name for axis in axes})
    if unknown:
        raise pytest.UsageError(
            f"{metafunc.definition.nodeid}: known= names {', '.join(unknown)}, which is not run"
        )
    names = [axis.name for axis in axes]
    metafunc.parametrize(MARKER, axes, ids=names, indirect=True)


@pytest.fixture(name="_same_step_runs", scope="module")
def _runs() -> Runs:
    """The subjects of a file of tests and what they have run: each axis builds on it."""
    return {}


@pytest.fixture(name=MARKER)
def same_step_fixture(request: pytest.FixtureRequest, _same_step_runs: Runs) -> Callable[[], None]:
    """A function that fails unless the marked loop is exact on the axis of this test."""
    marker = request.node.get_closest_marker(MARKER)
    subject, options = marker.args[0], marker.kwargs

    def judge() -> None:
        experiments = _experiments(_same_step_runs, subject, options.get("causes", ()))
        _judge(request.param, experiments, options.get("known") or {})

    return judge


def _experiments(runs: Runs, subject: Any, causes: Any) -> "Experiments":
    """What a subject has run so far, or the error with which it could not be run."""
    from samestep.audit.check import start_experiments

    if id(subject) not in runs:
        try:
            runs[id(subject)] = subject, start_experiments(subject, causes)
        except Exception as error:
            runs[id(subject)] = subject, error
    found = runs[id(subject)][1]
    if isinstance(found, Exception):
        raise found
    return found


def _judge(axis: "Axis", experiments: "Experiments", known: Mapping[str, str]) -> None:
    from samestep.audit.axes.axis import run_axis
    from samestep.audit.check import describe_fault, refuse_hidden_scale

    result = run_axis(axis, experiments)
    expected = known.get(axis.name)
    if result.verdict == "skipped":
        pytest.skip(result.reason)
    if result.verdict == "inexact":
        if result.cause == expected:
            pytest.xfail(f"known fault: {expected}")
        raise AssertionError(describe_fault(result))
    refuse_hidden_scale(experiments)
    if expected is not None:
        pytest.fail(f"remove me: {axis.name} is exact now, known={expected!r} is mended")
