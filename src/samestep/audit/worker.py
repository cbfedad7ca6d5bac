"""The process in which a subject runs: it may crash or hang without harm to the command.

    python -m samestep.audit.worker REFERENCE RESULT.json [AXIS ...]

Progress goes to stdout, a line an axis; the report, or the error, to the result file.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

from samestep.audit.check import check_subject, load_subject
from samestep.errors import CheckError


def main() -> int:
    """Audit, write the result, and say how it went.

    Returns:
        0 with a report in the result file, 2 with an error in it.
    """
    reference, result, *axes = sys.argv[1:]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    progress = os.fdopen(os.dup(1), "w")

    def say(axis: str) -> None:
        print(axis, file=progress, flush=True)

    try:
        # What the subject prints is not ours: keep it away from the progress lines.
        with contextlib.redirect_stdout(sys.stderr):
            report = check_subject(load_subject(reference), axes or None, progress=say)
    except CheckError as error:
        Path(result).write_text(json.dumps({"error": str(error)}), encoding="utf-8")
        return 2
    Path(result).write_text(json.dumps(report.as_dict()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
