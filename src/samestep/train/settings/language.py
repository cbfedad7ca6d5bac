"""Settings of language models: next tokens, images and text, masked tokens, encoder and decoder."""

from typing import Literal

from pydantic import Field

from samestep.train.settings.base import ObjectiveRow, TrainSettings

Normalize = Literal["token", "sequence"] | float


def constant_problems(normalize: Normalize) -> list[str]:
    """What is wrong with a constant that totals are divided by."""
    if isinstance(normalize, float) and not 0 < normalize < float("inf"):
        return [f"normalize: a constant must be above 0, not {normalize}"]
    return []


class CausalLMSettings(TrainSettings):
    """Fine-tune a causal language model, with a step that does not depend on the split."""

    objective: Literal["causal_lm"] = "causal_lm"
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""
    train_on: Literal["completion", "all"] = "completion"
    """Targets: completions and assistant turns, or every token."""
    normalize: Normalize = "token"
    """Every token weighs the same, every sequence does, or divide by this constant."""
    loss: Literal["nll", "dft"] = "nll"
    """Cross entropy, or dynamic fine-tuning: each target's times its probability."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target probability that is spread over the vocabulary."""
    z_loss: float = Field(default=0.0, ge=0)
    """Factor of the squared logsumexp."""
    router_loss: Literal["window", "sequence"] | None = None
    """Mixtures of experts: equal loads over the whole batch, or within each sequence."""
    router_loss_weight: float = Field(default=0.001, gt=0)
    """Weight of the router loss."""
    router_z_loss: float = Field(default=0.0, ge=0)
    """Factor of the squared logsumexp of router logits."""
    router_bias_rate: float = Field(default=0.0, ge=0)
    """Step of the experts' biases against their loads, after each step of training."""

    def problems(self) -> list[str]:
        """A constant that cannot divide, terms that dft does not have, biases in adapters."""
        problems = constant_problems(self.normalize)
        if self.loss == "dft" and (self.label_smoothing or self.z_loss):
            problems.append("loss: dft goes with neither label_smoothing nor z_loss")
        if self.router_bias_rate and self.lora_rank is not None:
            problems.append(
                "router_bias_rate: adapters do not hold the biases; leave lora_rank out"
            )
        return problems


class VisionLanguageSettings(CausalLMSettings):
    """Fine-tune a model of images and text on conversations; image tokens are never targets."""

    objective: Literal["vision_language"] = "vision_language"  # type: ignore[assignment]
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""
    padding: Literal["right", "left"] = "right"
    """How micro-batches are laid out. Changes speed and memory, not the step."""


class MaskedLMSettings(TrainSettings):
    """Masked language modelling (arXiv:1810.04805)."""

    objective: Literal["masked_lm"] = "masked_lm"
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""
    mask_share: float = Field(default=0.15, gt=0, lt=1)
    """Share of the tokens that are masked, drawn anew in every step."""


class Seq2SeqSettings(TrainSettings):
    """Fine-tune a model with an encoder and a decoder."""

    objective: Literal["seq2seq"] = "seq2seq"
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target probability that is spread over the vocabulary."""

    def problems(self) -> list[str]:
        """The encoder pads to the right."""
        if self.padding in ("none", "left"):
            return [f"padding: seq2seq pads to the right, not {self.padding!r}"]
        return []


LANGUAGE = {
    "causal_lm": ObjectiveRow(CausalLMSettings, "samestep.train.recipes.language:CausalLMRecipe"),
    "vision_language": ObjectiveRow(
        VisionLanguageSettings, "samestep.train.recipes.language:VisionLanguageRecipe"
    ),
    "masked_lm": ObjectiveRow(MaskedLMSettings, "samestep.train.recipes.language:MaskedLMRecipe"),
    "seq2seq": ObjectiveRow(Seq2SeqSettings, "samestep.train.recipes.language:Seq2SeqRecipe"),
}
"""The objectives of this family."""
