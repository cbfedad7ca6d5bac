"""Everything that needs a GPU, in one go: prepares, runs within five minutes, writes results.

    python benchmarks/gpu/gpu_run.py                     the whole, in order of worth, 290 s
    python benchmarks/gpu/gpu_run.py --minutes 30        more works, and every peer
    python benchmarks/gpu/gpu_run.py --tiny --device cpu a try without a GPU (minutes; not kept)

Parts: the tests marked `gpu`; exactness of splits, padding and packing in every precision against
float64; speed and memory of `samestep train` without flags beside TRL and a compiled loop. Each
part is a process of its own: one that fails, hangs or runs out of memory is noted, and the next
begins. What is done stands in `benchmarks/results/gpu.json` after each part, from which
`benchmarks/page.py` makes the GPU section of docs/performance.md.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_works import HERE, ROOT

RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"


@dataclass(frozen=True)
class Part:
    """A part: a command whose last line of output is JSON, or that only succeeds or fails.

    Attributes:
        name: In the results.
        command: After the interpreter.
        seconds: What it may take.
        figures: Whether its last line is JSON.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    figures: bool = True


def parts(device: str, *, tiny: bool) -> list[Part]:
    """What is run, in the order of its worth."""
    tests = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests/gpu"))
    limit = (str(HERE / "gpu_limit.py"), "--device", device, *(["--tiny"] if tiny else []))
    found = [Part("tests", tests, 90, figures=False), Part("limit", limit, 40)]
    works = {"tiny": ("trl:8", "plain:8")} if tiny else _PEERS
    for work, peers in works.items():
        if work == "qwen2-gsm" or tiny:
            shape = "tiny" if tiny else "smollm2-135m"
            command = (str(HERE / "gpu_exactness.py"), "--shape", shape, "--device", device)
            found.append(Part(f"exactness {shape}", command, 90))
        for name in ("samestep", *peers):
            command = (str(HERE / "gpu_contender.py"), name, "--work", work, "--device", device)
            found.append(Part(f"{work} {name}", command, 120))
    return found


_PEERS = {
    "llama-1b-gsm": ("trl-liger:128", "trl-liger:64", "trl-bf16:128", "plain:32", "samestep:none"),
    "smollm2-gsm": ("trl-liger:128", "plain:64"),
    "qwen2-gsm": ("trl-liger:64",),
    "llama-1b-tools": ("trl-liger:32", "trl-liger:8"),
    "llama-1b-long": ("trl-liger:1", "trl-liger:2"),
    "llama-8b-lora": ("trl-liger:16",),
}
"""Works by their worth, each with TRL as it was found best, and what else is compared."""


def run_part(part: Part, seconds: float) -> dict[str, Any]:
    """Run a part, its output shown as it comes.

    Args:
        part: The part.
        seconds: After which it is ended.

    Returns:
        Its figures, or why there are none.
    """
    began = time.monotonic()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    process = subprocess.Popen(
        [sys.executable, *part.command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    killer = threading.Timer(seconds, process.kill)
    killer.start()
    lines: list[str] = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            lines.append(line.rstrip())
            if not line.startswith('{"'):
                print(f"    {lines[-1][:200]}", flush=True)
        code = process.wait()
    finally:
        killer.cancel()
        process.kill()
        process.stdout.close()
    took = round(time.monotonic() - began, 1)
    last = next((line for line in reversed(lines) if line), "")
    figures = next((line for line in reversed(lines) if line.startswith('{"')), None)
    result: dict[str, Any] = {"name": part.name, "took": took}
    if part.figures and figures is not None:
        result["figures"] = json.loads(figures)
    if code == 0 and not part.figures:
        result["figures"] = {"told": last}
    if code != 0 or "figures" not in result:
        ended = f"ended after {seconds:.0f} s" if took >= seconds else f"exit code {code}: {last}"
        result["error"] = ended[:300]
    return result


def machine(device: str) -> dict[str, Any]:
    """What the figures hold for."""
    import torch

    known = {each.metadata["Name"].replace("-", "_") for each in importlib.metadata.distributions()}
    versions = {
        package: importlib.metadata.version(package) if package in known else "not installed"
        for package in ("torch", "transformers", "trl", "liger_kernel")
    }
    name = device if device == "cpu" else torch.cuda.get_device_name()
    return {"device": name, "versions": versions}


def main() -> int:
    """Run the parts that fit into the time; write what each gave."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=290 / 60, help="for all parts together")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model; results are not kept")
    parser.add_argument("--out", type=Path, help="where to write; without --tiny the results")
    parser.add_argument("--only", default="", help="parts whose name contains this")
    options = parser.parse_args()
    out = options.out or (None if options.tiny else RESULTS)
    end = time.monotonic() + 60 * options.minutes
    report: dict[str, Any] = {**machine(options.device), "parts": []}
    print(json.dumps(report, indent=1), flush=True)
    for part in parts(options.device, tiny=options.tiny):
        if options.only not in part.name:
            continue
        left = end - time.monotonic()
        if left < 10:
            report["parts"].append({"name": part.name, "error": "left out: no time"})
        else:
            print(f"== {part.name} ({left:.0f} s left)", flush=True)
            report["parts"].append(run_part(part, min(left, part.seconds)))
        print(f"-> {json.dumps(report['parts'][-1])}", flush=True)
        if out is not None:
            out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    failed = [each["name"] for each in report["parts"] if "error" in each]
    print(
        f"{len(report['parts']) - len(failed)} parts done, {len(failed)} not: {', '.join(failed)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
