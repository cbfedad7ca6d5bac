"""Whose an error is: the subject's, or the auditor's own."""

import traceback
from pathlib import Path

ADAPTERS = Path(__file__).resolve().parent / "adapters"
"""Where the code of subjects is called from."""

_PASSING_ON = ("__torch_function__", "__torch_dispatch__")
"""Functions of ours that stand between the subject and PyTorch."""


def blamed(error: Exception) -> str:
    """An error, and whose it is: the subject's, or the auditor's own.

    Args:
        error: What a run raised.
    """
    frames = traceback.extract_tb(error.__traceback__)
    while len(frames) > 1 and frames[-1].name in _PASSING_ON:
        frames.pop()  # what the subject has called
    folders = [Path(frame.filename).resolve().parent for frame in frames]
    in_subject = any(folder == ADAPTERS for folder in folders)
    text = f"{type(error).__name__}: {error}"
    if in_subject and not folders[-1].is_relative_to(ADAPTERS.parent):
        return f"the subject failed: {text}"
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
    return f"the audit itself failed, which is no fault of the subject's: {text} ({where})"
