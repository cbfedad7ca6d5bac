"""The functions that `make chaos` lets hang are there, under the names it knows them by."""

import pytest
from planted import HOOKS, PLACES, SEEN_AT, hook


@pytest.mark.parametrize("place", HOOKS)
def test_what_hangs_is_there(place: str) -> None:
    owner, name, _ = hook(place)
    assert callable(getattr(owner, name))


def test_every_place_has_a_function_or_a_loss_that_hangs() -> None:
    assert set(PLACES) == {*HOOKS, "custom loss"}
    assert set(PLACES) == {*SEEN_AT, "compiled code"}
