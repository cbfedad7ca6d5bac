"""Everything that needs a GPU, in one go: prepares, runs within five minutes, writes results.

    python benchmarks/gpu/gpu_run.py                     in order of worth, within five minutes
    python benchmarks/gpu/gpu_run.py --minutes 30        all works, and every peer
    python benchmarks/gpu/gpu_run.py --only exactness    parts whose name contains this
    python benchmarks/gpu/gpu_run.py --tiny --device cpu a try without a GPU (minutes; not kept)

Parts, in `gpu_parts.py`: the tests marked `gpu`; speed and memory of `samestep train` on the first
work; exactness of splits, padding and packing in every precision against float64; TRL at its best;
then the other works and peers. Each part is a process of its own with a time limit: one that
fails, hangs or runs out of memory is noted, with the figures that it had printed, and the next
begins. Results stand in `benchmarks/results/gpu.json` as soon as a part prints any, with the bars
that can be told from them (`gpu_bars.py`); `benchmarks/page.py` makes the GPU section of
docs/performance.md of that.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from gpu_bars import bars, limit_of
from gpu_parts import Part, parts
from gpu_works import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"

LEAST = 10.0
"""Seconds below which no part is begun."""


def run_part(part: Part, seconds: float, tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Run a part, its output shown as it comes.

    Args:
        part: The part.
        seconds: After which it is ended, with all that it has started.
        tell: Gets the result so far whenever there are new figures.

    Returns:
        Its figures, and what went wrong under ``error``.
    """
    result: dict[str, Any] = {"name": part.name}
    if part.needs and importlib.util.find_spec(part.needs) is None:
        return result | {"error": f"left out: {part.needs} is not installed"}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        result |= _ended(part, seconds, began=began, scratch=scratch, tell=tell)
    return result | {"took": round(time.monotonic() - began, 1)}


def _ended(
    part: Part,
    seconds: float,
    *,
    began: float,
    scratch: str,
    tell: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """The result of a part whose files, tens of gigabytes of weights, go to a folder of its own."""
    result: dict[str, Any] = {"name": part.name}
    process = subprocess.Popen(
        [sys.executable, *part.command],
        cwd=ROOT,
        env=_environment(scratch),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that what it starts can be ended with it
        text=True,
        errors="replace",
    )
    last, code = "", None
    lines: queue.Queue[str | None] = queue.Queue()
    reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
    reader.start()
    try:
        for line in _until(began + seconds, process, lines):
            last = line or last
            _note(line, part, result, tell)
        if time.monotonic() < began + seconds:
            code = process.wait(began + seconds - time.monotonic())
    except subprocess.TimeoutExpired:
        code = None
    finally:
        _end(process, reader)
    if code == 0 and not part.figures:
        result["figures"] = {"told": last.strip("= ")}
    if code is None:
        result["error"] = f"ended after {seconds:.0f} s"
    elif code != 0 or "figures" not in result:
        result["error"] = f"exit code {code}: {last.strip('= ')}"[:300]
    return result


def _note(
    line: str, part: Part, result: dict[str, Any], tell: Callable[[dict[str, Any]], None]
) -> None:
    """Take what a line says: figures, a test that failed, or something to show."""
    if part.figures and line.startswith('{"'):
        with contextlib.suppress(ValueError):  # cut off
            result["figures"] = json.loads(line)
            tell(result)
        return
    if line.startswith(("FAILED", "ERROR")):
        result.setdefault("failed", []).append(line[:300])
    print(f"    {line[:200]}", flush=True)


def _until(
    end: float, process: "subprocess.Popen[str]", lines: "queue.Queue[str | None]"
) -> Iterator[str]:
    """Lines as they come, until the output is closed, the process ends, or the time is over.

    What a process has started may hold its output open after it has ended, so the end of the
    output is not waited for alone.
    """
    ended = False
    while time.monotonic() < end:
        try:
            line = lines.get(timeout=0.1)
        except queue.Empty:
            if ended:
                return
            ended = process.poll() is not None  # once more, for what it wrote last
            continue
        if line is None:
            return
        yield line.rstrip()


def _read(output: IO[str], lines: "queue.Queue[str | None]") -> None:
    for line in output:
        lines.put(line)
    lines.put(None)


def _end(process: "subprocess.Popen[str]", reader: threading.Thread) -> None:
    """End a process and all of its session, which closes what it wrote to."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    reader.join(2)
    if not reader.is_alive() and process.stdout is not None:
        process.stdout.close()


def _environment(scratch: str) -> dict[str, str]:
    kernels = Path(tempfile.gettempdir()) / "samestep-gpu-kernels"  # what one compiled serves all
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(kernels),
        **os.environ,
        "TMPDIR": scratch,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def machine(device: str) -> dict[str, Any]:
    """What the figures hold for; without PyTorch, which would take memory of the GPU."""
    known = {each.metadata["Name"].replace("-", "_") for each in importlib.metadata.distributions()}
    versions = {
        package: importlib.metadata.version(package) if package in known else "not installed"
        for package in ("torch", "transformers", "trl", "liger_kernel")
    }
    name = device
    if device != "cpu":
        asked = "import torch; print(torch.cuda.get_device_name())"
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = [sys.executable, "-c", asked]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
            name = done.stdout.strip()
    return {"device": name, "versions": versions}


class Report:
    """What was measured so far, in a file whenever that changes.

    Args:
        found: What it holds for.
        out: The file; None: it is not kept.
    """

    def __init__(self, found: dict[str, Any], out: Path | None) -> None:
        self.found: dict[str, Any] = {**found, "parts": [], "bars": []}
        self._out = out

    def write(self, now: dict[str, Any] | None = None) -> None:
        """Write all parts that are done, and the one that runs."""
        done = [*self.found["parts"], *([] if now is None else [now])]
        self.found |= {"limit_flops_per_second": limit_of(done), "bars": bars(done)}
        if self._out is not None:
            text = json.dumps(self.found | {"parts": done}, indent=1) + "\n"
            beside = self._out.with_suffix(".tmp")
            beside.write_text(text, encoding="utf-8")
            beside.replace(self._out)

    def add(self, part: dict[str, Any]) -> None:
        """Note a part that is over."""
        self.found["parts"].append(part)
        self.write()


def main() -> int:
    """Run the parts that fit into the time; write what each gave."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="for all parts together")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model; results are not kept")
    parser.add_argument("--out", type=Path, help="where to write; without --tiny the results")
    parser.add_argument("--only", default="", help="parts whose name contains this")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    out = options.out or (None if options.tiny else RESULTS)
    report = Report(machine(options.device), out)
    print(json.dumps(report.found, indent=1), flush=True)
    for part in parts(options.device, tiny=options.tiny):
        if options.only not in part.name:
            continue
        left = end - time.monotonic()
        if left < LEAST:
            report.add({"name": part.name, "error": "left out: no time"})
            continue
        print(f"== {part.name} ({left:.0f} s left)", flush=True)
        report.add(run_part(part, min(left, part.seconds), report.write))
        print(f"-> {json.dumps(report.found['parts'][-1])}", flush=True)
    failed = [each["name"] for each in report.found["parts"] if "error" in each]
    print(f"{len(report.found['parts']) - len(failed)} parts done, not: {', '.join(failed)}")
    for bar in report.found["bars"]:
        wanted = f"at {'most' if bar['at_most'] else 'least'} {bar['bound']:.4g}"
        verdict = "holds" if bar["holds"] else "does not hold"
        print(f"{bar['bar']}: {bar['measured']:.4g}, {wanted}: {verdict}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a part ends with this
    sys.exit(main())
