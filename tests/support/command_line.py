"""The command as a user runs it: in a process of its own, 80 columns wide, without a terminal."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Done:
    """A command that has ended.

    Attributes:
        code: Its exit code.
        out: What it wrote to stdout.
        err: What it wrote to stderr.
        seconds: How long it took.
    """

    code: int
    out: str
    err: str
    seconds: float


def samestep(
    *arguments: str, folder: Path, python: tuple[str, ...] = (), **environment: str
) -> Done:
    """Run `samestep` in a folder, its options for Python before it."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *python, "-m", "samestep", *arguments],
        cwd=folder,
        env=os.environ | {"NO_COLOR": "1", "COLUMNS": "80"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr, time.perf_counter() - started)
