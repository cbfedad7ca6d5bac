"""What timings and memory have chosen for a run; under ``deterministic`` it goes on with the same.

The budget of micro-batches, compiled layers and what is recomputed change no step, but they change
its rounding. They are measured on the machine, and remembered in its cache alone: on a resume
another cache, or a busier machine, may choose otherwise. So checkpoints keep them.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from samestep.engine.collectives import gather_results, rank
from samestep.errors import CheckpointError
from samestep.models.compiled import compiled_layers
from samestep.train.checkpoint_files import all_checkpoints, read_origin
from samestep.train.run_folder import RunFolder
from samestep.train.settings.base import TrainSettings, with_current_names
from samestep.train.setup import TrainingSetup

NAME = "decisions"
"""Under which a checkpoint's origin holds them."""


@dataclass(frozen=True)
class Decisions:
    """What was chosen; None: what the settings say, or what is measured anew.

    Attributes:
        budget: Tokens of a micro-batch, or its records where settings count those.
        compiled: Whether layers are compiled.
        recomputed: Whether layers keep less for the backward.
    """

    budget: int | None = None
    compiled: bool | None = None
    recomputed: bool | None = None

    def put_into(self, settings: TrainSettings) -> TrainSettings:
        """The settings with what was chosen in the place of ``auto``, for setting up."""
        chosen: dict[str, Any] = {}
        if self.compiled is not None and settings.compile == "auto":
            chosen["compile"] = "layers" if self.compiled else "none"
        if self.recomputed and settings.gradient_checkpointing == "auto":
            chosen["gradient_checkpointing"] = "selective"
        return settings.model_copy(update=chosen)


def decisions_of(setup: TrainingSetup) -> dict[str, Any]:
    """What holds in a run at the moment, as JSON for a checkpoint."""
    model = setup.model
    found = Decisions(
        budget=setup.micro_batches.budget,
        compiled=bool(compiled_layers(model)),
        recomputed=bool(getattr(model, "is_activation_checkpointing", False)),
    )
    return asdict(found)


def decisions_before(settings: TrainSettings, folder: RunFolder) -> Decisions:
    """What a run goes on with.

    Args:
        settings: ``resume`` and ``deterministic``; a setting that is another than at the
            checkpoint counts more than what was chosen under the former one.
        folder: Of the run.

    Returns:
        That of the newest checkpoint; nothing where bits may change, or none is kept.
    """
    if not (settings.resume and settings.deterministic):
        return Decisions()
    kept = gather_results(lambda: _kept(settings, folder) if rank() == 0 else {})[0]
    return Decisions(**kept)


def _kept(settings: TrainSettings, folder: RunFolder) -> dict[str, Any]:
    for checkpoint in reversed(all_checkpoints(folder.checkpoints)):
        with suppress(CheckpointError):
            origin = read_origin(checkpoint)
            before = with_current_names(origin.get("settings", {}))
            return _unless_changed(origin.get(NAME, {}), before, settings.saved())
    return {}


_CHOSEN_UNDER = {
    "budget": ("micro_tokens", "micro_batch", "memory_limit", "device"),
    "compiled": ("compile", "gradient_checkpointing", "activation_offload", "parallel", "device"),
    "recomputed": ("gradient_checkpointing", "activation_offload", "device"),
}
"""The settings that each was chosen under: under others it may not even be possible."""


def _unless_changed(
    kept: Mapping[str, Any], before: Mapping[str, Any], now: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        name: kept[name]
        for name, fields in _CHOSEN_UNDER.items()
        if name in kept and all(before.get(field) == now.get(field) for field in fields)
    }
