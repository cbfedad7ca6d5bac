"""samestep beside TRL on the same work: alternating runs, ratios, a result file.

    python benchmarks/run.py                 SmolLM2-135M, 32 gsm rows a step (about 20 minutes)
    python benchmarks/run.py --work smoke    a tiny model, to see that the benchmark works

Each contender runs in a process of its own, in turn, so that a busy moment of the machine hits all
of them and peak memory is each one's own.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
CONTENDERS = {
    "gsm": ["samestep", "samestep:512", "trl:1", "trl:4", "trl:8", "trl-default:8"],
    "smoke": ["samestep", "trl:1", "trl:4"],
}


def run_one(name: str, work: str, steps: int) -> dict[str, Any]:
    """The figures that a contender printed."""
    command = [sys.executable, str(HERE / "contender.py"), name, "--work", work]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [*command, "--steps", str(steps)], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median seconds a step and peak memory of each contender, and ratios to samestep's."""
    names = list(dict.fromkeys(run["name"] for run in runs))
    rows = []
    for name in names:
        own = [run for run in runs if run["name"] == name]
        seconds = [second for run in own for second in run["seconds"]]
        rows.append(
            {
                "name": name,
                "seconds_per_step": statistics.median(seconds),
                "spread": [min(seconds), max(seconds)],
                "peak_bytes": statistics.median(run["peak_bytes"] for run in own),
            }
        )
    for row in rows:
        row["time_ratio"] = row["seconds_per_step"] / rows[0]["seconds_per_step"]
        row["memory_ratio"] = row["peak_bytes"] / rows[0]["peak_bytes"]
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the comparison."""
    table = Table("contender", "s a step", "spread", "time / samestep", "peak GB", "/ samestep")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['seconds_per_step']:.2f}",
            "{:.2f} .. {:.2f}".format(*row["spread"]),
            f"{row['time_ratio']:.2f}",
            f"{row['peak_bytes'] / 1e9:.2f}",
            f"{row['memory_ratio']:.2f}",
        )
    Console().print(table)


def main() -> None:
    """Run every contender in turn, as often as asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", choices=CONTENDERS, default="gsm")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    options = parser.parse_args()
    runs = []
    for _ in range(options.rounds):
        for name in CONTENDERS[options.work]:
            runs.append(run_one(name, options.work, options.steps))
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    rows = summarise(runs)
    show(rows)
    packages = ("samestep", "torch", "transformers", "trl")
    result = {
        "work": options.work,
        "steps": options.steps,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in packages},
        "summary": rows,
        "runs": runs,
    }
    path = HERE / "results" / f"train-{options.work}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
