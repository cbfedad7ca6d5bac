"""docs/performance.md from the result files; nothing in it is typed in.

python benchmarks/page.py
"""

from pathlib import Path
from typing import Any

import bars
import gpu_section

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"

HEAD = """\
# Speed and memory

Written by `python benchmarks/page.py` from the files in `benchmarks/results/`. `make bench`
measures again (hours on 2 cores; `python benchmarks/run.py --work gsm` and so on do one work at a
time), `make profile` prints where a step's time goes.

What makes it fast: sequences are packed without padding (on GPUs by `varlen_attn` as torch 2.10 to
2.13 have it, in float32 and on 2.9 by the memory-efficient kernel over borders, else sequence by
sequence: written for GPUs, not yet run there); nothing is computed twice; the head
multiplies targets alone, in chunks, and never holds whole logits; what follows attention in a
decoder's last layer is computed at the targets alone; float32 products, those of long sequences'
attention too, go through oneDNN where MKL keeps the processor to AVX2 (AMD with AVX-512); large
tensors come from the heap, not from the system each time. What makes it small: micro-batches are as
small as costs little time (their budget is measured), filled evenly, the largest first so that the
others fit into the memory that it leaves, and oneDNN remembers the code of a few shapes only. None
of it changes the step.
"""

HOW = """\
Every contender runs in a process of its own, in turn, on the same rows, effective batch, optimizer
(AdamW, fused), clipping, precision and threads; each row is seen once. A `mixed` work has products
in bfloat16: `precision: mixed` here, autocast there; all others are float32. The ratio is the
median over rounds. Where a machine is shared, only the ratios mean something. Idle threads spin, as
is OpenMP's default; the command `samestep` lets them sleep ([train.md](train.md) says why and what
that costs). `trl:B`, `trainer:B`
and `plain:B` are padded micro-batches of B rows; `trl-default` adds TRL's gradient checkpointing,
`trl-free` its padding-free layout, `trl-packing` its packing (other rows a step); `plain` is a
PyTorch loop with whole logits.
"""


REASONS = {
    "memory on gsm rows": (
        "weights, gradients, AdamW's two moments and the libraries come before any activation, and "
        "the allocator leaves holes between tensors of ever different sizes. Handing those back to "
        "the system before each micro-batch would close the gap and cost speed."
    ),
    "share of the GEMM roofline": (
        "norms, residuals, activation functions and rotations are no products and pass over memory "
        "once each, in the model's own code; and while Python dispatches the other core waits."
    ),
    "tokens/s on gsm rows": (
        "TRL's best takes one sequence at a time here, which needs no padding either; what is left "
        "to win are the faster products and the head on targets alone. On Intel's processors both "
        "multiply by the same library, and the faster products are not to be had."
    ),
    "tokens/s on tool chats": (
        "most of such a step are the long prompts, which both run through every layer; the head, "
        "where masked positions are saved, is a small part of this model. What is won are the "
        "faster products, in the layers and in attention; what is left are the operations between "
        "them, which both do alike."
    ),
    "peak memory, 512 examples": (
        "micro-batches are filled evenly, so that the few of 8 examples are smaller than the many "
        "of 512; and code for more shapes of products is remembered until the caches are full. "
        "From 32 examples on the peak is flat."
    ),
    "memory a further token": (
        "what the heap keeps free between the tensors is in it; see the table of lengths below."
    ),
    "time of exact normalisation": (
        "counting, a multiplication a term and clipping are all that is added; on so small a model "
        "that shows."
    ),
}
"""Why a bar is missed, by words of its name; printed only where it is."""


def reasons() -> str:
    """A line for each bar that is not reached."""
    lines = []
    for bar in bars.all_bars():
        if bar.missed:
            why = [why for name, why in REASONS.items() if name in bar.name]
            lines.append(f"- {bar.name}: {why[0] if why else 'see the figures below.'}\n")
    return "".join(lines)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def comparison(result: dict[str, Any]) -> str:
    """One work's table."""
    rows = [
        [
            row["name"],
            f"{row['tokens_per_second']:.0f}",
            "{:.2f} ({:.2f} .. {:.2f})".format(row["speed_of_samestep"], *row["spread"]),
            f"{row['peak_bytes'] / 1e9:.2f}",
            f"{row['memory_of_samestep']:.2f}",
            f"{_start_up(result, row['name']):.0f}",
        ]
        for row in result["summary"]
    ]
    failed = {run["name"]: run["error"] for run in result["runs"] if "error" in run}
    loads = [run["load"] for run in result["runs"] if "load" in run]
    rounds, steps = result["rounds"], result["steps"]
    told = "1 round" if rounds == 1 else f"up to {rounds} rounds"
    notes = [f"{told} of {steps} step{'s' * (steps > 1)} on {result['cores']} cores"]
    if loads:
        notes.append(f"load of the machine {min(loads):.0f} to {max(loads):.0f}")
    notes += [f"{name} failed: {error}" for name, error in failed.items()]
    header = [
        *("contender", "tokens/s", "samestep is x faster", "peak GB", "samestep takes x"),
        "start-up and saving, s",
    ]
    title = f"## {result['work']}, on {result['processor']}"
    return f"{title}\n\n{table(header, rows)}\n{'; '.join(notes)}.\n"


def _start_up(result: dict[str, Any], name: str) -> float:
    """Seconds outside the steps: imports, loading, tokenising, and for samestep also saving."""
    return min(run["outside_steps"] for run in result["runs"] if run["name"] == name)


def kernels(result: dict[str, Any]) -> str:
    """The roofline and the profile."""
    rows = [[kind, f"{share:.1%}"] for kind, share in result["profile"].items()]
    whole = result["seconds"]
    timed = [
        [part, f"{seconds:.3f}", f"{seconds / whole:.1%}"]
        for part, seconds in (result["parts"] | result["around"]).items()
    ]
    return (
        f"## Roofline and profile, on {result['processor']}\n\n"
        f"One micro-batch of {result['tokens']} tokens on {result['threads']} threads: its matrix "
        f"products alone would take {result['product_seconds']:.2f} s ({result['gflops']:.0f} "
        f"GFLOP/s; with MKL {result['gflops_of_mkl']:.0f}), its attention "
        f"{result['attention_seconds']:.2f} s; the step takes {result['seconds']:.2f} s: "
        f"{result['share']:.0%} of the roofline.\n\n"
        + table(["where the time goes", "share"], rows)
        + "\nThe parts of the model by themselves, forward and backward, and what a step does "
        f"beside its micro-batches, in seconds and against this one; {result['idle']:.0%} of the "
        "cores' time is idle (threads that wait for the next operation spin, and count as busy)."
        "\n\n" + table(["part", "s", "of the micro-batch"], timed)
    )


def compiled(result: dict[str, Any]) -> str:
    """What torch.compile does."""
    if "error" in result:
        told = f"it fails: {result['error']}"
    else:
        told = f"{result['compiled']:.2f} s, after a first step of {result['first']:.2f} s"
    return (
        "## torch.compile\n\n`--compile layers` compiles each decoder layer, on GPUs (written for, "
        "not yet run there). On a processor it is not taken: the same micro-batches "
        f"of SmolLM2-135M take {result['eager']:.2f} s without it; with each layer compiled for "
        f"varying lengths (torch {result['torch']}), {told}.\n"
    )


def last_layer(result: dict[str, Any]) -> str:
    """What the cut of the last layer saves."""
    rows = [
        [
            name,
            f"{one['tokens']:,}",
            f"{one['targets']:,}",
            f"{one['whole']:.2f}",
            f"{one['cut']:.2f}",
            f"{one['saved']:.1%}",
        ]
        for name, one in result.items()
    ]
    header = ["work", "tokens", "targets", "s, whole layer", "s, at targets", "saved"]
    return (
        "## The last layer at the targets alone\n\nOne micro-batch, with and without in turn, "
        "medians. A model of n layers can save one n-th of its layers' products at most; "
        "differences of half a percent are noise here.\n\n" + table(header, rows)
    )


def growth(result: dict[str, Any]) -> str:
    """Growth with batch, length and vocabulary."""
    parts = ["## Growth\n\nA small Llama from random weights, micro-batches of 256 tokens.\n"]
    for name, key in (("batch", "batch"), ("length", "length"), ("vocabulary", "vocabulary")):
        rows = [
            [
                f"{one[key]:,}",
                f"{one['tokens']:,}",
                f"{one['seconds']:.2f}",
                f"{one['peak_bytes'] / 1e9:.2f}",
            ]
            for one in result[name]["points"]
        ]
        parts.append(table([name, "tokens", "s of the cores a step", "peak GB"], rows))
    even, plan = result["normalisation"], result["planner"]
    parts.append(
        f"Counting and dividing once cost {even['share']:.1%} of the naive loop's time. The "
        f"planner takes {plan['seconds_per_step'] * 1e3:.2f} ms a step with "
        f"{plan['examples']:,} examples, and "
        f"{plan['seconds_to_resume_in_epoch_100']:.2f} s to resume in epoch 100.\n"
    )
    return "\n".join(parts)


def page() -> str:
    """The whole page."""
    lines = "\n".join(bar.line() for bar in bars.all_bars())
    parts = [HEAD, f"## The bars\n\n```\n{lines}\n```\n"]
    if told := reasons():
        parts.append(f"Why not:\n\n{told}")
    works = [bars.load(path.stem) for path in sorted(bars.RESULTS.glob("train-*.json"))]
    if works:
        parts += [HOW, *(comparison(work) for work in works if work is not None)]
    sections = {
        **{bars.file_of("roofline", maker): kernels for maker in bars.MAKERS.values()},
        "last-layer": last_layer,
        "growth": growth,
        "compiled": compiled,
    }
    for name, section in sections.items():
        result = bars.load(name)
        if result is not None:
            parts.append(section(result))
    parts.append(gpu_section.section(bars.load("gpu")))
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
