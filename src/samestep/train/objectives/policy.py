"""Policy gradients on given rollouts: GRPO, Dr. GRPO, DAPO, RLOO, GSPO."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from samestep.train.objectives.preference import ReferenceConfig

if TYPE_CHECKING:
    from samestep.data.records import Records
    from samestep.engine.terms import Objective


class PolicyConfig(ReferenceConfig):
    """Learn from rollouts and their rewards by a clipped policy gradient."""

    objective: Literal["policy"] = "policy"
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""
    baseline: Literal["grpo", "dr_grpo", "rloo", "given"] = "grpo"
    """What a reward is compared with; given: rows bring their advantage."""
    normalize: Literal["token", "sequence"] | float = "sequence"
    """Every token weighs the same (DAPO), every sequence does (GRPO), or divide by this constant
    (Dr. GRPO)."""
    ratio: Literal["token", "sequence"] = "token"
    """Compare with the old policy token by token, or by sequence (GSPO)."""
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """How far below 1 the ratio may go."""
    clip_high: float = Field(default=0.2, gt=0)
    """How far above 1 (DAPO: 0.28)."""
    kl_weight: float = Field(default=0.0, ge=0)
    """Weight of the KL to the reference; 0: there is none."""

    def read(self, source: str, tokenizer: Any, like: "Records | None" = None) -> "Records":
        """Rows of prompt, completion and reward."""
        from samestep.data.load import load_rows
        from samestep.data.readers.rollouts import rollout_records
        from samestep.utils.files import cache_folder

        return rollout_records(
            load_rows(source),
            tokenizer,
            baseline=self.baseline,
            max_length=self.max_length,
            append_eos=self.append_eos,
            cache=cache_folder() / "tokens",
        )

    def build(self, model: Any, data: Sequence["Records"]) -> "Objective":
        """The clipped gradient, and the KL if it has a weight."""
        from samestep.engine.terms import Objective, constant
        from samestep.losses.policy import ClipRange
        from samestep.objectives.policy import PolicyGradient

        normalize = self.normalize
        return Objective(
            PolicyGradient(
                normalize=constant(normalize) if isinstance(normalize, float) else normalize,
                ratio=self.ratio,
                clip=ClipRange(self.clip_low, self.clip_high),
                reference=self.reference(model) if self.kl_weight else None,
                kl_weight=self.kl_weight,
            )
        )

    def problems(self) -> list[str]:
        """A constant that cannot divide, or a reference that cannot be kept."""
        found = []
        if isinstance(self.normalize, float) and not self.normalize > 0:
            found.append(f"normalize: a constant must be above 0, not {self.normalize}")
        if self.precompute_reference:
            found.append("precompute_reference: the KL of rollouts needs a live reference")
        return found
