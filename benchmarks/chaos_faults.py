"""Faults beside kills at random: files damaged, strangers' files, other models, two runs, hangs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from planted import PLACES, SEEN_AT, PlantedRun
from safetensors.torch import load_file, save_file

Outcome = tuple[str, bool, str]
"""The fault; whether nothing was lost and everything was said; what happened if not."""


def interrupted(runs: Any, *, after: int) -> Path:
    """A copy of the folder of a run that was killed after so many steps."""
    (process,) = runs.start(fresh=True)
    log, end = runs.out / "log.jsonl", time.monotonic() + 300
    while time.monotonic() < end:
        if log.exists() and log.read_bytes().count(b"\n") >= after:
            break
        time.sleep(0.005)
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    runs.finish([process])
    copy = runs.out.with_name(f"{runs.out.name}-interrupted")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(runs.out, copy)
    return copy


def restore(runs: Any, copy: Path) -> None:
    shutil.rmtree(runs.out, ignore_errors=True)
    shutil.copytree(copy, runs.out)


def ends_the_same(runs: Any) -> tuple[bool, str]:
    """Whether the run, resumed, has the weights of an unbroken one to the bit."""
    codes = runs.finish(runs.start(fresh=False))
    if any(codes):
        return False, f"exit codes {codes}: {runs.said()[-200:]}"
    same = runs.same()
    return same, "" if same else "other weights"


def _cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _flip(content: bytes) -> bytes:
    at = len(content) // 3
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :] if content else b"x"


DAMAGES: dict[str, Callable[[bytes], bytes] | None] = {
    "cut": _cut,
    "a bit flipped": _flip,
    "empty": lambda content: b"",
    "gone": None,
}


def damaged_files(runs: Any) -> Iterator[Outcome]:
    """Each file of an interrupted run damaged, once in each way."""
    copy = interrupted(runs, after=6)
    newest = max(path.name for path in (copy / "checkpoints").glob("step-*"))
    for file in sorted(path.relative_to(copy) for path in copy.rglob("*") if path.is_file()):
        if "checkpoints" in file.parts and newest not in file.parts:
            continue  # what is not read any more
        for name, damage in DAMAGES.items():
            restore(runs, copy)
            if damage is None:
                (runs.out / file).unlink()
            else:
                (runs.out / file).write_bytes(damage((runs.out / file).read_bytes()))
            same, why = ends_the_same(runs)
            yield (
                "each file of a run damaged in its turn, in four ways",
                same,
                f"{file} {name}: {why}",
            )


def foreign_files(runs: Any) -> Iterator[Outcome]:
    """Files that no run wrote, where sync tools and people put them; they must stay, too."""
    copy = interrupted(runs, after=6)
    newest = max((copy / "checkpoints").glob("step-*"))
    shard = next(newest.glob("*.safetensors"))
    places = {
        "a copy of a shard": f"checkpoints/{newest.name}/copy of {shard.name}",
        "another shard": f"checkpoints/{newest.name}/zzz.safetensors",
        "a note": f"checkpoints/{newest.name}/notes.txt",
        "a folder like a checkpoint": f"checkpoints/step-best/{shard.name}",
        "a step with another width": f"checkpoints/step-99/{shard.name}",
        "a file beside the log": "log (conflict).jsonl",
    }
    for name, place in places.items():
        restore(runs, copy)
        (runs.out / place).parent.mkdir(exist_ok=True)
        shutil.copy(shard, runs.out / place)
        same, why = ends_the_same(runs)
        yield (
            "foreign files in a run's folder",
            same and (runs.out / place).exists(),
            f"{name}: {why}",
        )


def _scale(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = sorted(weights)[0]
    weights[name] = weights[name] * 1.25
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _set(name: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        fields = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(fields | {name: value}), encoding="utf-8")

    return change


def _append(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with (folder / name).open("a", encoding="utf-8") as file:
            file.write(" ")

    return change


CHANGES: dict[str, Callable[[Path], None]] = {
    "base weights": _scale,
    "rms_norm_eps": _set("rms_norm_eps", 0.5),
    "hidden_act": _set("hidden_act", "relu"),
    "rope_theta": _set("rope_parameters", {"rope_type": "default", "rope_theta": 99.0}),
    "tokenizer": _append("tokenizer.json"),
    "template": _append("chat_template.jinja"),
}


def changed_models(runs: Any) -> Iterator[Outcome]:
    """A model that changed under adapters: refused by name, and the run goes on once it is back."""
    copy, model = interrupted(runs, after=6), runs.folder / "tiny"
    kept = runs.folder / "tiny-kept"
    shutil.copytree(model, kept)
    for name, change in CHANGES.items():
        restore(runs, copy)
        change(model)
        codes = runs.finish(runs.start(fresh=False))
        named = codes == [1] and "ConfigError" in runs.said()
        shutil.rmtree(model)
        shutil.copytree(kept, model)
        same, why = ends_the_same(runs) if named else (False, f"codes {codes}")
        yield "a model changed under adapters", named and same, f"{name}: {why}"


def two_runs(runs: Any, number: int) -> Iterator[Outcome]:
    """A second run into the folder of one that is under way: refused, and the first ends well."""
    for _ in range(number):
        first = runs.start(fresh=True)
        while not (runs.out / "log.jsonl").exists():
            time.sleep(0.005)
        (second,) = runs.finish(runs.start(fresh=False))
        (code,) = runs.finish(first)
        said = "another run is writing" in runs.said()
        # Slow to start, the second may come when the first has ended: then it has nothing to do.
        right = code == 0 and runs.same() and (second == 0 or said)
        yield "two runs in one folder", right, f"exit codes {code} and {second}"


def second_signals(runs: Any, number: int) -> Iterator[Outcome]:
    """SIGTERM, and again as soon as the save that it asked for has begun."""
    for _ in range(number):
        (process,) = runs.start(fresh=True)
        log = runs.out / "log.jsonl"
        while not (log.exists() and log.stat().st_size):
            time.sleep(0.002)
        os.kill(process, signal.SIGTERM)
        end = time.monotonic() + 20
        while time.monotonic() < end and not any((runs.out / "checkpoints").glob(".step-*")):
            if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                break
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
        codes = runs.finish([process])
        said = runs.said()[-300:]
        same, why = ends_the_same(runs)
        right = codes == [143] and same
        yield "SIGTERM again inside of a save", right, f"codes {codes}: {said}; then: {why}"


def planted_hangs(folder: Path) -> Iterator[Outcome]:
    """Two ranks without a launcher, of which one hangs: it is named, and both end."""
    todo = [(place, victim) for place, victims in PLACES.items() for victim in victims]
    for some in batched(todo, TOGETHER):
        runs = [PlantedRun(folder, place, victim) for place, victim in some]
        for (place, victim), run in zip(some, runs, strict=True):
            codes, text = run.end(300)
            if place == "compiled code":
                named = f"rank {victim} died or was stopped, or hangs in compiled code" in text
            else:
                named = f"rank {victim} hangs (last seen at {SEEN_AT[place]}" in text
            right = named and None not in codes and 0 not in codes and "Traceback" not in text
            what = f"{place} {victim}: {codes}, {text[-300:]}"
            yield "a rank of two hangs in its turn everywhere", right, what


TOGETHER = 5
"""Runs that hang at the same time: they wait, most of it."""


def batched(items: list[Any], size: int) -> Iterator[list[Any]]:
    """The items, so many at a time."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def killed_launchers(folder: Path, number: int) -> Iterator[Outcome]:
    """kill -9 of the launcher of two ranks: they end, and the run can be resumed."""
    out = folder / "launched"
    arguments = ["--model", str(folder / "tiny"), "--data", str(folder / "rows.jsonl")]
    options = ["--out", str(out), "--steps", "60", "--save-every", "4", "--ranks", "2"]
    command = [sys.executable, "-m", "samestep", "train", *arguments, *options]
    for _ in range(number):
        shutil.rmtree(out, ignore_errors=True)
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        launcher, end = subprocess.Popen(command, **quiet), time.monotonic() + 300
        log = out / "log.jsonl"
        while time.monotonic() < end and not (log.exists() and log.read_bytes().count(b"\n") > 5):
            time.sleep(0.02)
        ranks = psutil.Process(launcher.pid).children(recursive=True)
        launcher.kill()
        launcher.wait()
        _, alive = psutil.wait_procs(ranks, timeout=60)
        for rank in alive:
            rank.kill()
        again = [*command, "--resume"]
        done = subprocess.run(again, capture_output=True, text=True, check=False)
        right = bool(ranks) and not alive and done.returncode == 0
        yield "kill -9 of the launcher", right, f"{len(alive)} alive, then {done.stderr[-200:]}"
