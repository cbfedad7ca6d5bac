"""The command lets threads sleep while they wait, before PyTorch is loaded."""

import os
import subprocess
import sys

import pytest

SHOW = (
    "import os, sys, samestep.__main__ as entry; entry.let_threads_sleep(); "
    "print('torch' in sys.modules, os.environ.get('OMP_WAIT_POLICY'))"
)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "PASSIVE"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"),
        ({"GOMP_SPINCOUNT": "1000"}, "None"),
        ({"KMP_BLOCKTIME": "0"}, "None"),
    ],
    ids=str,
)
def test_the_wait_policy_is_chosen_unless_the_user_has(
    given: dict[str, str], expected: str
) -> None:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    shown = subprocess.run(
        [sys.executable, "-c", SHOW],
        env={**environment, **given},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.split() == ["False", expected]
