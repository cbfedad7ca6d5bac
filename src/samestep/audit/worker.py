"""The process in which a subject runs: it may crash or hang without harm to the command.

    python -m samestep.audit.worker REFERENCE RESULT.json [AXIS ...]

Progress goes to stdout, a line an axis; the report, or the error, to the result file.
"""

import contextlib
import json
import os
import sys
import traceback
from pathlib import Path

from samestep.audit.check import check_subject, load_subject
from samestep.audit.source import describe_source, is_own
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
        failure = {"error": str(error)}
        cause = error.__cause__ or error.__context__
        if cause is not None:
            failure["error"] += own_line(cause)
            failure["traceback"] = "".join(traceback.format_exception(cause))
        Path(result).write_text(json.dumps(failure), encoding="utf-8")
        return 2
    found = {**report.as_dict(), "source": describe_source(reference)}
    Path(result).write_text(json.dumps(found), encoding="utf-8")
    return 0


def own_line(error: BaseException) -> str:
    """The line of the user's own code that an error came from, as a line of text; or empty.

    Args:
        error: What the subject raised.

    Returns:
        File, line, function and code, after a line break.
    """
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if is_own(frame.filename)]
    if not own:
        return ""
    last = own[-1]
    return f"\n  {last.filename}:{last.lineno}, in {last.name}: {last.line}\n  (--debug shows all)"


if __name__ == "__main__":
    sys.exit(main())
