"""How time and memory grow with the batch, the length and the vocabulary; the planner; dividing.

    python benchmarks/growth.py            (some minutes on 2 cores)
    python benchmarks/growth.py --smoke

A small Llama from random weights, synthetic tokens. Each point of memory runs in a process of its
own. Nothing here compares with a peer.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch

import bars
from samestep.utils.memory import keep_large_blocks

WIDTH, LAYERS = 256, 4
BUDGET = 256
"""Tokens a micro-batch, so few that the smallest batch is several of that size, too."""


def model(vocabulary: int, checkpointing: Any = "none") -> Any:
    """A small Llama as `samestep train` would set it up."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from samestep.kernels.gemm import speed_up_linear
    from samestep.models.activations import checkpoint_activations
    from samestep.models.probes import choose_padding, cut_last_layer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    made = LlamaForCausalLM(config).train()
    speed_up_linear(made)
    cut_last_layer(made, choose_padding(made, "auto"))
    checkpoint_activations(made, checkpointing)
    return made


def micro_batches(batch: int, length: int, vocabulary: int, budget: int) -> list[dict[str, Any]]:
    """A step of random rows of this mean length (one row has it exactly), cut under a budget.

    The second half of each is learned.
    """
    from samestep.data.batching import pack_micro_batches
    from samestep.data.collate import collate_examples
    from samestep.data.examples import Example

    draw = np.random.default_rng(0)
    ragged = draw.integers(length // 2, length + length // 2 + 1, batch).tolist()
    lengths = ragged if batch > 1 else [length]
    examples = []
    for row, size in enumerate(lengths):
        ids = torch.from_numpy(draw.integers(0, vocabulary, size))
        examples.append(Example(ids, ids.where(torch.arange(size) >= size // 2, -100), 1.0, row))
    cut = pack_micro_batches(lengths, micro_tokens=budget)
    return [collate_examples([examples[at] for at in positions]) for positions in cut]


def point(batch: int, length: int, vocabulary: int, checkpointing: str) -> dict[str, Any]:
    """The processor's seconds and the peak memory of a step, in this process."""
    import samestep

    keep_large_blocks()
    made = model(vocabulary, checkpointing)
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-4, fused=True)
    micros = micro_batches(batch, length, vocabulary, budget=BUDGET)
    loss = samestep.CausalLMLoss()
    samestep.step(made, optimizer, micros[:1], loss)
    began = time.process_time()  # of all cores: blind to the machine's other work
    report = samestep.step(made, optimizer, micros, loss)
    seconds = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"tokens": report.tokens, "seconds": seconds, "peak_bytes": peak}


def apart(**shape: Any) -> dict[str, Any]:
    """`point` in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--point", json.dumps(shape)],
        check=True,
        capture_output=True,
        text=True,
    )
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(json.dumps(shape | figures), file=sys.stderr, flush=True)
    return shape | figures


def straightness(points: list[dict[str, Any]]) -> float:
    """R^2 of the straight line of time over tokens."""
    tokens = np.array([one["tokens"] for one in points], dtype=float)
    seconds = np.array([one["seconds"] for one in points], dtype=float)
    residual = seconds - np.polyval(np.polyfit(tokens, seconds, 1), tokens)
    return 1 - float(residual.var() / seconds.var())


def bytes_of_a_further_token(few: dict[str, Any], many: dict[str, Any]) -> float:
    """What a token more takes, between two points."""
    return float((many["peak_bytes"] - few["peak_bytes"]) / (many["tokens"] - few["tokens"]))


def ratio_of_further_tokens(points: list[dict[str, Any]]) -> float:
    """Bytes of a further token at the end, over those up to there: 1 where memory is linear.

    Up to there from the first point on: between neighbours the heap's holes are half of it.
    """
    first, *_, before, last = points
    return bytes_of_a_further_token(before, last) / bytes_of_a_further_token(first, before)


def normalisation(repeats: int) -> dict[str, float]:
    """What a step costs beside the naive loop over the same micro-batches (mean of means)."""
    import samestep

    made = model(49152)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.0)
    micros = micro_batches(8, 128, 49152, budget=512)
    loss = samestep.CausalLMLoss()

    def exact() -> None:
        samestep.step(made, optimizer, micros, loss, max_grad_norm=1.0)

    def naive() -> None:
        for micro in micros:
            targets = int((micro["labels"] != -100).sum())
            (loss(made, micro)["nll"].total / targets / len(micros)).backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    seconds: dict[str, list[float]] = {"exact": [], "naive": []}
    for _ in range(repeats):
        for name, one in (("exact", exact), ("naive", naive)):
            began = time.process_time()
            one()
            seconds[name].append(time.process_time() - began)
    # The least disturbed of each: what a busy neighbour adds is not the loop's.
    exactly, naively = min(seconds["exact"]), min(seconds["naive"])
    return {"exact": exactly, "naive": naively, "share": (exactly - naively) / naively}


def planner(examples: int, step_seconds: float) -> dict[str, float]:
    """Seconds of planning for an epoch and for each of its steps."""
    from samestep.data.batching import pack_micro_batches, plan_steps

    lengths = np.random.default_rng(0).integers(20, 400, examples).tolist()
    began = time.perf_counter()
    steps = -(-examples // 32)
    plans = plan_steps(lengths, seed=0, batch_size=32)
    for _, plan in zip(range(steps), plans, strict=False):
        pack_micro_batches([lengths[one] for one in plan.examples], micro_tokens=1024)
    a_step = (time.perf_counter() - began) / steps
    began = time.perf_counter()
    next(plan_steps(lengths, seed=0, batch_size=32, start=100 * steps))
    return {
        "examples": examples,
        "seconds_per_step": a_step,
        "seconds_to_resume_in_epoch_100": time.perf_counter() - began,
        "share": a_step / step_seconds,
    }


def measure(smoke: bool) -> dict[str, Any]:
    """All of it."""
    few = 3 if smoke else None
    base = {"batch": 8, "length": 128, "vocabulary": 1024, "checkpointing": "none"}
    batches = [apart(**base | {"batch": n}) for n in (8, 32, 128, 512)[:few]]
    lengths = [
        apart(**base | {"batch": 1, "length": n, "checkpointing": "full"})
        for n in (64, 512, 2048, 4096, 8192)[:few]
    ]
    vocabularies = [apart(**base | {"vocabulary": n}) for n in (1024, 16384, 65536, 262144)[:few]]
    return {
        "batch": {
            "points": batches,
            "r_squared": straightness(batches),
            "memory_ratio": batches[-1]["peak_bytes"] / batches[0]["peak_bytes"],
        },
        "length": {"points": lengths, "memory_ratio": ratio_of_further_tokens(lengths)},
        "vocabulary": {"points": vocabularies},
        "normalisation": normalisation(3 if smoke else 15),
        "planner": planner(1000 if smoke else 10**6, batches[0]["seconds"]),
    }


def main() -> None:
    """Measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--point")
    options = parser.parse_args()
    if options.point:
        print(json.dumps(point(**json.loads(options.point))))
        return
    result = measure(options.smoke)
    if not options.smoke:
        bars.save("growth", result)


if __name__ == "__main__":
    main()
