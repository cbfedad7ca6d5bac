"""The trained model in the folder of a run: written whole or not at all."""

import shutil
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from samestep.engine.collectives import on_rank_0
from samestep.engine.parallel import is_sharded
from samestep.errors import CheckpointError


def save_model(model: Any, tokenizer: Any, *, folder: Path, merge: bool) -> None:
    """Save a model so that ``from_pretrained`` loads it, whole or not at all; rank 0 writes.

    Args:
        model: A transformers model (saved with its weights), or a PEFT model (its adapter alone).
        tokenizer: Saved beside it; None: there is none.
        folder: Replaced if it is there.
        merge: Fold the adapters of a PEFT model into its weights and save those. The model then
            has no adapters any more.

    Raises:
        CheckpointError: It cannot be written.
    """
    weights = None
    if is_sharded(model):
        unsharded = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(model, options=unsharded)
    elif merge:
        model = model.merge_and_unload()
    on_rank_0(lambda: _write_model(model, tokenizer, folder=folder, weights=weights))


def _write_model(model: Any, tokenizer: Any, *, folder: Path, weights: Any) -> None:
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        model.save_pretrained(aside, state_dict=weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"{folder} could not be written: {error}. The last checkpoint is intact: make room "
            "and run again with --resume"
        ) from error
