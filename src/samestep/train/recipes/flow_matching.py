"""Flow matching on precomputed latents."""

from collections.abc import Sequence
from typing import Any, ClassVar

from samestep.data.collate import Padding
from samestep.data.readers.latents import (
    CONDITION,
    LatentRecords,
    collate_latents,
    latent_records,
    read_tensors,
)
from samestep.data.records import Records
from samestep.engine.terms import Objective
from samestep.errors import ConfigError
from samestep.models.load_diffusion import load_diffusion
from samestep.objectives.flow_matching import FLOW_MATCHING_COUNTERS, FlowMatching, TimestepSampler
from samestep.train.precision import weight_dtype
from samestep.train.recipes.base import Recipe
from samestep.train.settings.objectives import FlowMatchingSettings
from samestep.utils.sources import Source


class FlowMatchingRecipe(Recipe):
    """The error of the velocity that a model of diffusers predicts."""

    settings: FlowMatchingSettings
    peft_task: ClassVar[str] = ""
    measures_costs: ClassVar[bool] = False

    def load_tokenizer(self, source: str) -> Any:
        """There is no text to read."""
        return None

    def pad_id(self, tokenizer: Any) -> int:
        """There is no token."""
        return 0

    def read(self, source: Source, tokenizer: Any, training: Records | None = None) -> Records:
        """Files of latents."""
        return latent_records(self.one_source(source), row_format=self.settings.row_format)

    def load_model(self, source: str, data: Sequence[Records]) -> Any:
        """A model of diffusers."""
        settings = self.settings
        dtype = weight_dtype(settings, trains=settings.lora_rank is None)
        return load_diffusion(source, init=settings.init, dtype=dtype, seed=settings.seed)

    def check_fit(self, model: Any, data: Sequence[Records]) -> None:
        """Latents and condition may not have more channels than the model takes."""
        for records in data:
            assert isinstance(records, LatentRecords)
            first = records.files[0]
            tensors = read_tensors(first.path)
            channels = [
                tensors[name].shape[0] for name in ("latents", CONDITION) if name in tensors
            ]
            takes, gives = model.config["in_channels"], model.config["out_channels"]
            if sum(channels) > takes or tensors["latents"].shape[0] != gives:
                raise ConfigError(
                    f"data: {first.origin} has {' + '.join(map(str, channels))} channels, but the "
                    f"model takes {takes} and answers {gives}"
                )

    def choose_padding(self, model: Any) -> Padding:
        """Latents are never packed."""
        return "right"

    def checkpoint_activations(self, model: Any) -> None:
        """As diffusers does it: everything, or nothing."""
        if self.settings.gradient_checkpointing == "full":
            model.enable_gradient_checkpointing()

    def recompute_activations(self, model: Any) -> bool:
        """Not by itself."""
        return False

    def collate(
        self,
        data: Records,
        indices: Sequence[int],
        *,
        padding: Padding,
        pad_id: int,
        key: tuple[int, int],
    ) -> dict[str, Any]:
        """Latents by shape, with noise and times that belong to (seed, step, example)."""
        assert isinstance(data, LatentRecords)
        times = TimestepSampler(self.settings.time_policy, self.settings.time_shift)
        return collate_latents(data, indices, key=key, time=times)

    def build(self, model: Any, data: Sequence[Records]) -> Objective:
        """The error of the velocity."""
        return Objective(FlowMatching(self.settings.normalize), FLOW_MATCHING_COUNTERS)
