"""The table of objectives, and the settings of those that belong to no family.

An objective is a row here or in its family's table: the class of its settings, and its recipe.
"""

from typing import Literal

from pydantic import Field

from samestep.errors import ConfigError
from samestep.losses.names import PolicyLoss
from samestep.train.settings.base import ObjectiveRow, TrainSettings
from samestep.train.settings.language import (
    LANGUAGE,
    PREFERENCE,
    Normalize,
    ReferenceSettings,
    constant_problems,
    given_without,
)
from samestep.train.settings.peers import peer_objective
from samestep.train.settings.rollouts import (
    OF_GENERATION,
    OF_REWARDS,
    GenerationFields,
    RolloutFields,
    problems_of_generation,
    problems_of_rewards,
)
from samestep.utils.plugins import is_reference, load_object, nearest


class PolicySettings(ReferenceSettings, RolloutFields):
    """Learn from rollouts, given or generated, and their rewards by a clipped policy gradient."""

    objective: Literal["policy"] = "policy"
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""
    baseline: Literal["grpo", "dr_grpo", "rloo", "given"] = "grpo"
    """What a reward is compared with; given: rows bring their advantage."""
    normalize: Normalize = "sequence"
    """Every token weighs the same (DAPO), every sequence does (GRPO), or divide by this constant
    (Dr. GRPO)."""
    ratio: Literal["token", "sequence"] = "token"
    """Compare with the old policy token by token, or by sequence (GSPO)."""
    loss: PolicyLoss = "clipped"
    """How a ratio far from 1 is held: clipped (PPO, GRPO), its weight capped (cispo), or behind a
    gate that closes gradually (sapo)."""
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """How far below 1 the ratio may go."""
    clip_high: float = Field(default=0.2, gt=0)
    """How far above 1 (DAPO: 0.28). For cispo the cap of the weight is 1 above it."""
    sapo_temperature_pos: float = Field(default=1.0, gt=0)
    """How fast sapo's gate closes, of targets whose advantage is above 0."""
    sapo_temperature_neg: float = Field(default=1.05, gt=0)
    """Of the others."""
    kl_weight: float = Field(default=0.0, ge=0)
    """Weight of the KL to the reference; 0: there is none."""
    entropy_weight: float = Field(default=0.0, ge=0)
    """Weight of a bonus: the mean entropy of a token, by tokens whatever normalize says."""

    def problems(self) -> list[str]:
        """A constant that cannot divide, a reference that cannot be, bounds of other losses."""
        problems = [*constant_problems(self.normalize), *super().problems()]
        if self.precompute_reference:
            problems.append("precompute_reference: the KL of rollouts needs a live reference")
        if self.sync_ref_model and not self.kl_weight:
            problems.append("sync_ref_model: without kl_weight there is no reference to move")
        problems += self._problems_of_rollouts()
        unread = {
            "clipped": ("sapo_temperature_pos", "sapo_temperature_neg"),
            "cispo": ("clip_low", "sapo_temperature_pos", "sapo_temperature_neg"),
            "sapo": ("clip_low", "clip_high"),
        }[self.loss]
        return problems + given_without(self, unread, reason=f"loss {self.loss} does not read it")

    def _problems_of_rollouts(self) -> list[str]:
        if not self.reward_funcs:
            reason = "rollouts are generated with reward_funcs alone"
            return given_without(self, (*OF_GENERATION, *OF_REWARDS), reason=reason)
        problems = problems_of_generation(self, by="reward_funcs") + problems_of_rewards(self)
        if self.baseline == "given":
            problems.append("baseline: given reads advantages of rows, and reward_funcs generates")
        return problems


class DistillationSettings(TrainSettings, GenerationFields):
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
    on_policy: bool = False
    """The model writes the completions that it learns from, to the rows' prompts, in every step
    (GKD, arXiv:2306.13649)."""

    @property
    def generates(self) -> bool:
        """Whether the run generates what it learns from."""
        return self.on_policy

    def problems(self) -> list[str]:
        """A temperature that a teacher's likeliest tokens cannot have, completions of its own."""
        problems = []
        if self.teacher is None and self.temperature != 1:
            problems.append("temperature: it needs whole logits: name a teacher, or leave it at 1")
        if not self.on_policy:
            reason = "completions are generated with on_policy alone"
            return problems + given_without(self, OF_GENERATION, reason=reason)
        problems += problems_of_generation(self, by="on_policy")
        if self.teacher is None:
            problems.append("on_policy: no row holds what a teacher says of them: name a teacher")
        if self.nll_weight:
            problems.append("nll_weight: on_policy would learn what the model wrote itself")
        if self.train_on == "all":
            problems.append("train_on: on_policy learns completions alone")
        return problems


class EmbeddingSettings(TrainSettings):
    """Sentence embeddings by contrast: the whole effective batch are the negatives."""

    objective: Literal["embedding"] = "embedding"
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""
    pooling: Literal["mean", "last", "first"] = "mean"
    """A sequence's vector: the mean of its tokens' states, its last token's or its first's."""
    temperature: float = Field(default=0.05, gt=0)
    """Cosines are divided by this."""
    symmetric: bool = False
    """Positives look for their anchors too."""


class FlowMatchingSettings(TrainSettings):
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

    def problems(self) -> list[str]:
        """What does not apply to latents."""
        problems = []
        if self.lora_rank is not None:
            problems.append("lora_rank: adapters are not served for models of diffusers")
        if self.tokenizer is not None or self.max_length is not None:
            problems.append("tokenizer and max_length are for text: leave them out")
        if self.gradient_checkpointing == "selective":
            problems.append("gradient_checkpointing: models of diffusers have none and full alone")
        return problems


class CustomSettings(TrainSettings):
    """Train on an objective from a file: a function (model, micro-batch) to terms."""

    objective: str
    """file.py:name or module:name of a function, `samestep.TwoPass` or `samestep.Objective`."""
    rows: Literal["completions", "pairs"] = "completions"
    """Which rows it takes: those of causal_lm, or those of dpo."""


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


OBJECTIVES = {
    **LANGUAGE,
    **PREFERENCE,
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
    "policy": ObjectiveRow(PolicySettings, "samestep.train.recipes.preference:PolicyRecipe"),
    "distillation": ObjectiveRow(
        DistillationSettings, "samestep.train.recipes.language:DistillationRecipe"
    ),
    "embedding": ObjectiveRow(
        EmbeddingSettings, "samestep.train.recipes.classification:EmbeddingRecipe"
    ),
    "flow_matching": ObjectiveRow(
        FlowMatchingSettings, "samestep.train.recipes.flow_matching:FlowMatchingRecipe"
    ),
}
"""What ``objective`` may name."""


def settings_class(objective: str) -> type[TrainSettings]:
    """The settings of an objective.

    Args:
        objective: A name, or ``file.py:name`` or ``package.module:name`` of one's own: a recipe
            with settings of its own, or a function.

    Returns:
        The class that holds them; for an objective of the table this does not load PyTorch.

    Raises:
        ConfigError: There is no such objective.
    """
    if is_reference(objective):
        own = getattr(load_object(objective, what="objective"), "settings_class", CustomSettings)
        assert issubclass(own, TrainSettings)
        return own
    if objective not in OBJECTIVES:
        raise ConfigError(
            f"objective: there is no {objective!r}"
            f"{peer_objective(objective) or nearest(objective, OBJECTIVES)} (known: "
            f"{', '.join(OBJECTIVES)}, or file.py:name or package.module:name of one of your own)"
        )
    return OBJECTIVES[objective].settings
