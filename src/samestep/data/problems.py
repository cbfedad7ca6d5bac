"""Problems of rows: found one by one, shown together, never more than a screen of them."""

from collections.abc import Sequence

from samestep.errors import DataError

SHOWN = 10
"""How many problems one error lists."""


class RowError(Exception):
    """One row cannot be used; becomes a line of a `DataError` that names the row."""


def raise_all(problems: Sequence[str], *, hint: str = "") -> None:
    """Raise every problem at once.

    Args:
        problems: One line each; none is fine.
        hint: A last line that tells how to mend them.

    Raises:
        DataError: There is a problem.
    """
    if not problems:
        return
    lines = list(problems[:SHOWN])
    if len(problems) > SHOWN:
        lines.append(f"and {len(problems) - SHOWN} more")
    if hint:
        lines.append(hint)
    raise DataError("\n".join(lines))
