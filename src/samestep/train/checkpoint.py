"""Checkpoints: everything that a later step needs, written whole or not at all.

A checkpoint is a folder ``step-00000012`` (12 steps are done) with ``model.safetensors`` (the
trained weights and the buffers), ``optimizer.safetensors`` and ``state.json``. It is written under
a hidden name, flushed to disk, and renamed; only then are older ones deleted. No random state is
kept: order, learning rate and dropout are functions of the step.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from samestep.errors import CheckpointError
from samestep.files import sync

FORMAT = 1


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: Steps done.
        tokens: Input tokens seen.
        seconds: Time spent in steps.
        skipped: Steps without an update.
        data: Fingerprint of the tokenised training data.
    """

    step: int
    tokens: int
    seconds: float
    skipped: int
    data: str


def save(
    folder: Path, model: nn.Module, optimizer: Optimizer, progress: Progress, *, keep: int
) -> Path:
    """Write a checkpoint, then delete all but the newest ``keep``.

    Args:
        folder: ``checkpoints/``; made if it is not there.
        model: Its weights that require gradients, and its buffers.
        optimizer: Its state.
        progress: How far the run is.
        keep: Checkpoints to keep, this one included.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: It cannot be written, as on a full disk; older ones are intact.
    """
    target = folder / f"step-{progress.step:08d}"
    aside = folder / f".{target.name}.tmp"
    tensors, scalars = _flatten(optimizer.state_dict())
    state = {"format": FORMAT, "progress": asdict(progress), "optimizer": scalars}
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file(_trained(model), aside / "model.safetensors")
        save_file(tensors, aside / "optimizer.safetensors")
        (aside / "state.json").write_text(json.dumps(state), encoding="utf-8")
        for path in (*aside.iterdir(), aside):
            sync(path)
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        older = latest(folder)
        raise CheckpointError(
            f"checkpoint {target} could not be written: {error}. "
            + (f"{older} is intact" if older else "There is no earlier one")
        ) from error
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in ``checkpoints/``, or None."""
    found = _all(folder)
    return found[-1] if found else None


def load(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> Progress:
    """Put a checkpoint's weights and optimizer state in place.

    Args:
        checkpoint: Its folder.
        model: Built as when it was saved.
        optimizer: Built as when it was saved.

    Returns:
        How far the run was.

    Raises:
        CheckpointError: It cannot be read, or belongs to another model or optimizer.
    """
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        weights = load_file(checkpoint / "model.safetensors")
        tensors = load_file(checkpoint / "optimizer.safetensors")
        assert state["format"] == FORMAT
        progress = Progress(**state["progress"])
        own = _trained(model)
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in weights.items()}:
            raise CheckpointError(f"{checkpoint} was saved from another model than this one")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(weights[name])
        optimizer.load_state_dict(_unflatten(tensors, state["optimizer"]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint} cannot be read ({error}): delete that folder to continue from the "
            "checkpoint before it"
        ) from error
    return progress


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that training changes, each once (tied weights have one name here)."""
    kept = model.state_dict().keys()
    weights = {n: weight.data for n, weight in model.named_parameters() if weight.requires_grad}
    return weights | {name: buffer for name, buffer in model.named_buffers() if name in kept}


def _flatten(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors "index.name", and the rest as JSON."""
    tensors: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                others[f"{index}.{name}"] = value
    return tensors, {"param_groups": state["param_groups"], "values": others}


def _unflatten(tensors: dict[str, Tensor], scalars: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for key, value in (tensors | scalars["values"]).items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": scalars["param_groups"]}
