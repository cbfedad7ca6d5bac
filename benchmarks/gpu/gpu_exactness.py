"""Exactness: one batch under several splits and layouts, in every precision, against float64.

    python benchmarks/gpu/gpu_exactness.py --shape smollm2-135m --device cuda

Prints JSON lines, each with all so far: for each precision the largest relative difference of the
whole gradient between the splits, and to float64; then under ``losses`` those of some steps in
float32 and in mixed precision, and how far they are apart after three. Under ``bars`` stands what
is asked of those figures, and whether it holds.
"""

import argparse
import gc
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from gpu_works import SHAPES, Work, model_folder, rows_of

ROWS = 16
SPLITS: dict[str, dict[str, int]] = {
    "none": {"one pack": ROWS, "four packs": 4, "row by row": 1},
    "right": {"padded, eight rows": 8, "padded, three rows": 3},
}
"""For each layout the splits, by the rows of a micro-batch."""

PRECISIONS = ("float64", "mixed", "float32", "bfloat16")
"""The exact one first; then that which the bars are about, and after it the losses."""

STEPS = 3
"""After which mixed precision has reached the loss of float32 within `WITHIN`."""

WITHIN = 0.01


def settings_of(folder: Path, device: str, **changes: Any) -> Any:
    """Of a run over the rows, all of them in a step."""
    from samestep.train.settings.base import finalize
    from samestep.train.settings.language import CausalLMSettings

    options = {"model": str(folder / "model"), "data": str(folder / "rows.jsonl")}
    options |= {"out": str(folder / "out"), "batch_size": ROWS, "compile": "none"}
    return finalize(CausalLMSettings(**options, device=device, **changes))


def gradients(folder: Path, device: str, *, precision: str, padding: str) -> dict[str, Any]:
    """The whole gradient of the batch under each split, as float64 vectors on the device."""
    import torch

    import samestep
    from samestep.data.collate import to_device
    from samestep.train.precision import one_step
    from samestep.train.setup import set_up

    options = {"micro_batch": ROWS, "steps": 1, "precision": precision, "padding": padding}
    setup = set_up(settings_of(folder, device, **options))
    found = {}
    for name, rows in SPLITS[padding].items():
        parts = [range(ROWS)[at : at + rows] for at in range(0, ROWS, rows)]
        micros = [
            to_device(setup.collate(setup.train, part, 0), torch.device(device)) for part in parts
        ]
        with one_step(torch.device(device)):
            samestep.backward(setup.model, micros, setup.objective.loss_fn, check_sums=False)
        weights = [weight for weight in setup.model.parameters() if weight.grad is not None]
        found[name] = torch.cat([weight.grad.double().flatten() for weight in weights])
    return found


def losses(folder: Path, device: str, precision: str) -> list[float]:
    """Of a batch before each of some steps on it, and after the last of them."""
    from samestep.train.trainer import train

    options = {"steps": STEPS + 1, "lr": 2e-5, "schedule": "constant", "warmup": 0.0}
    settings = settings_of(
        folder, device, precision=precision, micro_batch=ROWS, keep=0, overwrite=True, **options
    )
    train(settings)
    log = (folder / "out" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [line["loss"] for line in map(json.loads, log) if "grad_norm" in line]


def bars(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What is asked of the figures that are there; under each name: measured, bound, holds."""
    found = {}
    mixed = results.get("mixed", {})
    if "to_float64" in mixed:
        apart = max(mixed["between_splits"].values())
        found["splits in mixed precision, against its own error"] = (apart, mixed["to_float64"])
    if "apart" in results.get("losses", {}):
        name = f"loss after {STEPS} steps in mixed precision, against float32"
        found[name] = (results["losses"]["apart"], WITHIN)
    return {
        name: {"measured": measured, "bound": bound, "holds": measured <= bound}
        for name, (measured, bound) in found.items()
    }


def measure(shape: str, device: str, precisions: tuple[str, ...] = PRECISIONS) -> dict[str, Any]:
    """The differences of each precision, the losses, and the bars."""
    folder = Path(tempfile.mkdtemp())
    write_inputs(shape, folder)
    results: dict[str, Any] = {}
    exact: list[Any] = []

    def compare(precision: str) -> dict[str, Any]:
        gc.collect()  # the models before hold the device's memory in circles
        found: dict[str, Any] = {}
        for padding in SPLITS:
            found |= gradients(folder, device, precision=precision, padding=padding)
        first = next(iter(found.values()))
        if precision == "float64":
            exact.append(first)
        apart = {name: float((one - first).norm() / first.norm()) for name, one in found.items()}
        errors = [float((one - exact[0]).norm() / exact[0].norm()) for one in found.values()]
        return {"between_splits": apart, "to_float64": max(errors)}

    def reach() -> dict[str, Any]:
        reached = {each: losses(folder, device, each) for each in ("float32", "mixed")}
        return reached | {"apart": abs(reached["float32"][STEPS] - reached["mixed"][STEPS])}

    questions = {precision: partial(compare, precision) for precision in precisions}
    asked = list(questions.items())
    for name, ask in [*asked[:2], ("losses", reach), *asked[2:]]:
        try:
            results[name] = ask()
        except Exception as error:  # one that fails must not hide the others
            results[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
        # All so far: the last line counts, also if this is ended.
        print(json.dumps(results | {"bars": bars(results)}), flush=True)
    return results | {"bars": bars(results)}


def write_inputs(shape: str, folder: Path) -> None:
    """A model in float32, so that all precisions start from the same weights, and rows."""
    import torch
    from gpu_works import config_of
    from transformers import AutoModelForCausalLM

    model_folder(shape, folder / "model")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config_of(shape)).save_pretrained(folder / "model")
    lines = [json.dumps(row) for row in rows_of(Work(shape, batch=ROWS), 1)]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="ascii")


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="tiny", choices=SHAPES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    options = parser.parse_args()
    measure(options.shape, options.device, tuple(options.precisions))


if __name__ == "__main__":
    main()
