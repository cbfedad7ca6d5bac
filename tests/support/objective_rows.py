"""Rows for each objective of `samestep train`, with something to learn in them."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

Rows = Callable[[random.Random], dict[str, Any]]


def completion(draw: random.Random) -> dict[str, Any]:
    """A sum and its answer."""
    a, b = draw.randint(1, 99), draw.randint(1, 99)
    tail = " Yes." * draw.randint(0, 3)
    return {"prompt": f"What is {a} + {b}? ", "completion": f"{a} + {b} = {a + b}.{tail}"}


def pair(draw: random.Random) -> dict[str, Any]:
    """Politeness is preferred, in completions of ragged length."""
    row = completion(draw)
    bad = f"{draw.randint(2, 198)}!" + " No." * draw.randint(0, 5)
    chosen = "Yes, of course. " + row["completion"]
    return {"prompt": row["prompt"], "chosen": chosen, "rejected": bad}


ROWS: dict[str, Rows] = {
    "causal_lm": completion,
    "dpo": pair,
    "simpo": pair,
    "cpo": pair,
    "orpo": pair,
}
"""A maker of rows for each objective."""


def write_rows_of(objective: str, path: Path, number: int, *, seed: int = 0) -> str:
    """A file of rows for an objective (of causal_lm for one of the user's own)."""
    draw = random.Random(seed)
    rows = [ROWS.get(objective, completion)(draw) for _ in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
