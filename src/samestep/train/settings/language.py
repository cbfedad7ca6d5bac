"""Settings of language models and of preferences over what they write."""

from collections.abc import Iterable
from typing import Any, Literal, get_args

from pydantic import Field

from samestep.losses.names import (
    LOSSES_OF_DIFFERENCES,
    DPOLoss,
    FDivergence,
    SortedLoss,
)
from samestep.train.settings.base import ObjectiveRow, TrainSettings

Normalize = Literal["token", "sequence"] | float

LongText = Literal["cut", "split", "drop"]
"""What becomes of rows of more than ``max_length`` tokens."""


def given_without(settings: TrainSettings, names: Iterable[str], *, reason: str) -> list[str]:
    """A line for each setting that was given, and that nothing reads.

    Args:
        settings: The settings.
        names: Which would be read by nothing.
        reason: What is missing, or what there is instead.
    """
    defaults = type(settings).model_fields
    given: dict[str, Any] = {name: getattr(settings, name) for name in names}
    return [
        f"{name}: {value} has no effect: {reason}"
        for name, value in given.items()
        if value != defaults[name].default
    ]


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
    long_text: LongText = "cut"
    """Rows of more than --max-length tokens: cut at the end, split into pieces (texts alone), or
    dropped."""
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
        if self.long_text != "cut" and self.max_length is None:
            problems.append(f"long_text: {self.long_text} needs max_length")
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

    def problems(self) -> list[str]:
        """Those of causal_lm, and pieces of rows with images."""
        images = ["long_text: rows with images are cut, or refused"]
        return super().problems() + (images if self.long_text != "cut" else [])


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


class ReferenceSettings(TrainSettings):
    """Settings of objectives that compare with a frozen reference."""

    reference_model: str | None = None
    """Hub name or folder of the reference; by default the model as it is before training."""
    precompute_reference: bool = False
    """Run the reference once over all data before the first step, instead of in every step."""
    sync_ref_model: bool = False
    """Let the reference follow the model, as TR-DPO does."""
    ref_model_mixup_alpha: float = Field(default=0.6, gt=0, le=1)
    """The model's share of the reference after each such move; 1 takes its weights as they are."""
    ref_model_sync_steps: int = Field(default=512, ge=1)
    """Steps from one move of the reference to the next."""

    def problems(self) -> list[str]:
        """A reference that is to move and cannot."""
        if not self.sync_ref_model:
            moves = ("ref_model_mixup_alpha", "ref_model_sync_steps")
            return given_without(self, moves, reason="it needs sync_ref_model")
        problems = []
        if self.precompute_reference:
            problems.append(
                "sync_ref_model and precompute_reference contradict each other: a reference that "
                "moves cannot be run once"
            )
        if self.lora_rank is not None:
            problems.append(
                "sync_ref_model: adapters have no whole reference that could follow them; leave "
                "lora_rank out"
            )
        if self.precision == "bfloat16":
            problems.append(
                "sync_ref_model: small moves of the reference round away in precision bfloat16; "
                "mixed keeps them"
            )
        if self.parallel == "fsdp2":
            problems.append("sync_ref_model: not under parallel fsdp2, which keeps no whole copy")
        return problems


class DPOSettings(ReferenceSettings):
    """Direct preference optimisation on pairs of completions (arXiv:2305.18290) and its family."""

    objective: Literal["dpo"] = "dpo"
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""
    loss: tuple[DPOLoss, ...] = ("sigmoid",)
    """One loss or several, mixed."""
    loss_weights: tuple[float, ...] = ()
    """A weight for each of them; by default 1."""
    beta: float = Field(default=0.1, gt=0)
    """How strongly the reference holds the policy."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of the labels that are taken to be wrong."""
    length_normalize: bool = False
    """Compare means over tokens instead of sums (ipo always does)."""
    discopop_tau: float = Field(default=0.05, gt=0)
    """Temperature of discopop."""
    f_divergence_type: FDivergence = "reverse_kl"
    """What holds the policy near to the reference (f-DPO); reverse_kl: DPO's own."""
    f_alpha_divergence_coef: float = Field(default=0.5, ge=0, le=1)
    """Of alpha_divergence: 1 is reverse_kl, 0 is forward_kl."""
    ld_alpha: float | None = Field(default=None, ge=0, le=1)
    """LD-DPO: the weight of tokens beyond the number that both completions have; 1: DPO."""
    use_weighting: bool = False
    """WPO: a pair weighs as much as the policy would write it."""

    def problems(self) -> list[str]:
        """Losses that do not exist or do not fit."""
        problems = super().problems()
        if not self.loss or len(set(self.loss)) < len(self.loss):
            problems.append(f"loss: name each loss once, at least one; found {self.loss}")
        if self.loss_weights and len(self.loss_weights) != len(self.loss):
            problems.append(f"loss_weights: {len(self.loss_weights)} for {len(self.loss)} losses")
        if "exo_pair" in self.loss and self.label_smoothing == 0:
            problems.append("label_smoothing: exo_pair needs one above 0, such as 0.001")
        others = [name for name in self.loss if name not in LOSSES_OF_DIFFERENCES]
        if others and self.f_divergence_type != "reverse_kl":
            problems.append(
                f"f_divergence_type: {self.f_divergence_type} does not go with loss "
                f"{', '.join(others)}, which see more than the difference of a pair (those that do "
                f"not: {', '.join(sorted(LOSSES_OF_DIFFERENCES))})"
            )
        if self.f_divergence_type != "alpha_divergence":
            problems += given_without(
                self,
                ["f_alpha_divergence_coef"],
                reason="it needs f_divergence_type alpha_divergence",
            )
        sorted_losses = [name for name in self.loss if name in get_args(SortedLoss)]
        if sorted_losses and self.use_weighting:
            problems.append(
                f"use_weighting: {', '.join(sorted_losses)} sort the pairs, so that none has a "
                "weight of its own"
            )
        return problems


class SimPOSettings(TrainSettings):
    """SimPO: preference by mean log likelihood, without a reference (arXiv:2405.14734)."""

    objective: Literal["simpo"] = "simpo"
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""
    beta: float = Field(default=2.0, gt=0)
    """Scale of the margin between mean log likelihoods."""
    gamma: float = Field(default=1.0, ge=0)
    """Target margin, in the units of beta times the margin."""
    nll_weight: float = Field(default=0.0, ge=0)
    """Weight of the chosen completions' cross entropy beside it."""


class CPOSettings(TrainSettings):
    """CPO: contrastive preference with cross entropy beside it (arXiv:2401.08417)."""

    objective: Literal["cpo"] = "cpo"
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""
    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """Of the margin between log likelihoods."""
    beta: float = Field(default=0.1, gt=0)
    """Scale of the margin."""
    nll_weight: float = Field(default=1.0, ge=0)
    """Weight of the chosen completions' cross entropy."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of the labels that are taken to be wrong, for sigmoid."""


class ORPOSettings(TrainSettings):
    """ORPO: cross entropy of the chosen with an odds ratio beside it (arXiv:2403.07691)."""

    objective: Literal["orpo"] = "orpo"
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""
    beta: float = Field(default=0.1, gt=0)
    """Weight of the odds ratio (the paper's lambda)."""


class KTOSettings(ReferenceSettings):
    """KTO: learn from completions that are good or bad by themselves (arXiv:2402.01306)."""

    objective: Literal["kto"] = "kto"
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""
    beta: float = Field(default=0.1, gt=0)
    """How strongly the reference holds the policy."""
    desirable_weight: float = Field(default=1.0, gt=0)
    """Weight of desirable completions."""
    undesirable_weight: float = Field(default=1.0, gt=0)
    """Weight of undesirable completions."""


class RewardSettings(TrainSettings):
    """Reward model: score the chosen completion above the rejected one (Bradley-Terry)."""

    objective: Literal["reward"] = "reward"
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""
    center_rewards: float = Field(default=0.0, ge=0)
    """Weight of (reward_chosen + reward_rejected)², which holds rewards around 0."""


PREFERENCE = {
    "dpo": ObjectiveRow(DPOSettings, "samestep.train.recipes.preference:DPORecipe"),
    "simpo": ObjectiveRow(SimPOSettings, "samestep.train.recipes.preference:SimPORecipe"),
    "cpo": ObjectiveRow(CPOSettings, "samestep.train.recipes.preference:CPORecipe"),
    "orpo": ObjectiveRow(ORPOSettings, "samestep.train.recipes.preference:ORPORecipe"),
    "kto": ObjectiveRow(KTOSettings, "samestep.train.recipes.preference:KTORecipe"),
    "reward": ObjectiveRow(RewardSettings, "samestep.train.recipes.preference:RewardRecipe"),
}
"""The objectives of this family."""
