"""Distillation from a teacher with the same vocabulary."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from samestep.errors import ConfigError
from samestep.train.config import TrainConfig
from samestep.train.objectives.causal_lm import read_language

if TYPE_CHECKING:
    from samestep.data.records import Records
    from samestep.engine.terms import Objective


class DistillationConfig(TrainConfig):
    """Learn the distributions of a teacher (arXiv:1503.02531)."""

    objective: Literal["distillation"] = "distillation"
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""
    teacher: str | None = None
    """Hub name or folder of a model of the same vocabulary; none: rows hold top_ids, top_logps."""
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
        """Rows as of causal_lm; without a teacher with what it said."""
        records = read_language(self, source, tokenizer, self.train_on)
        if self.teacher is not None:
            return records
        from samestep.data.load import load_rows
        from samestep.data.readers.distillation import teacher_topk_records

        return teacher_topk_records(
            load_rows(source), records.sequences, max_length=self.max_length
        )

    def build(self, model: Any, data: Sequence["Records"]) -> "Objective":
        """The divergence from the teacher."""
        return self._from_rows(model, data) if self.teacher is None else self._from_teacher(model)

    def _from_rows(self, model: Any, data: Sequence["Records"]) -> "Objective":
        from samestep.engine.terms import Objective
        from samestep.objectives.distillation import TopKDistillation

        own = model.get_input_embeddings().num_embeddings
        highest = max(int(records.token_fields["top_ids"].max()) for records in data)
        if highest >= own:
            raise ConfigError(
                f"top_ids: the teacher names token {highest}, but the model has {own} embeddings: "
                "they must share a vocabulary"
            )
        return Objective(
            TopKDistillation(self.divergence, nll_weight=self.nll_weight, normalize=self.normalize)
        )

    def _from_teacher(self, model: Any) -> "Objective":
        from samestep.engine.terms import Objective
        from samestep.models.load import load_model, resolve_source
        from samestep.objectives.distillation import Distillation

        assert self.teacher is not None
        trust = self.trust_remote_code
        teacher = load_model(
            resolve_source(self.teacher), dtype=model.dtype, trust_remote_code=trust
        )
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

    def problems(self) -> list[str]:
        """A temperature that what is known of the teacher cannot have."""
        if self.teacher is None and self.temperature != 1:
            return ["temperature: it needs whole logits: name a teacher, or leave it at 1"]
        return []
