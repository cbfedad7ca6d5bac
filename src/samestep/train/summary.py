"""The summary of a run: ``summary.json``, and the device's peak in the log."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import samestep
from samestep.engine.collectives import gather_results
from samestep.engine.evaluate import EvalReport
from samestep.errors import CheckpointError
from samestep.train.progress import Progress
from samestep.train.run_folder import RunFolder
from samestep.train.setup import TrainingSetup
from samestep.utils.files import write_atomically
from samestep.utils.memory import device_peak, device_reserved, process_peak

log = logging.getLogger("samestep")


def summarise(
    setup: TrainingSetup, progress: Progress, *, evaluations: Sequence[EvalReport], model: Path
) -> dict[str, Any]:
    """What ``summary.json`` holds of a run that ended; on all ranks.

    Args:
        setup: Of the run.
        progress: How far it came.
        evaluations: Those of this call, in order.
        model: Where the model was saved.

    Returns:
        Totals, evaluations before and after, peak memory, versions.
    """
    device = setup.micro_batches.device
    peaks, on_device = zip(
        *gather_results(lambda: (process_peak(), device_peak(device))), strict=True
    )
    known = [peak for peak in on_device if peak is not None]
    if known:
        held = device_reserved(device) or 0
        log.info(
            "%.1f GB of the device's memory at the peak; %.1f GB held for it, fragments included",
            max(known) / 1e9,
            held / 1e9,
        )
    return {
        "steps": progress.step,
        "skipped": progress.skipped,
        "examples": len(setup.train),
        "dropped": setup.train.dropped,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "evaluation_before": evaluations[0].loss if len(evaluations) > 1 else None,
        "evaluation_after": evaluations[-1].loss if evaluations else None,
        "trainable_parameters": sum(
            weight.numel() for weight in setup.model.parameters() if weight.requires_grad
        ),
        "ranks": len(peaks),
        "peak_resident_bytes": max(peaks),
        "peak_device_bytes": max(known, default=None),
        "model": str(model),
        "samestep": samestep.__version__,
        "torch": torch.__version__,
    }


def write_summary(summary: dict[str, Any], folder: RunFolder) -> None:
    """Write ``summary.json``, whole or not at all.

    Args:
        summary: Of `summarise`.
        folder: Of the run.

    Raises:
        CheckpointError: It cannot be written.
    """
    try:
        text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
        write_atomically(folder.summary, text)
    except OSError as error:
        raise CheckpointError(
            f"{folder.summary} could not be written ({error}); the model in {folder.model} is whole"
        ) from error
