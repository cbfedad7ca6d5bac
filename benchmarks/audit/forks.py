"""A function in a process of its own: limited in time and memory, and always ended."""

import multiprocessing
import re
import resource
from collections.abc import Callable
from typing import Any

BYTES = 8 << 30


def in_fork(
    work: Callable[[str], dict[str, Any]], name: str, *, seconds: int = 120
) -> dict[str, Any]:
    """What a function returns for a name; ``{"verdict": "not run", "why": ...}`` if it fails.

    The process is a fork of this one, so libraries that are loaded need not be loaded again.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(work, name, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            return {"verdict": "not run", "why": f"stopped after {seconds} s"}
        found: dict[str, Any] = receiver.recv()
        return found
    except EOFError:
        process.join()
        return {"verdict": "not run", "why": f"the process died with code {process.exitcode}"}
    finally:
        process.kill()
        process.join()
        receiver.close()


def _work(work: Callable[[str], dict[str, Any]], name: str, sender: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    try:
        sender.send(work(name))
    except BaseException as error:
        sender.send({"verdict": "not run", "why": short(error)})


def short(error: BaseException) -> str:
    """An error on a line, without the folders of this machine."""
    text = re.sub(r"\s+", " ", str(error)).replace("make_trainer failed: ", "")
    return re.sub(r"\(/[^ ]*/([\w.]+:\d+)\)", r"(\1)", text)[:240]
