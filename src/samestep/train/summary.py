"""``summary.json``: the totals of a run, written when its model is."""

import json
import logging
from importlib.metadata import version
from typing import Any

import torch

from samestep.engine.collectives import gather_results
from samestep.errors import CheckpointError
from samestep.train.evaluator import Evaluator
from samestep.train.optim import OPTIMIZERS
from samestep.train.progress import Progress
from samestep.train.run_folder import RunFolder
from samestep.train.settings.base import TrainSettings
from samestep.train.setup import TrainingSetup
from samestep.utils.files import write_atomically
from samestep.utils.memory import device_peak, device_reserved, process_peak
from samestep.utils.version import package_version

log = logging.getLogger("samestep")


def summarise(
    setup: TrainingSetup, progress: Progress, settings: TrainSettings, *, evaluator: Evaluator
) -> dict[str, Any]:
    """The totals of a run; on every rank, which all must call it.

    Args:
        setup: Its model and data.
        progress: How far it came.
        settings: ``best``.
        evaluator: What it evaluated.

    Returns:
        What ``summary.json`` holds, but for where the model is.
    """
    device = setup.micro_batches.device
    peaks, on_device = zip(
        *gather_results(lambda: (process_peak(), device_peak(device))), strict=True
    )
    known = [peak for peak in on_device if peak is not None]
    if known:
        log.info(
            "%.1f GB of the device's memory at the peak; %.1f GB held for it, fragments included",
            max(known) / 1e9,
            (device_reserved(device) or 0) / 1e9,
        )
    choice = progress.choice
    chosen = {"metric": settings.best, "step": choice.step, "value": choice.value}
    return {
        "steps": progress.step,
        "skipped": progress.skipped,
        "examples": len(setup.train),
        "dropped": setup.train.dropped,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "evaluation_before": evaluator.losses(0) if len(evaluator.history) > 1 else None,
        "evaluation_after": evaluator.losses(-1),
        "best": chosen if settings.best is not None else None,
        "stopped_early": progress.step < setup.steps,
        "trainable_parameters": sum(
            weight.numel() for weight in setup.model.parameters() if weight.requires_grad
        ),
        "ranks": len(peaks),
        "peak_resident_bytes": max(peaks),
        "peak_device_bytes": max(known, default=None),
        "data": setup.train.fingerprint(),
        **_versions(settings),
    }


def _versions(settings: TrainSettings) -> dict[str, str]:
    """Of what computed the run."""
    row = OPTIMIZERS.get(settings.optimizer)
    used = {
        "transformers": True,
        "peft": settings.lora_rank is not None,
        "bitsandbytes": settings.quantization is not None or bool(row and row.needs),
    }
    others = {name: version(name) for name, is_used in used.items() if is_used}
    return {"samestep": package_version(), "torch": torch.__version__, **others}


def write_summary(summary: dict[str, Any], folder: RunFolder) -> None:
    """Write ``summary.json``.

    Args:
        summary: What it holds.
        folder: Of the run, its model written.

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
