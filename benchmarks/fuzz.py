"""Give samestep 50,000 spoiled inputs of every kind, and count how they end: writes docs/faults.md.

    python benchmarks/fuzz.py [--number 50000] [--seed 0] [--only KIND] [--json RESULT]

An input is taken, or refused by an error of samestep's own; anything else is a fault, and listed by
what was raised and where.
"""

import argparse
import json
import logging
import random
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

import torch
from fuzzing import KINDS

PAGE = Path("docs/faults.md")
SHARES = {"rows": 20, "settings": 6, "images": 8, "files": 4, "latents": 4, "logs": 4, "caches": 4}
"""Parts of the inputs that are of a kind; 2 of the others."""


def fault_of(error: BaseException) -> str:
    """What was raised, and the line of samestep's own code that it came through last."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/samestep/" in frame.filename]
    place = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "no line of samestep"
    return f"{type(error).__name__} at {place}: {str(error)[:100]!r}"


def outcome(kind: str, folder: Path, draw: random.Random) -> tuple[str, str]:
    """How an input ended, and what the fault was if it was one."""
    try:
        return ("taken" if KINDS[kind](folder, draw) else "refused"), ""
    except Exception as error:
        return "faults", fault_of(error)


def part(table: dict[str, dict[str, Any]]) -> str:
    """The part of docs/faults.md on inputs."""
    rows = "\n".join(
        f"| {kind} | {row['tried']:,} | {row['taken']:,} | {row['refused']:,} | {row['faults']} |"
        for kind, row in table.items()
    )
    tried = sum(row["tried"] for row in table.values())
    return f"""## Inputs
Written by `make fuzz`, with `benchmarks/results/fuzz.json`: {tried:,} inputs, spoiled at random.
Each must be taken, or refused by an error of samestep's own; anything else that is raised is a
fault. Rows are those of every objective but images and latents, which have rows of their own here;
they are read and made a micro-batch. A part of them runs in the tests
(`tests/test_fuzz_inputs.py`).

| input | tried | taken | refused | faults |
| --- | --- | --- | --- | --- |
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/fuzz.json"))
    parser.add_argument("--only", choices=KINDS, help="try one kind anew, keep the other results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("samestep").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    whole = sum(SHARES.get(kind, 2) for kind in KINDS)
    table: dict[str, dict[str, Any]] = {}
    if options.only:
        table = json.loads(options.json.read_text(encoding="utf-8"))["kinds"]
    with tempfile.TemporaryDirectory() as name:
        for kind in [options.only] if options.only else KINDS:
            outcomes, faults = Counter[str](), Counter[str]()
            number = max(1, options.number * SHARES.get(kind, 2) // whole)
            for at in range(number):
                draw = random.Random(f"{options.seed} {kind} {at}")
                ended, fault = outcome(kind, Path(name), draw)
                outcomes[ended] += 1
                if fault:
                    faults[fault] += 1
            table[kind] = {
                "tried": number,
                **{key: outcomes[key] for key in ("taken", "refused", "faults")},
                "examples": dict(faults.most_common(20)),
            }
            print(kind, table[kind], flush=True)
    result = {
        "seed": options.seed,
        "torch": torch.__version__,
        "kinds": table,
    }
    options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    before = PAGE.read_text(encoding="utf-8").partition("## Inputs")[0].rstrip()
    PAGE.write_text(f"{before}\n\n{part(table)}", encoding="utf-8")
    if any(row["faults"] for row in table.values()):
        sys.exit("an input ended in a fault")


if __name__ == "__main__":
    main()
