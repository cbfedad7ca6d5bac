"""A step that ran out of memory is taken again, cut or computed otherwise: the same step."""

import gc
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from samestep.engine.parallel import is_sharded
from samestep.errors import OutOfMemoryError, SequenceTooLargeError
from samestep.train.micro_batches import MicroBatches

log = logging.getLogger("samestep")

Report = TypeVar("Report")


def retry_on_oom(
    model: Any,
    work: Callable[[], Report],
    *,
    micro_batches: MicroBatches,
    indices: Sequence[int],
    recompute_activations: Callable[[], bool],
) -> Report:
    """Repeat work with smaller micro-batches, or keeping less for the backward, until it fits.

    Args:
        model: The model that the work runs.
        work: Runs all micro-batches of the records.
        micro_batches: Cuts the records; its budget is lowered for good.
        indices: The records.
        recompute_activations: Lets the model keep less from here on; says whether it could.

    Returns:
        What the work returned.

    Raises:
        SequenceTooLargeError: A single sequence does not fit.
        OutOfMemoryError: Under FSDP2, where the other ranks cannot be told.
    """
    while True:
        try:
            return work()
        except SequenceTooLargeError as error:
            if is_sharded(model) or not recompute_activations():
                raise
            problem, change = str(error), "computing most of each layer anew in the backward"
        except OutOfMemoryError as error:
            problem = str(error)
            if is_sharded(model):
                raise OutOfMemoryError(
                    f"{problem}. Under fsdp2 the other ranks wait inside the model and cannot be "
                    "told: continue with --resume and a smaller --micro-tokens, which does not "
                    "change the step"
                ) from None
            change = f"in micro-batches of at most {micro_batches.halve(indices)}"
        log.warning("%s: the same again, %s", problem, change)
        gc.collect()  # frames of the failed attempt hold its tensors
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
