"""How much of what is drawn at random the tests try: a part each time, all with `make thorough`."""

import os

THOROUGH = os.environ.get("SAMESTEP_THOROUGH") == "1"


def examples(number: int) -> int:
    """That many with ``SAMESTEP_THOROUGH=1``, a tenth of them in `make test`."""
    return number if THOROUGH else max(1, number // 10)
