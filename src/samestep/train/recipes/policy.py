"""Policy gradients on given rollouts: GRPO, Dr. GRPO, DAPO, RLOO, GSPO."""

from collections.abc import Sequence
from typing import Any

from samestep.data.load import load_rows
from samestep.data.readers.rollouts import rollout_records
from samestep.data.records import Records
from samestep.engine.terms import Objective, constant
from samestep.losses.policy import ClipRange
from samestep.objectives.policy import PolicyGradient
from samestep.train.recipes.base import Recipe
from samestep.train.recipes.preference import load_reference
from samestep.train.settings.objectives import PolicySettings
from samestep.utils.files import cache_folder


class PolicyRecipe(Recipe):
    """A clipped policy gradient."""

    settings: PolicySettings

    def read(self, source: str, tokenizer: Any, training: Records | None = None) -> Records:
        """Rows of prompt, completion and reward."""
        return rollout_records(
            load_rows(source),
            tokenizer,
            baseline=self.settings.baseline,
            max_length=self.settings.max_length,
            append_eos=self.settings.append_eos,
            cache=cache_folder() / "tokens",
        )

    def build(self, model: Any, data: Sequence[Records]) -> Objective:
        """The clipped gradient, and the KL if it has a weight."""
        settings = self.settings
        normalize = settings.normalize
        return Objective(
            PolicyGradient(
                normalize=constant(normalize) if isinstance(normalize, float) else normalize,
                ratio=settings.ratio,
                clip=ClipRange(settings.clip_low, settings.clip_high),
                reference=load_reference(settings, model) if settings.kl_weight else None,
                kl_weight=settings.kl_weight,
            )
        )
