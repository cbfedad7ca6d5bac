"""The version of samestep, for what is written down."""

import sys


def package_version() -> str:
    """The version, which stands in the package itself.

    It is loaded whenever one of its modules is, and imports all others for type checkers: a module
    that imported it in turn would close a circle.

    Returns:
        Such as "1.2.3".
    """
    return str(vars(sys.modules["samestep"])["__version__"])
