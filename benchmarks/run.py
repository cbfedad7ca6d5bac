"""samestep beside its peers on the same work: alternating runs, ratios, result files, bars.

    python benchmarks/run.py                      everything (hours)
    python benchmarks/run.py --work gsm           one work
    python benchmarks/run.py --work gsm-mixed     one work in mixed precision, peers under autocast
    python benchmarks/run.py --work gsm --contenders samestep trl:1 --rounds 1
    python benchmarks/run.py --work gsm --contenders samestep trl:1 --add   one more round of these
    python benchmarks/run.py --work smoke         a tiny model, to see that the benchmark works
    python benchmarks/run.py --bars               judge the result files again

Each contender runs in a process of its own, in turn, so that a busy moment of the machine hits all
of them and peak memory is each one's own. A contender that fails is listed with its error.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import bars
from samestep.kernels.gemm import processor_name

HERE = Path(__file__).resolve().parent
PEERS = ["trl:1", "trl:4", "trl:8", "trl-default:8", "trl-free:8", "trl-packing:4"]
CONTENDERS = {
    "gsm": ["samestep", "samestep:512", *PEERS, "trainer:4", "plain:1", "plain:4"],
    "tools": ["samestep", *PEERS, "trainer:4", "plain:1"],
    "gsm-mixed": ["samestep", "trl:1", "trl:4", "trl-free:8", "trainer:4", "plain:1"],
    "gsm-lora": ["samestep", "trl:1", "trl:4", "trl-default:8"],
    "tools-lora": ["samestep", "trl:1", "trl:4", "trl-default:8"],
    "mini-49k": ["samestep", "trl:1", "trl:8", "trl-default:8", "plain:8"],
    "qwen2-reduced": ["samestep", "trl:1", "trl:8", "trl-default:8", "plain:4"],
    "llama32-reduced": ["samestep", "trl:1", "trl:8", "trl-default:8", "plain:4"],
    "smoke": ["samestep", "trl:1", "plain:4"],
}


def run_one(name: str, work: str, steps: int) -> dict[str, Any]:
    """The figures that a contender printed; or its error."""
    command = [sys.executable, str(HERE / "contender.py"), name, "--work", work]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--steps", str(steps)], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        told = [line for line in lines if "Error" in line] or lines[-1:] or ["no message"]
        killed = "killed, as when memory runs out" if done.returncode == -9 else told[-1].strip()
        return {"name": name, "error": killed[:200]}
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures | {"load": os.getloadavg()[0]}


def compare(
    work: str, names: list[str], *, rounds: int, steps: int, earlier: list[dict[str, Any]]
) -> dict[str, Any]:
    """Run every contender in turn, as often as asked; their figures beside earlier ones."""
    runs = list(earlier)
    for _ in range(rounds):
        for name in names:
            runs.append(run_one(name, work, steps))
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    packages = ("samestep", "torch", "transformers", "trl")
    good = [run for run in runs if "error" not in run]
    return {
        "work": work,
        "rounds": max(Counter(run["name"] for run in runs).values()),
        "steps": steps,
        "cores": os.cpu_count(),
        "processor": processor_name(),
        "versions": {name: version(name) for name in packages},
        "summary": bars.summarise(good),
        "runs": runs,
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print the comparison."""
    table = Table(
        "contender", "tokens/s", "samestep is x faster", "spread", "peak GB", "samestep takes x"
    )
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['tokens_per_second']:.0f}",
            f"{row['speed_of_samestep']:.2f}",
            "{:.2f} .. {:.2f}".format(*row["spread"]),
            f"{row['peak_bytes'] / 1e9:.2f}",
            f"{row['memory_of_samestep']:.2f}",
        )
    Console().print(table)


def main() -> None:
    """Run what is asked, print it, and judge every bar."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", nargs="*", choices=CONTENDERS)
    parser.add_argument("--contenders", nargs="*")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--add", action="store_true", help="to the rounds of the result file")
    parser.add_argument("--bars", action="store_true")
    options = parser.parse_args()
    works = options.work or ([] if options.bars else [w for w in CONTENDERS if w != "smoke"])
    for work in works:
        names = options.contenders or CONTENDERS[work]
        file = bars.file_of(f"train-{work}", processor_name())
        known = bars.load(file) if options.add else None
        result = compare(
            work,
            names,
            rounds=options.rounds,
            steps=known["steps"] if known else options.steps,
            earlier=known["runs"] if known else [],
        )
        show(result["summary"])
        if work != "smoke":
            bars.save(file, result)
    if not (options.work or options.bars):
        for script in ("roofline.py", "last_layer.py", "growth.py"):
            subprocess.run([sys.executable, str(HERE / script)], check=True)
    for bar in bars.all_bars():
        print(bar.line())


if __name__ == "__main__":
    main()
