"""The command line: which command, and how errors end. Heavy imports stay inside commands."""

import difflib
import io
import logging
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import NamedTuple

from samestep import __version__
from samestep.errors import (
    CheckError,
    ConfigError,
    DataError,
    Interrupted,
    RankError,
    SamestepError,
)
from samestep.utils.cublas import let_cublas_repeat
from samestep.utils.extras import MissingExtraError, missing_text, require_installed
from samestep.utils.text import printable


class _Command(NamedTuple):
    """A command: what it takes and does, where its function is, and the extras that it needs."""

    takes: str
    does: str
    module: str
    function: str = "run"
    extras: tuple[str, ...] = ()


_COMMANDS = {
    "init": _Command(
        "[RUN.YAML]",
        "write a commented run.yaml, by a few questions",
        "train.init_command",
        "init",
        extras=("train",),
    ),
    "train": _Command(
        "[RUN.YAML] [--FIELD VALUE ...]",
        "fine-tune a language model",
        "train.command",
        extras=("train",),
    ),
    "eval": _Command(
        "RUN --data ROWS",
        "evaluate a run's model on other rows",
        "train.after_command",
        "evaluate",
        extras=("train",),
    ),
    "generate": _Command(
        "RUN --prompt TEXT",
        "what a run's model answers",
        "train.after_command",
        "generate",
        extras=("train",),
    ),
    "export": _Command(
        "RUN --out FOLDER",
        "write a run's model to a folder of its own",
        "train.after_command",
        "export",
        extras=("train",),
    ),
    "verify": _Command(
        "RUN",
        "take steps of a --bitwise run again, and compare",
        "train.verify_command",
        extras=("train",),
    ),
    "doctor": _Command("", "is the step of what is installed here exact?", "doctor.command"),
    "check": _Command(
        "FILE.py[:NAME]", "audit a training loop and name the cause", "audit.command"
    ),
    "certificate": _Command(
        "FILE.py[:NAME]", "the same as a file, and as a badge", "audit.certificate_command"
    ),
    "study": _Command(
        "[STUDY.YAML] --out DIR",
        "compare batch configurations and draw a report",
        "study.command",
        extras=("train", "report"),
    ),
    "report": _Command(
        "DIR",
        "draw a study's report again",
        "study.command",
        "report",
        extras=("train", "report"),
    ),
}

_LINES = "".join(
    f"  {f'{name} {command.takes}':<38} {command.does}\n" for name, command in _COMMANDS.items()
)

USAGE = f"""\
usage: samestep COMMAND ...

Training steps that do not depend on how the batch was split.

commands:
{_LINES}
options:
  -h, --help     this text; `samestep train --help` lists the fields of a command
  --version      the version
  --debug        after a command: show the traceback of an error
"""

FAILED, BAD_INPUT, RANK_LOST = 1, 2, 3
"""Exit codes beside 0: the run failed; settings, flags or data are wrong; another rank died or
hangs. A run that a signal has stopped ends with 128 + its number: 130 after SIGINT, 143 after
SIGTERM."""


_QUIET_LIBRARIES = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # those of transformers, too
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # stacks of C++ where a rank is gone: we say which one
}
"""What keeps libraries from writing beside us; read when they are imported, here or in a child."""


class _Printable(logging.Formatter):
    """Log lines quote data and paths: nothing in them may steer a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Those of the command line by default.

    Returns:
        The exit code: 0 done, 1 failed, 2 bad settings or data, 3 a rank lost, 130 or 143 stopped.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    command, *rest = [argument for argument in arguments if argument != "--debug"] or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        print(f"samestep {__version__}")
        return 0
    for name, value in _QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Printable("%(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("samestep").setLevel(logging.INFO)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what it cannot encode is spelled out
            stream.reconfigure(errors="backslashreplace")
    try:
        return _flushed(_run(command, rest))
    except SamestepError as error:
        if debug:
            raise
        print(f"samestep: error: {printable(str(error))}", file=sys.stderr)
        if isinstance(error, RankError):
            return RANK_LOST
        return BAD_INPUT if isinstance(error, ConfigError | DataError | CheckError) else FAILED
    except BrokenPipeError:
        # The reader of our output went away, as in `| head`: there is nobody to tell.
        _give_up_stdout()
        return FAILED
    except OSError:
        if _flushed(0, end="\n"):  # it is stdout that cannot be written
            return FAILED
        raise
    except KeyboardInterrupt as error:
        if debug:
            raise
        number = error.number if isinstance(error, Interrupted) else signal.SIGINT
        if os.environ.get("RANK", "0") == "0":
            print(f"samestep: {_stopped(error, number)}", file=sys.stderr)
        return 128 + number


def _flushed(code: int, *, end: str = "") -> int:
    """The exit code of a command, once stdout has taken what it says; a full disk may not."""
    try:
        print(end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        _give_up_stdout()
        with suppress(OSError):
            text = f"samestep: error: the output cannot be written ({error.strerror})"
            print(text, file=sys.stderr)
        return code or FAILED
    return code


def _give_up_stdout() -> None:
    """Let what is still to be written to stdout go nowhere, so that the end is no second error."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _stopped(error: KeyboardInterrupt, number: int) -> str:
    """What a stop leaves, and the command that goes on."""
    text = f"stopped by {signal.Signals(number).name}"
    if not isinstance(error, Interrupted) or error.out is None:
        return text
    return (
        f"{text} after step {error.step}, which is saved. To go on:\n"
        f"  samestep train --resume --out {shlex.quote(error.out)}"
    )


def _run(command: str, arguments: list[str]) -> int:
    known = _COMMANDS.get(command)
    if known is not None:
        return _with_extras(command, known, arguments)
    if command.endswith((".yaml", ".yml")):
        raise ConfigError(f"which command? `samestep train {command}`, or study?")
    near = difflib.get_close_matches(command, _COMMANDS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"there is no command {command!r}{hint} (`samestep --help` lists them)")


def _with_extras(name: str, command: _Command, arguments: list[str]) -> int:
    """Run a command, or say at once all the packages that it lacks."""
    what = f"`samestep {name}`"
    if command.extras:
        let_cublas_repeat()  # our own runs may ask for it; what is audited stays as it is
        try:
            require_installed("train", what=what)
        except MissingExtraError:
            require_installed(*command.extras, what=what)  # all that it will need, at once
            raise
    try:
        function = getattr(import_module(f"samestep.{command.module}"), command.function)
        code: int = function(arguments)
        return code
    except ModuleNotFoundError as error:  # of a package that stands on the path, uninstalled
        if not command.extras or error.name is None or error.name.startswith("samestep"):
            raise
        raise MissingExtraError(missing_text("train", [error.name], what=what)) from error
