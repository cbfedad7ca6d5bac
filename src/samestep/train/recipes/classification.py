"""Classifiers, regressors, taggers, spans that answer questions, and sentence embeddings."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from samestep.data.describe import with_report
from samestep.data.readers.classification import class_records, tag_records, value_records
from samestep.data.readers.question_answering import answer_records
from samestep.data.readers.texts import text_records
from samestep.data.records import Records
from samestep.engine.terms import Objective
from samestep.engine.two_pass import TwoPass
from samestep.models.outputs import sequence_embeddings, sequence_logits, span_logits
from samestep.objectives.classification import (
    Classification,
    Embedding,
    QuestionAnswering,
    Regression,
    TokenClassification,
)
from samestep.objectives.units import EXAMPLE_COUNTERS, LABELLED_TOKEN_COUNTERS
from samestep.train.recipes.base import Recipe
from samestep.train.settings.objectives import (
    ClassificationSettings,
    EmbeddingSettings,
    QuestionAnsweringSettings,
    RegressionSettings,
    TokenClassificationSettings,
)
from samestep.utils.sources import Source

_TEXTS = ("text", "text_pair", "messages", "label")


class ClassificationRecipe(Recipe):
    """Classes of texts."""

    settings: ClassificationSettings
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_task: ClassVar[str] = "SEQ_CLS"

    def read(self, source: Source, tokenizer: Any, training: Records | None = None) -> Records:
        """Rows of text (and text_pair) or messages, with a label."""
        rows = self.load_rows(source)
        records = class_records(
            rows,
            tokenizer,
            max_length=self.settings.max_length,
            classes=_classes(self.settings.classes, training),
        )
        return with_report(records, rows, tokenizer, format="texts, classes", used=_TEXTS)

    def load_model(self, source: str, data: Sequence[Records]) -> Any:
        """A classifier with the classes of the rows."""
        return self.load_with(source, **_class_names(data[0].meta["classes"]))

    def outputs(self, model: Any, micro: dict[str, Any]) -> Tensor:
        """The scores of each sequence."""
        return sequence_logits(model, micro)

    def build(self, model: Any, data: Sequence[Records]) -> Objective:
        """Cross entropy by example."""
        return Objective(Classification(self.settings.label_smoothing), EXAMPLE_COUNTERS)


class RegressionRecipe(Recipe):
    """Numbers of texts."""

    settings: RegressionSettings
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_task: ClassVar[str] = "SEQ_CLS"

    def read(self, source: Source, tokenizer: Any, training: Records | None = None) -> Records:
        """Rows of text (and text_pair) or messages, with a number as label."""
        rows = self.load_rows(source)
        records = value_records(rows, tokenizer, max_length=self.settings.max_length)
        return with_report(records, rows, tokenizer, format="texts, numbers", used=_TEXTS)

    def load_model(self, source: str, data: Sequence[Records]) -> Any:
        """A model with one score."""
        return self.load_with(source, num_labels=1, problem_type="regression")

    def outputs(self, model: Any, micro: dict[str, Any]) -> Tensor:
        """The score of each sequence."""
        return sequence_logits(model, micro)

    def build(self, model: Any, data: Sequence[Records]) -> Objective:
        """Squared error by example."""
        return Objective(Regression(), EXAMPLE_COUNTERS)


class TokenClassificationRecipe(Recipe):
    """Tags of words."""

    settings: TokenClassificationSettings
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    peft_task: ClassVar[str] = "TOKEN_CLS"

    def read(self, source: Source, tokenizer: Any, training: Records | None = None) -> Records:
        """Rows of tokens (words) and tags."""
        rows, used = self.load_rows(source), ("tokens", "tags")
        records = tag_records(
            rows,
            tokenizer,
            max_length=self.settings.max_length,
            classes=_classes(self.settings.classes, training),
        )
        return with_report(records, rows, tokenizer, format="words, tags", used=used)

    def load_model(self, source: str, data: Sequence[Records]) -> Any:
        """A tagger with the tags of the rows."""
        return self.load_with(source, **_class_names(data[0].meta["classes"]))

    def build(self, model: Any, data: Sequence[Records]) -> Objective:
        """Cross entropy by tagged token."""
        return Objective(TokenClassification(), LABELLED_TOKEN_COUNTERS)


class QuestionAnsweringRecipe(Recipe):
    """Spans that answer questions."""

    settings: QuestionAnsweringSettings
    auto_class: ClassVar[str] = "AutoModelForQuestionAnswering"
    peft_task: ClassVar[str] = "QUESTION_ANS"

    def read(self, source: Source, tokenizer: Any, training: Records | None = None) -> Records:
        """Rows of question, context and answers, as of SQuAD."""
        rows, used = self.load_rows(source), ("question", "context", "answers")
        records = answer_records(rows, tokenizer, max_length=self.settings.max_length)
        return with_report(records, rows, tokenizer, format="questions", used=used)

    def outputs(self, model: Any, micro: dict[str, Any]) -> Tensor:
        """The scores of each token."""
        return span_logits(model, micro)

    def build(self, model: Any, data: Sequence[Records]) -> Objective:
        """Cross entropy of both ends by example."""
        return Objective(QuestionAnswering(), EXAMPLE_COUNTERS)


def _classes(named: Sequence[str], training: Records | None) -> Sequence[str] | None:
    """The classes to read rows with: those of the training rows, or of the settings, or unknown."""
    return training.meta["classes"] if training else named or None


def _class_names(names: Sequence[str]) -> dict[str, Any]:
    """What a config of transformers says of classes."""
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
    }


class EmbeddingRecipe(Recipe):
    """Anchors that look for their positives among those of the whole effective batch."""

    settings: EmbeddingSettings
    auto_class: ClassVar[str] = "AutoModel"
    peft_task: ClassVar[str] = "FEATURE_EXTRACTION"

    def read(self, source: Source, tokenizer: Any, training: Records | None = None) -> Records:
        """Rows of anchor and positive, and negative if the first row has one."""
        rows = self.load_rows(source)
        columns = ["anchor", "positive"]
        if training.width == 3 if training else rows[0].values.get("negative") is not None:
            columns.append("negative")
        records = text_records(
            rows, tokenizer, columns=columns, max_length=self.settings.max_length
        )
        return with_report(records, rows, tokenizer, format="texts, alike", used=columns)

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
