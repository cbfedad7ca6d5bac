"""``python -m samestep``, and the command ``samestep``."""

import os
import sys

from samestep.cli import main

_THREAD_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""What a user sets who wants threads to wait otherwise."""


def let_threads_sleep() -> None:
    """Let PyTorch's threads sleep while they wait, unless the environment says otherwise.

    By default GNU's OpenMP spins. On a machine that others use too, threads then burn the time that
    the one they wait for needs, and a step slows down many times more than its share. It is read
    when PyTorch is loaded, so this comes before.
    """
    if not any(name in os.environ for name in _THREAD_SETTINGS):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def entry() -> None:
    """Run the command of the command line, and end the process with its exit code."""
    let_threads_sleep()
    code = main()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # One rank of several. PyTorch's communication threads may still call into Python while the
        # interpreter is taken down, which aborts a run that is finished: leave without that.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    entry()
