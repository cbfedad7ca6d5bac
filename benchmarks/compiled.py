"""Whether compiled layers make a step faster here: the same micro-batches, eager and compiled.

    python benchmarks/compiled.py

The layers are compiled as `samestep train --compile layers` does it: with dynamic shapes, since the
micro-batches of a packed run differ in length, and graphs that all layers share. What is reported
is the time of the first step with what compiling took, and of a later one. An error is one too.
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
    from samestep.models.compiled import compile_layers
    from samestep.models.outputs import run_model
    from samestep.train.compilation import _probe

    def ready(*, compiled: bool) -> tuple[Any, list[dict[str, Any]]]:
        model, _, _, micros = prepared(WORKS[work_name], budget=512, compiled=compiled)
        return model, micros[:4]

    model, micros = ready(compiled=False)
    eager = steps(micros, model)
    model, micros = ready(compiled=True)
    began = time.perf_counter()
    probe = _probe(model, padding="none" if "cu_seq_lens_q" in micros[0] else "right")
    reason = compile_layers(model, lambda: run_model(model, probe).logits)
    if reason:  # no compiler, or an operation that it does not take
        return {"eager": min(eager), "error": reason}
    compiled = steps(micros, model)
    first = time.perf_counter() - began - sum(compiled[1:])
    return {"eager": min(eager), "compiled": min(compiled[1:]), "first": first}


def main() -> None:
    """Measure, print, write."""
    result = measure("gsm")
    print(result)
    bars.save("compiled", result | {"torch": torch.__version__})


if __name__ == "__main__":
    main()
