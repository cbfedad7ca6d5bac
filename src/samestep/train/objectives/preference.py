"""Preferences over pairs of completions: DPO and its family, SimPO, CPO, ORPO."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from samestep.errors import ConfigError
from samestep.train.config import TrainConfig

if TYPE_CHECKING:
    from samestep.data.records import Records
    from samestep.engine.terms import Objective
    from samestep.objectives.log_probs import Reference

DPOLoss = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "aot",
    "sft",
]
"""`samestep.losses.preference.PairLoss`, and those that are no loss of a pair by itself."""


def read_pairs(config: TrainConfig, source: str, tokenizer: Any) -> "Records":
    """Rows of prompt, chosen and rejected."""
    from samestep.data.load import load_rows
    from samestep.data.readers.preference import pair_records
    from samestep.utils.files import cache_folder

    return pair_records(
        load_rows(source),
        tokenizer,
        max_length=config.max_length,
        append_eos=config.append_eos,
        cache=cache_folder() / "tokens",
    )


class PairConfig(TrainConfig):
    """Rows of a prompt with a chosen and a rejected completion."""

    def read(self, source: str, tokenizer: Any, like: "Records | None" = None) -> "Records":
        """Rows of prompt, chosen and rejected."""
        return read_pairs(self, source, tokenizer)


class ReferenceConfig(TrainConfig):
    """Settings of objectives that compare with a frozen reference."""

    reference_model: str | None = None
    """Hub name or folder of the reference; by default the model as it is before training."""
    precompute_reference: bool = False
    """Run the reference once over all data before the first step, instead of in every step."""

    def reference(self, model: Any) -> "Reference":
        """The reference: a model of its own, or the trained one with its adapters off.

        Raises:
            ConfigError: It has another vocabulary, or there is no room for a copy.
        """
        import copy

        from samestep.engine.parallel import is_sharded
        from samestep.models.load import load_model, resolve_source
        from samestep.objectives.log_probs import Reference

        if self.reference_model is not None:
            trust = self.trust_remote_code
            source = resolve_source(self.reference_model)
            other = load_model(source, dtype=model.dtype, trust_remote_code=trust)
            own, found = (m.get_input_embeddings().num_embeddings for m in (model, other))
            if own != found:
                raise ConfigError(
                    f"reference_model: it has {found} embeddings, the model has {own}: they must "
                    "share a vocabulary"
                )
            other.to(model.device).set_attn_implementation(model.config._attn_implementation)
            return Reference(other)
        if self.lora_rank is not None:
            return Reference(None)
        if is_sharded(model):
            raise ConfigError(
                "parallel: fsdp2 cannot keep a second copy of the model as the reference. Train "
                "adapters (lora_rank), whose reference is the model without them, or give rows "
                "with ref_chosen_logps and ref_rejected_logps"
            )
        return Reference(copy.deepcopy(model))


class DPOConfig(ReferenceConfig, PairConfig):
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

    def build(self, model: Any, data: Sequence["Records"]) -> "Objective":
        """The mixture of losses, with a reference that is live, run once, or read from the rows."""
        from dataclasses import replace

        import torch

        from samestep.engine.terms import Objective
        from samestep.engine.two_pass import TwoPass
        from samestep.objectives.preference import DPO
        from samestep.objectives.units import PAIR_COUNTERS

        given = ["ref_chosen_logps" in records.fields for records in data]
        if any(given) and not all(given):
            raise ConfigError("data and eval_data: only one of them has ref_chosen_logps")
        live = None if any(given) else self.reference(model)
        weights = self.loss_weights or (1.0,) * len(self.loss)
        dpo = DPO(
            losses=dict(zip(self.loss, weights, strict=True)),
            reference=live,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            length_normalize=self.length_normalize,
            tau=self.discopop_tau,
        )

        def annotate(model: Any, micro: Any) -> dict[str, torch.Tensor]:
            both = dpo.reference_log_p(model, micro)
            return {"ref_chosen_logps": both[::2], "ref_rejected_logps": both[1::2]}

        precompute = self.precompute_reference and live is not None
        loss = replace(dpo, reference=None) if precompute else dpo
        return Objective(
            TwoPass(loss) if loss.coupled else loss,
            PAIR_COUNTERS,
            annotate if precompute else None,
        )

    def problems(self) -> list[str]:
        """Losses that do not exist or do not fit."""
        found = []
        if not self.loss or len(set(self.loss)) < len(self.loss):
            found.append(f"loss: name each loss once, at least one; found {self.loss}")
        if self.loss_weights and len(self.loss_weights) != len(self.loss):
            found.append(f"loss_weights: {len(self.loss_weights)} for {len(self.loss)} losses")
        if "exo_pair" in self.loss and self.label_smoothing == 0:
            found.append("label_smoothing: exo_pair needs one above 0, such as 0.001")
        return found


class SimPOConfig(PairConfig):
    """SimPO: preference by mean log likelihood, without a reference (arXiv:2405.14734)."""

    objective: Literal["simpo"] = "simpo"
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""
    beta: float = Field(default=2.0, gt=0)
    """Scale of the margin between mean log likelihoods."""
    gamma: float = Field(default=1.0, ge=0)
    """Target margin, in the units of beta times the margin."""
    nll_weight: float = Field(default=0.0, ge=0)
    """Weight of the chosen completions' cross entropy beside it."""

    def build(self, model: Any, data: Sequence["Records"]) -> "Objective":
        """The loss, without a reference."""
        from samestep.engine.terms import Objective
        from samestep.objectives.preference import ReferenceFree
        from samestep.objectives.units import PAIR_COUNTERS

        loss = ReferenceFree("simpo", beta=self.beta, gamma=self.gamma, nll_weight=self.nll_weight)
        return Objective(loss, PAIR_COUNTERS)


class CPOConfig(PairConfig):
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

    def build(self, model: Any, data: Sequence["Records"]) -> "Objective":
        """The loss, without a reference."""
        from samestep.engine.terms import Objective
        from samestep.objectives.preference import ReferenceFree
        from samestep.objectives.units import PAIR_COUNTERS

        loss = ReferenceFree(
            "cpo",
            beta=self.beta,
            loss=self.loss,
            nll_weight=self.nll_weight,
            label_smoothing=self.label_smoothing,
        )
        return Objective(loss, PAIR_COUNTERS)


class ORPOConfig(PairConfig):
    """ORPO: cross entropy of the chosen with an odds ratio beside it (arXiv:2403.07691)."""

    objective: Literal["orpo"] = "orpo"
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""
    beta: float = Field(default=0.1, gt=0)
    """Weight of the odds ratio (the paper's lambda)."""

    def build(self, model: Any, data: Sequence["Records"]) -> "Objective":
        """The loss, without a reference."""
        from samestep.engine.terms import Objective
        from samestep.objectives.preference import ReferenceFree
        from samestep.objectives.units import PAIR_COUNTERS

        return Objective(ReferenceFree("orpo", beta=self.beta, nll_weight=1.0), PAIR_COUNTERS)
