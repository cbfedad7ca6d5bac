"""A pytest plug-in: the fixture ``assert_same_step``, found by every test once installed."""

from collections.abc import Callable

import pytest


@pytest.fixture(name="assert_same_step")
def assert_same_step_fixture() -> Callable[..., None]:
    """`samestep.assert_same_step`, imported only by the tests that ask for it."""
    from samestep.audit.check import assert_same_step

    return assert_same_step
