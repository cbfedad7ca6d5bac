"""Runs probes in processes of their own, two at a time: one that crashes or hangs ends alone."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

MODEL, TRAINER = "model:", "trainer:"
"""What the names of probes of the user's begin with: a class or folder, and a file."""

WORKER = [sys.executable, "-m", "samestep.doctor.worker"]


def run_all(
    names: Sequence[str], *, seconds: float, progress: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """Run probes.

    Args:
        names: See `samestep.doctor.probes.probe_named`.
        seconds: How long each may take.
        progress: Called with the name of each before it runs.

    Returns:
        What `samestep.doctor.probes.run_probe` returns, in the order of the names.
    """
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in names:
        waiting.put(name)
    found: dict[str, dict[str, Any]] = {}

    def work() -> None:
        with contextlib.ExitStack() as stack:
            child: Child | None = None
            while True:
                try:
                    name = waiting.get_nowait()
                except queue.Empty:
                    return
                progress(name)
                if child is None or child.ended:
                    child = stack.enter_context(contextlib.closing(Child()))
                found[name] = child.run(name, seconds=seconds)

    number = min(2, len(names), os.cpu_count() or 1)
    threads = [threading.Thread(target=work, daemon=True) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(0.2)  # in turns, so that an interrupt is heard
    return [found[name] for name in names]


class Child:
    """A process that runs probes, one after another; see `samestep.doctor.worker`."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        self._process = subprocess.Popen(
            WORKER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
        )
        self.ended = False

    def run(self, name: str, *, seconds: float) -> dict[str, Any]:
        """The result of a probe; "not run" if the process dies or takes too long."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = threading.Timer(seconds, self._kill)
        started = time.monotonic()
        timer.start()
        line = ""
        with contextlib.suppress(OSError):
            self._process.stdin.write(f"{name}\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        timer.cancel()
        took = time.monotonic() - started
        if line.endswith("\n"):
            result: dict[str, Any] = json.loads(line)
            return result | {"seconds": took}
        self.ended = True
        code = self._process.wait()
        why = f"its process ended with code {code}: {self._last_error()}"
        if took >= seconds:
            why = f"it was stopped after {seconds:g} s"
        return {"probe": name, "title": name, "verdict": "not run", "why": why, "axes": [],
                "cure": None, "seconds": took}  # fmt: skip

    def close(self) -> None:
        """End the process and whatever it started."""
        self._kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()
        self._errors.close()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _last_error(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"
