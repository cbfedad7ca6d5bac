"""The command line: which command, and how errors end. Heavy imports stay inside commands."""

import difflib
import logging
import os
import shlex
import signal
import sys
from collections.abc import Sequence

from samestep import __version__
from samestep.errors import (
    CheckError,
    ConfigError,
    DataError,
    Interrupted,
    RankError,
    SamestepError,
)
from samestep.utils.text import printable

USAGE = """\
usage: samestep COMMAND ...

Training steps that do not depend on how the batch was split.

commands:
  init [RUN.YAML]                        write a commented run.yaml, by a few questions
  train [RUN.YAML] [--FIELD VALUE ...]   fine-tune a language model
  eval RUN --data ROWS                   evaluate a run's model on other rows
  generate RUN --prompt TEXT             what a run's model answers
  export RUN --out FOLDER                write a run's model to a folder of its own
  check FILE.py[:NAME]                   audit a training loop and name the cause
  study [STUDY.YAML] --out DIR           compare batch configurations and draw a report
  report DIR                             draw a study's report again

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
    try:
        return _run(command, rest)
    except SamestepError as error:
        if debug:
            raise
        print(f"samestep: error: {printable(str(error))}", file=sys.stderr)
        if isinstance(error, RankError):
            return RANK_LOST
        return BAD_INPUT if isinstance(error, ConfigError | DataError | CheckError) else FAILED
    except BrokenPipeError:
        # The reader of our output went away, as in `| head`: there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt as error:
        if debug:
            raise
        number = error.number if isinstance(error, Interrupted) else signal.SIGINT
        if os.environ.get("RANK", "0") == "0":
            print(f"samestep: {_stopped(error, number)}", file=sys.stderr)
        return 128 + number


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
    if command == "train":
        from samestep.train.command import run

        return run(arguments)
    if command == "init":
        from samestep.train.init_command import init

        return init(arguments)
    if command in ("eval", "generate", "export"):
        from samestep.train.after_command import COMMANDS

        code: int = COMMANDS[command](arguments)
        return code
    if command == "check":
        from samestep.audit.command import run

        return run(arguments)
    if command == "study":
        from samestep.study.command import run

        return run(arguments)
    if command == "report":
        from samestep.study.command import report

        return report(arguments)
    if command.endswith((".yaml", ".yml")):
        raise ConfigError(f"which command? `samestep train {command}`, or study?")
    names = ["init", "train", "eval", "generate", "export", "check", "study", "report"]
    near = difflib.get_close_matches(command, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"there is no command {command!r}{hint} (`samestep --help` lists them)")
