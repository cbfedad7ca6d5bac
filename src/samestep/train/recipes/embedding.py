"""Sentence embeddings by contrast."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from samestep.data.load import load_rows
from samestep.data.readers.texts import text_records
from samestep.data.records import Records
from samestep.engine.terms import Objective
from samestep.engine.two_pass import TwoPass
from samestep.models.outputs import sequence_embeddings
from samestep.objectives.embedding import Embedding
from samestep.objectives.units import EXAMPLE_COUNTERS
from samestep.train.recipes.base import Recipe
from samestep.train.settings.objectives import EmbeddingSettings


class EmbeddingRecipe(Recipe):
    """Anchors that look for their positives among those of the whole effective batch."""

    settings: EmbeddingSettings
    auto_class: ClassVar[str] = "AutoModel"
    peft_task: ClassVar[str] = "FEATURE_EXTRACTION"

    def read(self, source: str, tokenizer: Any, training: Records | None = None) -> Records:
        """Rows of anchor and positive, and negative if the first row has one."""
        rows = load_rows(source)
        columns = ["anchor", "positive"]
        if training.width == 3 if training else rows[0].values.get("negative") is not None:
            columns.append("negative")
        return text_records(rows, tokenizer, columns=columns, max_length=self.settings.max_length)

    def outputs(self, model: Any, micro: dict[str, Any]) -> Tensor:
        """The vector of each sequence."""
        return sequence_embeddings(model, micro, pooling=self.settings.pooling)

    def build(self, model: Any, data: Sequence[Records]) -> Objective:
        """The coupled loss."""
        loss = Embedding(
            width=data[0].width,
            pooling=self.settings.pooling,
            scale=1 / self.settings.temperature,
            symmetric=self.settings.symmetric,
        )
        return Objective(TwoPass(loss), EXAMPLE_COUNTERS)
