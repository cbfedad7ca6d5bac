"""Exactness: one batch under several splits and layouts, in every precision, against float64.

    python benchmarks/gpu/gpu_exactness.py --shape smollm2-135m --device cuda

Prints JSON lines, each with all so far: for each precision the largest relative difference of the
whole gradient between the splits, and to float64.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from gpu_works import SHAPES, Work, model_folder, rows_of

ROWS = 16
SPLITS: dict[str, dict[str, int]] = {
    "none": {"one pack": ROWS, "four packs": 4, "row by row": 1},
    "right": {"padded, eight rows": 8, "padded, three rows": 3},
}
"""For each layout the splits, by the rows of a micro-batch."""

PRECISIONS = ("float64", "float32", "mixed", "bfloat16")


def gradients(folder: Path, device: str, *, precision: str, padding: str) -> dict[str, Any]:
    """The whole gradient of the batch under each split, as float64 vectors on the CPU."""
    import torch

    import samestep
    from samestep.data.collate import to_device
    from samestep.train.precision import one_step
    from samestep.train.settings.base import finalize
    from samestep.train.settings.language import CausalLMSettings
    from samestep.train.setup import set_up

    settings = CausalLMSettings(
        model=str(folder / "model"),
        data=str(folder / "rows.jsonl"),
        out=str(folder / "out"),
        batch_size=ROWS,
        micro_batch=ROWS,
        steps=1,
        device=device,
        precision=precision,
        padding=padding,
        compile="none",
    )
    setup = set_up(finalize(settings))
    found = {}
    for name, rows in SPLITS[padding].items():
        parts = [range(ROWS)[at : at + rows] for at in range(0, ROWS, rows)]
        micros = [
            to_device(setup.collate(setup.train, part, 0), torch.device(device)) for part in parts
        ]
        with one_step(torch.device(device)):
            samestep.backward(setup.model, micros, setup.objective.loss_fn, check_sums=False)
        weights = [weight for weight in setup.model.parameters() if weight.grad is not None]
        found[name] = torch.cat([weight.grad.double().flatten().cpu() for weight in weights])
    return found


def measure(shape: str, device: str, precisions: tuple[str, ...] = PRECISIONS) -> dict[str, Any]:
    """The differences of each precision."""
    import torch
    from gpu_works import config_of
    from transformers import AutoModelForCausalLM

    folder = Path(tempfile.mkdtemp())
    model_folder(shape, folder / "model")
    torch.manual_seed(0)  # float32 weights for all, so that precisions start from the same
    AutoModelForCausalLM.from_config(config_of(shape)).save_pretrained(folder / "model")
    lines = [json.dumps(row) for row in rows_of(Work(shape, batch=ROWS), 1)]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="ascii")
    exact = None
    results: dict[str, Any] = {}
    for precision in precisions:
        try:
            found: dict[str, Any] = {}
            for padding in SPLITS:
                found |= gradients(folder, device, precision=precision, padding=padding)
        except Exception as error:  # one precision that fails must not hide the others
            results[precision] = {"error": f"{type(error).__name__}: {error}"[:300]}
            print(json.dumps(results), flush=True)
            continue
        first = next(iter(found.values()))
        exact = first if precision == "float64" else exact
        results[precision] = {
            "between_splits": {
                name: float((one - first).norm() / first.norm()) for name, one in found.items()
            }
        }
        if exact is not None:
            errors = [float((one - exact).norm() / exact.norm()) for one in found.values()]
            results[precision]["to_float64"] = max(errors)
        print(json.dumps(results), flush=True)  # so far: the last line counts, also if it is killed
    return results


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="tiny", choices=SHAPES)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    measure(options.shape, options.device)


if __name__ == "__main__":
    main()
