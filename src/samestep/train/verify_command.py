"""`samestep verify` as a command: a run's folder, a range of steps, a verdict as exit code."""

import argparse
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from samestep.errors import ConfigError, SamestepError
from samestep.train.command import read_settings
from samestep.train.launch import launch, process_group, ranks_to_launch

_HELP = """\
Takes steps of a run with --bitwise again, from its checkpoints, and compares the digests in its
log. Exit code 0: equal; 1: not, and the first step and weight that differ are named; 2: the
steps cannot be taken again here, and why (another processor, library, number of threads).
"""


def run(arguments: Sequence[str]) -> int:
    """Verify as the arguments say.

    Args:
        arguments: ``RUN [--steps 5..9] [--ranks N]``.

    Returns:
        The exit code: 0 equal, 1 not.

    Raises:
        ConfigError: The steps could not be taken again.
        SystemExit: The flags cannot be parsed (2), or help was shown (0).
    """
    parser = argparse.ArgumentParser(
        prog="samestep verify",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="the folder of the run (its --out)")
    parser.add_argument("--steps", metavar="5..9", help="by default those after a checkpoint")
    parser.add_argument("--ranks", type=int, help="processes to start; the verdict is the same")
    given = parser.parse_args(arguments)
    steps = None if given.steps is None else _steps(given.steps)
    config = Path(given.run) / "config.yaml"
    if not config.exists():
        raise ConfigError(f"verify: there is no run in {given.run} (no {config})")
    settings = read_settings([str(config)])
    # The folder may have been moved, or copied from elsewhere.
    settings = settings.model_copy(update={"out": given.run})
    ranks = ranks_to_launch(given.ranks)
    if ranks is not None:
        return launch(ranks, ["verify", *arguments])
    from samestep.train.verify import report, verify

    logging.getLogger("samestep").setLevel(logging.WARNING)
    try:
        with process_group():
            return report(verify(settings, steps=steps), given.run)
    except ConfigError:
        raise
    except SamestepError as error:
        raise ConfigError(f"verify: the steps could not be taken again: {error}") from error


def _steps(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9][0-9]*)(?:\.\.([1-9][0-9]*))?", text)
    if found is None:
        raise ConfigError(f"verify: --steps {text}: as in 5..9, or 5; the first step is 1")
    return int(found[1]), int(found[2] or found[1])
