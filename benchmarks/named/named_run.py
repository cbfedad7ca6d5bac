"""Measures every named model at reduced size and writes docs/models.md.

python benchmarks/named/named_run.py            measure, and write the page (about 2 minutes)
python benchmarks/named/named_run.py --page     write the page from the result file
"""

import argparse
import json
import logging
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "models.json"
PAGE = ROOT / "docs" / "models.md"
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "tests" / "support")]

import torch  # noqa: E402
from named_measure import NUMBER, in_trainer, over_ranks, over_splits, reduced  # noqa: E402
from named_models import NAMED  # noqa: E402
from named_page import page  # noqa: E402
from named_sizes import full_size  # noqa: E402


def measured_of(kind: str) -> dict[str, Any]:
    """The figures of one reduced model."""
    model = reduced(kind).model(torch.float32)
    number = sum(weight.numel() for weight in model.parameters())
    shape = f"2 layers of width 32, {number / 1e3:,.0f} k parameters"
    return {
        "reduced": shape,
        "float64": over_splits(kind, torch.float64),
        "float32": over_splits(kind, torch.float32),
        "ranks": over_ranks(kind),
        "trainer": in_trainer(kind),
    }


def measured() -> dict[str, Any]:
    """The figures of every row, and what they were measured with."""
    by_kind: dict[str, Any] = {}
    rows = {}
    for named in NAMED:
        if named.reduced not in by_kind:
            by_kind[named.reduced] = measured_of(named.reduced)
        rows[named.name] = {**by_kind[named.reduced], "full": asdict(full_size(named))}
        print(named.name, by_kind[named.reduced], flush=True)
    packages = ("torch", "transformers", "diffusers")
    return {
        "number": NUMBER,
        "versions": {name: version(name) for name in packages},
        "rows": rows,
    }


def main() -> None:
    """Measure if asked to, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="store_true", help="write the page alone")
    if not parser.parse_args().page:
        logging.disable(logging.WARNING)
        torch.set_num_threads(1)
        RESULTS.write_text(json.dumps(measured(), indent=2) + "\n", encoding="utf-8")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
