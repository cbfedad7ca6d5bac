"""Flow matching on precomputed latents."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from samestep.train.config import TrainConfig

if TYPE_CHECKING:
    from samestep.data.collate import Padding
    from samestep.data.records import Records
    from samestep.engine.terms import Objective


class FlowMatchingConfig(TrainConfig):
    """Train a diffusion transformer of diffusers by flow matching (arXiv:2210.02747)."""

    objective: Literal["flow_matching"] = "flow_matching"
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""
    normalize: Literal["example", "element"] = "example"
    """Every example weighs the same, or every number of its latents does."""
    padding: Literal["right"] = "right"
    """Embeddings of text are padded to the right, and masked."""
    time_policy: Literal["uniform", "logit_normal"] = "uniform"
    """How the time of each example is drawn in each step."""
    time_shift: float = Field(default=1.0, gt=0)
    """Above 1: more of the noisy times."""

    task: ClassVar[str] = ""
    calibrated: ClassVar[bool] = False

    def load_tokenizer(self, source: str) -> Any:
        """There is no text to read."""
        return None

    def pad_id(self, tokenizer: Any) -> int:
        """There is no token."""
        return 0

    def read(self, source: str, tokenizer: Any, like: "Records | None" = None) -> "Records":
        """Files of latents."""
        from samestep.data.readers.latents import latent_records

        return latent_records(source)

    def load(self, source: str, data: Sequence["Records"]) -> Any:
        """A model of diffusers."""
        import torch

        from samestep.models.load import load_diffusion

        return load_diffusion(
            source, init=self.init, dtype=getattr(torch, self.dtype), seed=self.seed
        )

    def check_fit(self, model: Any, data: Sequence["Records"]) -> None:
        """Latents and condition may not have more channels than the model takes."""
        from samestep.data.readers.latents import CONDITION, LatentRecords, read_tensors
        from samestep.errors import ConfigError

        for records in data:
            assert isinstance(records, LatentRecords)
            first = records.files[0]
            tensors = read_tensors(first.path)
            shown = [tensors[name].shape[0] for name in ("latents", CONDITION) if name in tensors]
            takes = model.config["in_channels"]
            if sum(shown) > takes or tensors["latents"].shape[0] != model.config["out_channels"]:
                raise ConfigError(
                    f"data: {first.origin} has {' + '.join(map(str, shown))} channels, but the "
                    f"model takes {takes} and answers {model.config['out_channels']}"
                )

    def layout(self, model: Any) -> "Padding":
        """Latents are never packed."""
        return "right"

    def checkpoint_activations(self, model: Any) -> None:
        """As diffusers does it: everything, or nothing."""
        if self.gradient_checkpointing == "full":
            model.enable_gradient_checkpointing()

    def recompute(self, model: Any) -> bool:
        """Not by itself."""
        return False

    def collate(
        self,
        data: "Records",
        indices: Sequence[int],
        *,
        padding: "Padding",
        pad_id: int,
        key: tuple[int, int],
    ) -> dict[str, Any]:
        """Latents by shape, with noise and times that belong to (seed, step, example)."""
        from samestep.data.readers.latents import LatentRecords, collate_latents
        from samestep.objectives.flow_matching import TimestepSampler

        assert isinstance(data, LatentRecords)
        times = TimestepSampler(self.time_policy, self.time_shift)
        return collate_latents(data, indices, key=key, time=times)

    def build(self, model: Any, data: Sequence["Records"]) -> "Objective":
        """The error of the velocity."""
        from samestep.engine.terms import Objective
        from samestep.objectives.flow_matching import FLOW_MATCHING_COUNTERS, FlowMatching

        return Objective(FlowMatching(self.normalize), FLOW_MATCHING_COUNTERS)

    def problems(self) -> list[str]:
        """What does not apply to latents."""
        found = []
        if self.lora_rank is not None:
            found.append("lora_rank: adapters are not served for models of diffusers")
        if self.tokenizer is not None or self.max_length is not None:
            found.append("tokenizer and max_length are for text: leave them out")
        if self.gradient_checkpointing == "selective":
            found.append("gradient_checkpointing: models of diffusers have none and full alone")
        return found
