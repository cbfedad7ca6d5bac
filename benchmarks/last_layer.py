"""What it saves to compute the last layer at the targets alone: the same step, with and without.

    python benchmarks/last_layer.py

Both run in turn in one process, on the first micro-batch of a work; the ratio is of medians.
"""

import statistics
import time
from typing import Any

import bars
from prepared import prepared
from works import WORKS

WORK = ("gsm", "tools", "llama32-reduced")


def measure(name: str, rounds: int = 15) -> dict[str, Any]:
    """Seconds of the whole layer and of the cut one."""
    import samestep
    from samestep.models.lm_head import UpToHead

    model, _, _, micros = prepared(WORKS[name], budget=1024)

    class Everywhere(UpToHead):
        """Never says what is looked at."""

        def __call__(self, model: Any, micro: Any, *, at: Any = None, **extra: Any) -> Any:
            return super().__call__(model, micro, **extra)

    losses = {"cut": samestep.CausalLMLoss(), "whole": samestep.CausalLMLoss()}
    losses["whole"]._up_to_head = Everywhere()
    seconds: dict[str, list[float]] = {kind: [] for kind in losses}
    for number in range(rounds + 1):
        for kind, loss in losses.items():
            began = time.perf_counter()
            samestep.backward(model, micros[:1], loss)
            if number:
                seconds[kind].append(time.perf_counter() - began)
    median = {kind: statistics.median(times) for kind, times in seconds.items()}
    micro = micros[0]
    return median | {
        "tokens": micro["input_ids"].numel(),
        "targets": len(micro["target_positions"]),
        "saved": 1 - median["cut"] / median["whole"],
    }


def main() -> None:
    """Measure, print, write."""
    results = {name: measure(name) for name in WORK}
    print(results)
    bars.save("last-layer", results)


if __name__ == "__main__":
    main()
