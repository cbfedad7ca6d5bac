"""cuBLAS repeats its results if the environment says so before its first product. No PyTorch."""

import os

SETTING, VALUE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
"""What PyTorch asks for, and reads once: at the first product of a process on a GPU."""


def let_cublas_repeat() -> None:
    """Set what cuBLAS needs to repeat its results, unless the user has set it to something else.

    It stays set, since it is read once. It changes no result and costs 24 MB on some GPUs.
    """
    os.environ.setdefault(SETTING, VALUE)
