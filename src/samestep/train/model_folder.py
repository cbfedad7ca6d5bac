"""The trained model in the folder of a run: written whole or not at all."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from samestep.engine.collectives import on_rank_0
from samestep.engine.oom import is_out_of_memory
from samestep.engine.parallel import is_sharded
from samestep.errors import CheckpointError
from samestep.models.load_quantized import restore_conv1d
from samestep.models.lora import quiet_peft
from samestep.models.quantized import dequantize
from samestep.train.run_folder import unfinished_model
from samestep.utils.files import finish_replacing, remove, replace_folder, sync_tree


def save_model(model: Any, tokenizer: Any, *, folder: Path, merge: bool) -> None:
    """Save a model so that ``from_pretrained`` loads it, whole or not at all; rank 0 writes.

    Args:
        model: A transformers model (saved with its weights), or a PEFT model (its adapter alone).
        tokenizer: Saved beside it; None: there is none.
        folder: Replaced if it is there.
        merge: Fold the adapters of a PEFT model into its weights and save those; quantised weights
            become those that they stand for. The model then has no adapters any more.

    Raises:
        CheckpointError: It cannot be written.
    """
    weights = None
    if is_sharded(model):
        unsharded = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(model, options=unsharded)
    elif merge:
        model = _merged(model)
    on_rank_0(lambda: _write_model(model, tokenizer, folder=folder, weights=weights))


def _merged(model: Any) -> Any:
    """The model with its adapters folded in."""
    dtype = dequantize(model)
    stored = getattr(model.get_base_model(), "stored_dtype", None)
    model = model.merge_and_unload()
    if dtype is None:
        return model
    restore_conv1d(model)
    return model.to(stored or dtype)


def _write_model(model: Any, tokenizer: Any, *, folder: Path, weights: Any) -> None:
    # Adapters are small and new: they stay as they were trained.
    stored = None if _is_adapter(model) else getattr(model, "stored_dtype", None)
    if stored is not None and stored.itemsize >= model.dtype.itemsize:
        stored = None  # the run was asked for this type
    if stored is not None:
        weights = _converted(model.state_dict() if weights is None else weights, stored)
    aside, old = unfinished_model(folder)
    try:
        finish_replacing(folder)
        remove(aside)
        remove(old)
        with quiet_peft():
            model.save_pretrained(aside, state_dict=weights)
        if stored is not None:
            _note_dtype(aside / "config.json", stored)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        sync_tree(aside)
        replace_folder(folder, aside)
        remove(old)
    except (OSError, SafetensorError, RuntimeError, MemoryError) as error:
        memory = is_out_of_memory(error)
        if isinstance(error, RuntimeError) and not memory:
            raise
        with suppress(OSError):
            remove(aside)
        reason = f"out of memory ({error or type(error).__name__})" if memory else str(error)
        raise CheckpointError(
            f"{folder} could not be written: {reason}. The last checkpoint is intact: make room "
            "and run again with --resume"
        ) from error


def _is_adapter(model: Any) -> bool:
    """Whether a model is saved as adapters alone."""
    return hasattr(model, "peft_config")


def _converted(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights in another floating-point type; those that share memory still do."""
    made: dict[tuple[int, torch.Size], Tensor] = {}
    result = {}
    for name, weight in weights.items():
        key = weight.data_ptr(), weight.shape
        if key not in made:
            made[key] = weight.to(dtype) if weight.is_floating_point() else weight
        result[name] = made[key]
    return result


def _note_dtype(path: Path, dtype: torch.dtype) -> None:
    """The type of the saved weights in the config: transformers writes that of the model."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
