"""Distillation from a teacher with the same vocabulary."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from samestep.errors import ConfigError
from samestep.train.config import TrainConfig
from samestep.train.objectives.causal_lm import read_language

if TYPE_CHECKING:
    from samestep.data.records import Records
    from samestep.objective import Objective


class DistillationConfig(TrainConfig):
    """Learn the distributions of a teacher (arXiv:1503.02531)."""

    objective: Literal["distillation"] = "distillation"
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""
    teacher: str
    """Hub name or folder of a model with the same vocabulary."""
    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon"] = "forward_kl"
    """Of the teacher from the student, of the student from the teacher, or between."""
    temperature: float = Field(default=1.0, gt=0)
    """Of both distributions."""
    nll_weight: float = Field(default=0.0, ge=0, le=1)
    """Weight of cross entropy; the divergence has the rest of 1."""
    train_on: Literal["completion", "all"] = "completion"
    """Targets: completions and assistant turns, or every token."""
    normalize: Literal["token", "sequence"] = "token"
    """Every token weighs the same, or every sequence does."""

    def read(self, source: str, tokenizer: Any, like: "Records | None" = None) -> "Records":
        """Rows as of causal_lm."""
        return read_language(self, source, tokenizer, self.train_on)

    def build(self, model: Any, data: Sequence["Records"]) -> "Objective":
        """The divergence from the teacher."""
        from samestep.models.load import load_model, resolve
        from samestep.objective import Objective
        from samestep.objectives.distillation import Distillation

        trust = self.trust_remote_code
        teacher = load_model(resolve(self.teacher), dtype=model.dtype, trust_remote_code=trust)
        own, found = (m.get_input_embeddings().num_embeddings for m in (model, teacher))
        if own != found:
            raise ConfigError(
                f"teacher: it has {found} embeddings, the model has {own}: they must share a "
                "vocabulary"
            )
        teacher.to(model.device).set_attn_implementation(model.config._attn_implementation)
        return Objective(
            Distillation(
                teacher,
                kind=self.divergence,
                temperature=self.temperature,
                nll_weight=self.nll_weight,
                normalize=self.normalize,
            )
        )
