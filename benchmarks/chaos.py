"""Break runs on purpose, again and again, and count what is lost: writes docs/faults.md.

    python benchmarks/chaos.py [--scale 1.0] [--json benchmarks/results/chaos.json] [--page]

The page is made from the result file, --page makes it alone; its part on inputs is that of
`benchmarks/fuzz.py`, and stays.

Every run is a real training run in a process of its own, forked from one that has PyTorch loaded. A
fault survives if the run, resumed until it ends, has the weights of a run that nothing broke, equal
bit for bit (of two ranks: of an unbroken run on two ranks).
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

import torch
from runs import llama_folder, run_config, write_rows
from safetensors.torch import load_file

from chaos_faults import (
    Outcome,
    changed_models,
    damaged_files,
    foreign_files,
    killed_launchers,
    planted_hangs,
    second_signals,
    two_runs,
)
from samestep.errors import Interrupted, RankError
from samestep.train.trainer import train

PAGE = Path("docs/faults.md")
ATTACK = Path(__file__).parent.parent / "tests" / "support" / "save_attack.py"
STEPS = 12
PATIENCE = 60
"""Seconds after which a run that should have ended counts as hanging; on a busy machine, twenty
times those that an unbroken run took."""


@dataclass
class Tally:
    """One row of the table."""

    fault: str
    injected: int = 0
    survived: int = 0
    problems: list[str] = field(default_factory=list)

    def row(self) -> str:
        lost = self.injected - self.survived
        return f"| {self.fault} | {self.injected} | {self.survived} | {lost} |"


class Runs:
    """Runs of one tiny configuration on one or two ranks, in forked processes."""

    def __init__(self, folder: Path, ranks: int, **changes: Any) -> None:
        self.folder, self.ranks, self.changes = folder, ranks, changes
        self.out = folder / "-".join(["out", str(ranks), *changes])
        self.seconds, started = 100.0, time.monotonic()
        self.finish(self.start(fresh=True))
        self.seconds = time.monotonic() - started
        self.wanted = self.weights()

    def start(self, *, fresh: bool) -> list[int]:
        """Fork the ranks of a run, a new one or a resumed one; their process ids."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        if fresh:
            shutil.rmtree(self.out, ignore_errors=True)
        ids = []
        for rank in range(self.ranks):
            child = os.fork()
            if child == 0:
                self._run(rank, port, resume=not fresh)
            ids.append(child)
        return ids

    def _run(self, rank: int, port: int, *, resume: bool) -> None:
        code = 1
        try:
            with (self.folder / f"output-{rank}.txt").open("w") as text:
                os.dup2(text.fileno(), 2)
            if self.ranks > 1:
                os.environ |= {
                    "RANK": str(rank),
                    "WORLD_SIZE": str(self.ranks),
                    "LOCAL_RANK": str(rank),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
            train(
                run_config(
                    self.folder,
                    out=str(self.out),
                    steps=STEPS,
                    save_every=1,
                    micro_batch=2,
                    rank_timeout=10,
                    resume=resume,
                    **self.changes,
                )
            )
            code = 0
        except Interrupted as stopped:
            code = 128 + stopped.number
        except RankError as error:
            print(error, file=sys.stderr)
            code = 3
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        finally:
            os._exit(code)

    def finish(self, ids: list[int]) -> list[int]:
        """Wait for every rank; the exit codes (-9 after SIGKILL). A rank that hangs is killed."""
        end, codes = time.monotonic() + max(PATIENCE, 20 * self.seconds), {}
        while len(codes) < len(ids):
            for child in set(ids) - codes.keys():
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > end:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    codes[child] = -99
            time.sleep(0.005)
        return [codes[child] for child in ids]

    def said(self) -> str:
        """What rank 0 of the last run printed to stderr."""
        return (self.folder / "output-0.txt").read_text(errors="replace")

    def weights(self) -> dict[str, torch.Tensor]:
        (file,) = (self.out / "model").glob("*.safetensors")
        return load_file(file)

    def same(self) -> bool:
        """Whether the run that has ended has the weights of the unbroken one, to the bit."""
        found = self.weights()
        return all(torch.equal(found[name], tensor) for name, tensor in self.wanted.items())


def break_and_resume(
    runs: Runs, tally: Tally, number: int, inject: Callable[[list[int]], list[int]]
) -> None:
    """Inject a fault into runs, resuming each until it ends; compare where one has ended.

    Args:
        runs: What to run.
        tally: Counts.
        number: Faults to inject.
        inject: Breaks a run under way and gives the exit codes; all 0 if the run ended before.
    """
    while tally.injected < number:
        fresh, faults = True, 0
        while True:
            codes = inject(runs.start(fresh=fresh))
            if all(code == 0 for code in codes):
                break
            faults, fresh = faults + 1, False
            if -99 in codes or 1 in codes or tally.injected + faults >= number:
                break
        last = runs.finish(runs.start(fresh=False)) if any(codes) else codes
        tally.injected += faults
        if all(code == 0 for code in last) and runs.same():
            tally.survived += faults
        print(tally.row(), flush=True)


def at_random(runs: Runs, draw: random.Random, number: signal.Signals) -> Any:
    """Send a signal to rank 0 or to the last rank at a random moment of the run."""

    def inject(ids: list[int]) -> list[int]:
        time.sleep(draw.uniform(0.1, 1.0) * runs.seconds)
        victim = ids[0] if number != signal.SIGKILL else draw.choice(ids)
        _send(victim, number)
        return runs.finish(ids)

    return inject


def in_a_checkpoint(runs: Runs, draw: random.Random) -> Any:
    """Kill the run while the folder of a checkpoint is still hidden."""

    def inject(ids: list[int]) -> list[int]:
        skip, seen, end = draw.randrange(3), set[str](), time.monotonic() + PATIENCE
        while time.monotonic() < end:
            hidden = _hidden(runs.out / "checkpoints")
            seen |= hidden
            if hidden and len(seen) > skip:
                time.sleep(draw.uniform(0, 0.004))
                _send(ids[0], signal.SIGKILL)
                break
            if os.waitid(os.P_PID, ids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                break
        return runs.finish(ids)

    return inject


def damaged(runs: Runs, draw: random.Random) -> Any:
    """Kill the run at random, then flip a bit of its newest checkpoint, or cut a file of it."""

    def inject(ids: list[int]) -> list[int]:
        codes = at_random(runs, draw, signal.SIGKILL)(ids)
        found = sorted((runs.out / "checkpoints").glob("step-*"))
        if any(codes) and len(found) > 1:
            file = draw.choice(sorted(found[-1].iterdir()))
            content = bytearray(file.read_bytes())
            if draw.random() < 0.5:
                content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            else:
                del content[draw.randrange(len(content)) :]
            file.write_bytes(content)
        return codes

    return inject


def attacked_saves() -> list[Tally]:
    """Kills and failures at every file operation of saves of a tiny network."""
    done = subprocess.run(
        [sys.executable, str(ATTACK)],
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    tallies = []
    for name, tried in result["tried"].items():
        lost = [line for line in result["lost"] if line.startswith(f"{name}, ")]
        tally = Tally(f"each file operation of a save ({name}): kill -9, EIO, ENOSPC, EACCES")
        tally.injected, tally.survived = tried, tried - len(lost)
        tallies.append(tally)
    return tallies


def counted(outcomes: Iterator[Outcome]) -> Tally:
    """The faults of one kind, counted."""
    tally = Tally("")
    for fault, survived, why in outcomes:
        tally.fault = fault
        tally.injected += 1
        tally.survived += survived
        if not survived:
            tally.problems.append(why)
    print(tally.row(), *tally.problems, sep="\n", flush=True)
    return tally


def _hidden(folder: Path) -> set[str]:
    with suppress(FileNotFoundError):
        return {name for name in os.listdir(folder) if name.startswith(".step-")}
    return set()


def _send(process: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the faults to inject")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/chaos.json"))
    parser.add_argument("--page", action="store_true", help="write docs/faults.md alone")
    options = parser.parse_args()
    if not options.page:
        torch.set_num_threads(1)
        started = time.monotonic()
        rows: list[dict[str, Any]] = []
        for tally in all_faults(options.scale):  # kept one by one: it takes long
            rows.append(asdict(tally))
            result = {
                "minutes": round((time.monotonic() - started) / 60, 1),
                "cores": os.cpu_count(),
                "steps": STEPS,
                "faults": rows,
            }
            options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    result = json.loads(options.json.read_text(encoding="utf-8"))
    before = PAGE.read_text(encoding="utf-8")
    inputs = before[before.index("## Inputs") :] if "## Inputs" in before else ""
    PAGE.write_text(page(result, inputs), encoding="utf-8")
    if any(row["survived"] < row["injected"] for row in result["faults"]):
        sys.exit("something was lost")


def all_faults(scale: float) -> Iterator[Tally]:
    """Every kind of fault, so many of each; those that are tried one by one are always all."""
    draw = random.Random(0)

    def of(number: int) -> int:
        return max(1, round(number * scale))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        llama_folder(folder / "tiny")
        write_rows(folder / "rows.jsonl", 20)
        one, two = Runs(folder, 1), Runs(folder, 2)
        adapters = Runs(folder, 1, lora_rank=2)
        plan: list[tuple[str, int, Runs, Any]] = [
            ("kill -9 at a random moment", 60, one, at_random(one, draw, signal.SIGKILL)),
            ("kill -9 while a checkpoint is written", 40, one, in_a_checkpoint(one, draw)),
            ("SIGTERM at a random moment", 10, one, at_random(one, draw, signal.SIGTERM)),
            ("kill -9, and the newest checkpoint damaged", 10, one, damaged(one, draw)),
            ("kill -9 of one rank of two", 10, two, at_random(two, draw, signal.SIGKILL)),
        ]
        for fault, number, runs, inject in plan:
            tally = Tally(fault)
            break_and_resume(runs, tally, of(number), inject)
            yield tally
        yield counted(second_signals(one, of(10)))
        yield from attacked_saves()
        yield counted(damaged_files(one))
        yield counted(foreign_files(one))
        yield counted(changed_models(adapters))
        yield counted(two_runs(one, of(5)))
        yield counted(planted_hangs(folder))
        yield counted(killed_launchers(folder, of(3)))


def page(result: dict[str, Any], inputs: str) -> str:
    """The page of the result file, with the part that `benchmarks/fuzz.py` has written."""
    rows = "\n".join(
        Tally(row["fault"], row["injected"], row["survived"]).row() for row in result["faults"]
    )
    return f"""# Faults

## Runs
Written by `make chaos` ({result["minutes"]:.1f} minutes on {result["cores"]} cores) from
`benchmarks/results/chaos.json`: real runs of {result["steps"]} steps that save after every
step, broken on purpose. A fault is survived if the run, resumed until it ends, has the weights
of a run that nothing broke, equal bit for bit.

| fault | tried | survived | lost |
| --- | --- | --- | --- |
{rows}

Where every file operation of a save (of a tiny network) kills the process, or fails once, in
its turn, the fault is survived if a run then starts from a whole checkpoint, from before or
from after, and the next save leaves no trace (`tests/train/test_checkpoint_faults.py`). A model
that changed must be refused by name, and the run go on once it is back; of two runs in one
folder the second must be refused, and the first end as if alone. A rank that hangs (in loading,
resuming, collating, a micro-batch, a loss of the user's own, evaluation, the log, a save, after
one, the export, or compiled code) must be named with what it was doing, and both ranks end;
after kill -9 of the launcher both ranks must end, and the run be resumed.

Further faults are injected by the tests, each once or a few times: memory that runs out, by a
hook and for real, in a micro-batch, clipping, the update, a save and the export
(`tests/train/test_faults.py`, `tests/train/test_memory_faults.py`); losses and weights that are
not finite, full, slow and read-only disks, changed rows, a clock that jumps
(`tests/train/test_faults.py`, `tests/train/test_checkpoint.py`); a rank that is killed, hangs,
or fails alone under the launcher (`tests/distributed/test_faults.py`).

{inputs}"""


if __name__ == "__main__":
    main()
