"""Classifiers, regressors, reward models, and spans that answer questions."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from samestep.train.config import TrainConfig
from samestep.train.objectives.preference import PairConfig

if TYPE_CHECKING:
    from torch import Tensor

    from samestep.data.records import Records
    from samestep.engine.terms import Objective


class SequenceConfig(TrainConfig):
    """A model with one vector of scores a sequence."""

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    task: ClassVar[str] = "SEQ_CLS"

    def outputs(self, model: Any, micro: dict[str, Any]) -> "Tensor":
        """The scores of each sequence."""
        from samestep.models.outputs import sequence_logits

        return sequence_logits(model, micro)


def class_settings(names: Sequence[str]) -> dict[str, Any]:
    """What a config of transformers says of classes."""
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
    }


class ClassificationConfig(SequenceConfig):
    """Classify texts or conversations."""

    objective: Literal["classification"] = "classification"
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""
    classes: tuple[str, ...] = ()
    """Names of the classes in order; by default those of the training rows."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target probability that is spread over the classes."""

    def read(self, source: str, tokenizer: Any, like: "Records | None" = None) -> "Records":
        """Rows of text (and text_pair) or messages, with a label."""
        from samestep.data.load import load_rows
        from samestep.data.readers.classification import class_records

        known = like.meta["classes"] if like else self.classes or None
        return class_records(
            load_rows(source), tokenizer, max_length=self.max_length, classes=known
        )

    def load(self, source: str, data: Sequence["Records"]) -> Any:
        """A classifier with the classes of the rows."""
        return self.load_with(source, **class_settings(data[0].meta["classes"]))

    def build(self, model: Any, data: Sequence["Records"]) -> "Objective":
        """Cross entropy by example."""
        from samestep.engine.terms import Objective
        from samestep.objectives.classification import Classification
        from samestep.objectives.units import EXAMPLE_COUNTERS

        return Objective(Classification(self.label_smoothing), EXAMPLE_COUNTERS)


class RegressionConfig(SequenceConfig):
    """Predict a number from texts or conversations."""

    objective: Literal["regression"] = "regression"
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""

    def read(self, source: str, tokenizer: Any, like: "Records | None" = None) -> "Records":
        """Rows of text (and text_pair) or messages, with a number as label."""
        from samestep.data.load import load_rows
        from samestep.data.readers.classification import value_records

        return value_records(load_rows(source), tokenizer, max_length=self.max_length)

    def load(self, source: str, data: Sequence["Records"]) -> Any:
        """A model with one score."""
        return self.load_with(source, num_labels=1, problem_type="regression")

    def build(self, model: Any, data: Sequence["Records"]) -> "Objective":
        """Squared error by example."""
        from samestep.engine.terms import Objective
        from samestep.objectives.classification import Regression
        from samestep.objectives.units import EXAMPLE_COUNTERS

        return Objective(Regression(), EXAMPLE_COUNTERS)


class RewardConfig(SequenceConfig, PairConfig):
    """Reward model: score the chosen completion above the rejected one (Bradley-Terry)."""

    objective: Literal["reward"] = "reward"
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""
    centring: float = Field(default=0.0, ge=0)
    """Weight of (reward_chosen + reward_rejected)², which holds rewards around 0."""

    def load(self, source: str, data: Sequence["Records"]) -> Any:
        """A model with one score."""
        return self.load_with(source, num_labels=1)

    def build(self, model: Any, data: Sequence["Records"]) -> "Objective":
        """Bradley-Terry by pair, with the rows' margins if they have them."""
        from samestep.engine.terms import Objective
        from samestep.objectives.preference import Reward
        from samestep.objectives.units import PAIR_COUNTERS

        return Objective(Reward(self.centring), PAIR_COUNTERS)


class TokenClassificationConfig(TrainConfig):
    """Tag the words of a text."""

    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    task: ClassVar[str] = "TOKEN_CLS"
    objective: Literal["token_classification"] = "token_classification"
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""
    classes: tuple[str, ...] = ()
    """Names of the tags in order; by default those of the training rows."""

    def read(self, source: str, tokenizer: Any, like: "Records | None" = None) -> "Records":
        """Rows of tokens (words) and tags."""
        from samestep.data.load import load_rows
        from samestep.data.readers.classification import tag_records

        known = like.meta["classes"] if like else self.classes or None
        return tag_records(load_rows(source), tokenizer, max_length=self.max_length, classes=known)

    def load(self, source: str, data: Sequence["Records"]) -> Any:
        """A tagger with the tags of the rows."""
        return self.load_with(source, **class_settings(data[0].meta["classes"]))

    def build(self, model: Any, data: Sequence["Records"]) -> "Objective":
        """Cross entropy by tagged token."""
        from samestep.engine.terms import Objective
        from samestep.objectives.classification import TokenClassification
        from samestep.objectives.units import LABELLED_TOKEN_COUNTERS

        return Objective(TokenClassification(), LABELLED_TOKEN_COUNTERS)


class QuestionAnsweringConfig(TrainConfig):
    """Answer questions by a span of a context."""

    auto_class: ClassVar[str] = "AutoModelForQuestionAnswering"
    task: ClassVar[str] = "QUESTION_ANS"
    objective: Literal["question_answering"] = "question_answering"
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""

    def read(self, source: str, tokenizer: Any, like: "Records | None" = None) -> "Records":
        """Rows of question, context and answers, as of SQuAD."""
        from samestep.data.load import load_rows
        from samestep.data.readers.question_answering import answer_records

        return answer_records(load_rows(source), tokenizer, max_length=self.max_length)

    def outputs(self, model: Any, micro: dict[str, Any]) -> "Tensor":
        """The scores of each token."""
        from samestep.models.outputs import span_logits

        return span_logits(model, micro)

    def build(self, model: Any, data: Sequence["Records"]) -> "Objective":
        """Cross entropy of both ends by example."""
        from samestep.engine.terms import Objective
        from samestep.objectives.classification import QuestionAnswering
        from samestep.objectives.units import EXAMPLE_COUNTERS

        return Objective(QuestionAnswering(), EXAMPLE_COUNTERS)
