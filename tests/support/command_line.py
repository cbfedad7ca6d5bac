"""The command as a user runs it: in a process of its own, 80 columns wide, without a terminal."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

PRELOAD = ["torch.distributed.fsdp", "transformers", "samestep.train.trainer"]
"""What the server that processes of tests are forked from has loaded; the same for all of them."""


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
    """Run `samestep` in a folder, its options for Python before it.

    A new interpreter is started only where libraries would read the environment while they are
    loaded, or with options for Python: elsewhere the process is forked from one that has loaded
    them, which saves the seconds that this takes.
    """
    started = time.perf_counter()
    settings = os.environ | {"NO_COLOR": "1", "COLUMNS": "80"} | environment
    if not python and not environment:
        code, out, err = _forked(arguments, folder, settings)
    else:
        done = subprocess.run(
            [sys.executable, *python, "-m", "samestep", *arguments],
            cwd=folder,
            env=settings,
            capture_output=True,
            text=True,
            check=False,
        )
        code, out, err = done.returncode, done.stdout, done.stderr
    return Done(code, out, err, time.perf_counter() - started)


def _forked(
    arguments: tuple[str, ...], folder: Path, settings: dict[str, str]
) -> tuple[int, str, str]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as texts:
        process = context.Process(target=_command, args=(arguments, str(folder), settings, texts))
        process.start()
        process.join()
        out, err = ((Path(texts) / name).read_text("utf-8") for name in ("out", "err"))
    code = process.exitcode
    assert code is not None
    return code, out, err


def _command(arguments: tuple[str, ...], folder: str, settings: dict[str, str], texts: str) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(f"{texts}/{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(settings)
    os.chdir(folder)
    sys.argv = ["samestep", *arguments]
    from samestep.__main__ import entry

    entry()
