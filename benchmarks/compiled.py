"""Whether `torch.compile` makes a step faster here: the same micro-batches, eager and compiled.

    python benchmarks/compiled.py

Micro-batches of a packed run differ in length, so the model is compiled with dynamic shapes. What
is reported is the time of the first step, which compiles, and of a later one. An error is a result
too.
"""

import time
from typing import Any

import torch

import bars
from prepared import prepared
from works import WORKS


def steps(micros: list[dict[str, Any]], model: Any, repeats: int = 3) -> list[float]:
    """Seconds of each step over the micro-batches."""
    import samestep

    loss, seconds = samestep.CausalLMLoss(), []
    for _ in range(repeats):
        began = time.perf_counter()
        samestep.backward(model, micros, loss)
        seconds.append(time.perf_counter() - began)
    return seconds


def measure(work_name: str) -> dict[str, Any]:
    """Eager and compiled layers, in turn, on the first rows of a work."""

    def ready() -> tuple[Any, list[dict[str, Any]]]:
        model, _, _, micros = prepared(WORKS[work_name], budget=512)
        return model, micros[:4]

    model, micros = ready()
    eager = steps(micros, model)
    model, micros = ready()
    began = time.perf_counter()
    try:
        for layer in model.model.layers:
            layer.compile(dynamic=True)
        compiled = steps(micros, model)
    except Exception as error:  # no compiler, or an operation that it does not take
        told = str(error).strip().splitlines()
        return {"eager": min(eager), "error": f"{type(error).__name__}: {told[0] if told else ''}"}
    first = time.perf_counter() - began - sum(compiled[1:])
    return {"eager": min(eager), "compiled": min(compiled[1:]), "first": first}


def main() -> None:
    """Measure, print, write."""
    result = measure("gsm")
    print(result)
    bars.save("compiled", result | {"torch": torch.__version__})


if __name__ == "__main__":
    main()
