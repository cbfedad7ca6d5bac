"""Distillation from a teacher with the same vocabulary."""

from collections.abc import Sequence
from typing import Any

from samestep.data.load import load_rows
from samestep.data.readers.distillation import teacher_topk_records
from samestep.data.records import Records
from samestep.engine.terms import Objective
from samestep.errors import ConfigError
from samestep.objectives.distillation import Distillation, TopKDistillation
from samestep.train.recipes.base import Recipe, load_frozen
from samestep.train.recipes.language import read_language
from samestep.train.settings.objectives import DistillationSettings


class DistillationRecipe(Recipe):
    """The divergence from a teacher, a model or its likeliest tokens kept in the rows."""

    settings: DistillationSettings

    def read(self, source: str, tokenizer: Any, training: Records | None = None) -> Records:
        """Rows as of causal_lm; without a teacher with its top-k log-probabilities."""
        settings = self.settings
        records = read_language(settings, source, tokenizer, train_on=settings.train_on)
        if settings.teacher is not None:
            return records
        rows = load_rows(source)
        return teacher_topk_records(rows, records.sequences, max_length=settings.max_length)

    def build(self, model: Any, data: Sequence[Records]) -> Objective:
        """The divergence from the teacher."""
        if self.settings.teacher is None:
            return self._from_rows(model, data)
        return self._from_teacher(model, self.settings.teacher)

    def _from_rows(self, model: Any, data: Sequence[Records]) -> Objective:
        settings = self.settings
        own = model.get_input_embeddings().num_embeddings
        highest = max(int(records.token_fields["top_ids"].max()) for records in data)
        if highest >= own:
            raise ConfigError(
                f"top_ids: the teacher names token {highest}, but the model has {own} embeddings: "
                "they must share a vocabulary"
            )
        return Objective(
            TopKDistillation(
                settings.divergence, nll_weight=settings.nll_weight, normalize=settings.normalize
            )
        )

    def _from_teacher(self, model: Any, source: str) -> Objective:
        settings = self.settings
        trust = settings.trust_remote_code
        return Objective(
            Distillation(
                load_frozen(source, model, field="teacher", trust_remote_code=trust),
                kind=settings.divergence,
                temperature=settings.temperature,
                nll_weight=settings.nll_weight,
                normalize=settings.normalize,
            )
        )
