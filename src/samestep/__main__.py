"""``python -m samestep``, and the command ``samestep``."""

import os
import sys

from samestep.cli import main


def entry() -> None:
    """Run the command of the command line, and end the process with its exit code."""
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
