"""Settings of classifiers, regressors, taggers, and of spans that answer questions."""

from typing import Literal

from pydantic import Field

from samestep.train.settings.base import ObjectiveRow, TrainSettings


class ClassificationSettings(TrainSettings):
    """Classify texts or conversations."""

    objective: Literal["classification"] = "classification"
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""
    classes: tuple[str, ...] = ()
    """Names of the classes in order; by default those of the training rows."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target probability that is spread over the classes."""


class RegressionSettings(TrainSettings):
    """Predict a number from texts or conversations."""

    objective: Literal["regression"] = "regression"
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""


class TokenClassificationSettings(TrainSettings):
    """Tag the words of a text."""

    objective: Literal["token_classification"] = "token_classification"
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""
    classes: tuple[str, ...] = ()
    """Names of the tags in order; by default those of the training rows."""


class QuestionAnsweringSettings(TrainSettings):
    """Answer questions by a span of a context."""

    objective: Literal["question_answering"] = "question_answering"
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""


CLASSIFICATION = {
    "classification": ObjectiveRow(
        ClassificationSettings, "samestep.train.recipes.classification:ClassificationRecipe"
    ),
    "regression": ObjectiveRow(
        RegressionSettings, "samestep.train.recipes.classification:RegressionRecipe"
    ),
    "token_classification": ObjectiveRow(
        TokenClassificationSettings,
        "samestep.train.recipes.classification:TokenClassificationRecipe",
    ),
    "question_answering": ObjectiveRow(
        QuestionAnsweringSettings, "samestep.train.recipes.classification:QuestionAnsweringRecipe"
    ),
}
"""The objectives of this family."""
