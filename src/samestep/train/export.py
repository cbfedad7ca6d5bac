"""The trained model as an ordinary folder of transformers or PEFT."""

import shutil
from pathlib import Path
from typing import Any

from samestep.errors import CheckpointError


def save_model(model: Any, tokenizer: Any, folder: Path, *, merge: bool) -> None:
    """Save a model so that ``from_pretrained`` loads it, whole or not at all.

    Args:
        model: A transformers model (saved with its weights), or a PEFT model (its adapter alone).
        tokenizer: Saved beside it; None: there is none.
        folder: Replaced if it is there.
        merge: Fold the adapters of a PEFT model into its weights and save those. The model then
            has no adapters any more.

    Raises:
        CheckpointError: It cannot be written.
    """
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    if merge:
        model = model.merge_and_unload()
    try:
        model.save_pretrained(aside)
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
