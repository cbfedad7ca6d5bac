"""Whole runs of each objective under --bitwise, with the packs of a step in two orders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from objective_runs import configured
from runs import read_lines

from samestep.train.micro_batches import MicroBatches
from samestep.train.trainer import train


def lines_of(folder: Path, case: str, *, backwards: bool, steps: int = 2) -> list[dict[str, Any]]:
    """The digests of a run, after each step and of its end, with its loss."""
    out = folder / f"out-{backwards}"

    def packs(self: MicroBatches, indices: Sequence[int]) -> list[list[int]]:
        found = in_order(self, indices)
        return found[::-1] if backwards else found

    in_order = MicroBatches._own_packs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MicroBatches, "_own_packs", packs)
        settings = configured(
            folder, case, out=str(out), steps=steps, bitwise=True, micro_batch=3, threads=1
        )
        train(settings)
    numbers = [
        {"loss": line["loss"], "terms": line["terms"], "counts": line["counts"]}
        for name in ("log.jsonl", "eval.jsonl")
        for line in read_lines(out / name)
    ]
    return read_lines(out / "digests.jsonl") + numbers
