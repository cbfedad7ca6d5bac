"""Preferences and rewards: DPO and its family, SimPO, CPO, ORPO, KTO, reward models, policies."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from samestep.data.collate import Padding
from samestep.data.describe import with_report
from samestep.data.load import load_rows
from samestep.data.readers.preference import collate_unpaired, pair_records, unpaired_records
from samestep.data.readers.prompts import ROWS, prompt_records
from samestep.data.readers.rollouts import rollout_records
from samestep.data.records import Records
from samestep.data.rows import Row
from samestep.engine.parallel import is_sharded
from samestep.engine.terms import Objective, constant
from samestep.engine.two_pass import TwoPass
from samestep.errors import ConfigError
from samestep.losses.policy import ClipRange, Temperatures
from samestep.models.outputs import sequence_logits
from samestep.objectives.kto import KTO, KTO_COUNTERS
from samestep.objectives.log_probs import Reference
from samestep.objectives.moving_reference import MovingReference
from samestep.objectives.policy import PolicyGradient
from samestep.objectives.preference import DPO, ReferenceFree, Reward
from samestep.objectives.units import PAIR_COUNTERS
from samestep.train.recipes.base import Recipe, load_frozen, token_cache
from samestep.train.rewards import check_columns, load_rewards
from samestep.train.rollouts import RolloutMaker, sampler_of
from samestep.train.settings.adapters import continued_adapter
from samestep.train.settings.base import TrainSettings
from samestep.train.settings.language import (
    CPOSettings,
    DPOSettings,
    KTOSettings,
    ORPOSettings,
    ReferenceSettings,
    RewardSettings,
    SimPOSettings,
)
from samestep.train.settings.objectives import PolicySettings
from samestep.utils.sources import Source

_PAIR_COLUMNS = (
    *("prompt", "chosen", "rejected", "tools", "margin"),
    *("ref_chosen_logps", "ref_rejected_logps"),
)


def read_pairs(settings: TrainSettings, source: Source, tokenizer: Any) -> Records:
    """Rows of prompt, chosen and rejected.

    Args:
        settings: ``max_length``, ``append_eos``.
        source: A value of ``data`` or ``eval_data``.
        tokenizer: The model's tokenizer.

    Returns:
        The records, of two sequences each.

    Raises:
        DataError: The rows cannot be used.
    """
    rows = load_rows(source, row_format=settings.row_format, columns=settings.columns)
    records = pair_records(
        rows,
        tokenizer,
        max_length=settings.max_length,
        append_eos=settings.append_eos,
        cache=token_cache(settings),
    )
    return with_report(
        records,
        rows,
        tokenizer,
        format="pairs",
        used=_PAIR_COLUMNS,
        append_eos=_closes_texts(settings, rows, "chosen"),
    )


_ROLLOUT_COLUMNS = (
    *("prompt", "completion", "tools", "input_ids", "labels"),
    *("reward", "advantage", "group", "old_log_p"),
)


def _closes_texts(settings: TrainSettings, rows: Sequence[Row], column: str) -> bool:
    """Whether ``append_eos`` says something of the rows: they are text."""
    return settings.append_eos and isinstance(rows[0].values.get(column), str)


def load_reference(settings: ReferenceSettings, model: Any) -> Reference:
    """The reference: a model of its own, or the trained one with its adapters off.

    Args:
        settings: ``reference_model``, ``lora_rank``, ``trust_remote_code``; ``sync_ref_model`` and
            how it moves.
        model: The model that trains, before its first step.

    Returns:
        The reference.

    Raises:
        ConfigError: It has another vocabulary, or there is no room for a copy, or it cannot move.
    """
    source, moves = settings.reference_model, settings.sync_ref_model
    # Adapters that train on are part of the model as it was: it is not the model without them.
    source = source or continued_adapter(settings, settings.model)
    if moves and is_sharded(model):
        raise ConfigError("sync_ref_model: not under parallel fsdp2, which keeps no whole copy")
    if source is None and not moves and settings.lora_rank is not None:
        return Reference(None)
    if source is not None:
        trust = settings.trust_remote_code
        own = load_frozen(source, model, field="reference_model", trust_remote_code=trust)
    elif is_sharded(model):
        raise ConfigError(
            "parallel: fsdp2 cannot keep a second copy of the model as the reference. Train "
            "adapters (lora_rank), whose reference is the model without them, or give rows "
            "with ref_chosen_logps and ref_rejected_logps"
        )
    else:
        own = copy.deepcopy(model)
    if not moves:
        return Reference(own)
    share, every = settings.ref_model_mixup_alpha, settings.ref_model_sync_steps
    return MovingReference(own, model, share=share, every=every)


def with_reference(objective: Objective, reference: Reference | None) -> Objective:
    """The objective, after whose steps its reference moves, if it does.

    Args:
        objective: Whose loss compares with the reference.
        reference: What `load_reference` gave, or None.

    Returns:
        The objective itself unless the reference moves.
    """
    if not isinstance(reference, MovingReference):
        return objective
    return replace(objective, after_step=reference.after_step, state=reference.state)


class PairRecipe(Recipe):
    """What reads rows of a prompt with a chosen and a rejected completion."""

    def read(self, source: Source, tokenizer: Any, training: Records | None = None) -> Records:
        """Rows of prompt, chosen and rejected."""
        return read_pairs(self.settings, source, tokenizer)


class DPORecipe(PairRecipe):
    """Losses of pairs against a reference."""

    settings: DPOSettings

    def build(self, model: Any, data: Sequence[Records]) -> Objective:
        """The mixture of losses, with a reference that is live, run once, or read from the rows."""
        settings = self.settings
        in_rows = ["ref_chosen_logps" in records.fields for records in data]
        if any(in_rows) and not all(in_rows):
            raise ConfigError("data and eval_data: only one of them has ref_chosen_logps")
        if any(in_rows):
            _check_rows_with_reference(settings)
        live = None if any(in_rows) else load_reference(settings, model)
        weights = settings.loss_weights or (1.0,) * len(settings.loss)
        dpo = DPO(
            losses=dict(zip(settings.loss, weights, strict=True)),
            reference=live,
            beta=settings.beta,
            label_smoothing=settings.label_smoothing,
            length_normalize=settings.length_normalize,
            tau=settings.discopop_tau,
            divergence=settings.f_divergence_type,
            divergence_coefficient=settings.f_alpha_divergence_coef,
            tail_weight=1.0 if settings.ld_alpha is None else settings.ld_alpha,
            on_policy_weights=settings.use_weighting,
        )

        def annotate(model: Any, micro: Mapping[str, Any]) -> dict[str, Tensor]:
            both = dpo.reference_log_p(model, micro)
            return {"ref_chosen_logps": both[::2], "ref_rejected_logps": both[1::2]}

        precompute = settings.precompute_reference and live is not None
        loss = replace(dpo, reference=None) if precompute else dpo
        objective = Objective(
            TwoPass(loss) if loss.coupled else loss,
            PAIR_COUNTERS,
            annotate if precompute else None,
        )
        return with_reference(objective, live)


def _check_rows_with_reference(settings: DPOSettings) -> None:
    """Refuse settings that need another reference than the sums that the rows bring."""
    problems = []
    if settings.ld_alpha not in (None, 1.0):
        problems.append("ld_alpha: those are sums over whole completions")
    if settings.sync_ref_model:
        problems.append("sync_ref_model: those cannot follow the model")
    if problems:
        raise ConfigError("\n".join(["the rows bring ref_chosen_logps:", *problems]))


class SimPORecipe(PairRecipe):
    """Preference by mean log likelihood."""

    settings: SimPOSettings

    def build(self, model: Any, data: Sequence[Records]) -> Objective:
        """The loss, without a reference."""
        settings = self.settings
        loss = ReferenceFree(
            "simpo", beta=settings.beta, gamma=settings.gamma, nll_weight=settings.nll_weight
        )
        return Objective(loss, PAIR_COUNTERS)


class CPORecipe(PairRecipe):
    """Contrastive preference."""

    settings: CPOSettings

    def build(self, model: Any, data: Sequence[Records]) -> Objective:
        """The loss, without a reference."""
        settings = self.settings
        loss = ReferenceFree(
            "cpo",
            beta=settings.beta,
            loss=settings.loss,
            nll_weight=settings.nll_weight,
            label_smoothing=settings.label_smoothing,
        )
        return Objective(loss, PAIR_COUNTERS)


class ORPORecipe(PairRecipe):
    """Odds ratio beside cross entropy."""

    settings: ORPOSettings

    def build(self, model: Any, data: Sequence[Records]) -> Objective:
        """The loss, without a reference."""
        loss = ReferenceFree("orpo", beta=self.settings.beta, nll_weight=1.0)
        return Objective(loss, PAIR_COUNTERS)


class KTORecipe(Recipe):
    """Completions that are good or bad by themselves."""

    settings: KTOSettings

    def read(self, source: Source, tokenizer: Any, training: Records | None = None) -> Records:
        """Rows of prompt, completion and label."""
        rows = self.load_rows(source)
        records = unpaired_records(
            rows,
            tokenizer,
            max_length=self.settings.max_length,
            append_eos=self.settings.append_eos,
            cache=token_cache(self.settings),
        )
        used = ("prompt", "completion", "label", "tools")
        closes = _closes_texts(self.settings, rows, "completion")
        return with_report(
            records,
            rows,
            tokenizer,
            format="completions, good or bad",
            used=used,
            append_eos=closes,
        )

    def collate(
        self,
        data: Records,
        indices: Sequence[int],
        *,
        padding: Padding,
        pad_id: int,
        key: tuple[int, int],
    ) -> dict[str, Any]:
        """The examples themselves, and a second micro-batch of their mismatched completions."""
        return collate_unpaired([data[at] for at in indices], padding=padding, pad_id=pad_id)

    def build(self, model: Any, data: Sequence[Records]) -> Objective:
        """The coupled loss, with a reference that is live or run once."""
        settings = self.settings
        reference = load_reference(settings, model)
        kto = KTO(
            reference,
            beta=settings.beta,
            desirable_weight=settings.desirable_weight,
            undesirable_weight=settings.undesirable_weight,
        )
        if not settings.precompute_reference:
            return with_reference(Objective(TwoPass(kto), KTO_COUNTERS), reference)
        loss = TwoPass(replace(kto, reference=None))
        return Objective(loss, KTO_COUNTERS, annotate=kto.reference_log_p)


class RewardRecipe(PairRecipe):
    """A model that scores completions."""

    settings: RewardSettings
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_task: ClassVar[str] = "SEQ_CLS"

    def load_model(self, source: str, data: Sequence[Records]) -> Any:
        """A model with one score."""
        return self.load_with(source, num_labels=1)

    def outputs(self, model: Any, micro: dict[str, Any]) -> Tensor:
        """The score of each sequence."""
        return sequence_logits(model, micro)

    def build(self, model: Any, data: Sequence[Records]) -> Objective:
        """Bradley-Terry by pair, with the rows' margins if they have them."""
        return Objective(Reward(self.settings.center_rewards), PAIR_COUNTERS)


class PolicyRecipe(Recipe):
    """A policy gradient that holds ratios near 1, on rollouts of the rows or of its own."""

    settings: PolicySettings

    def __init__(self, settings: PolicySettings) -> None:
        super().__init__(settings)
        # What is not there is said before rows are read.
        self._rewards = load_rewards(settings)
        sampler_of(settings)

    def read(self, source: Source, tokenizer: Any, training: Records | None = None) -> Records:
        """Rows of prompt, completion and reward; or of prompts alone."""
        rows = self.load_rows(source)
        if self._rewards:
            return self._read_prompts(rows, tokenizer)
        records = rollout_records(
            rows,
            tokenizer,
            baseline=self.settings.baseline,
            max_length=self.settings.max_length,
            append_eos=self.settings.append_eos,
            cache=token_cache(self.settings),
        )
        closes = _closes_texts(self.settings, rows, "completion")
        return with_report(
            records, rows, tokenizer, format="rollouts", used=_ROLLOUT_COLUMNS, append_eos=closes
        )

    def _read_prompts(self, rows: Sequence[Row], tokenizer: Any) -> Records:
        records = prompt_records(rows, tokenizer)
        check_columns(self._rewards, records.meta[ROWS])
        used = ["prompt", *dict.fromkeys(name for row in rows for name in row.values)]
        return with_report(records, rows, tokenizer, format="prompts", used=used)

    def rollouts(self, model: Any, tokenizer: Any, data: Records) -> RolloutMaker | None:
        """What generates, where reward functions are given."""
        if not self._rewards:
            return None
        return RolloutMaker(
            self.settings,
            model,
            tokenizer=tokenizer,
            prompts=data,
            rewards=self._rewards,
        )

    def build(self, model: Any, data: Sequence[Records]) -> Objective:
        """The surrogate's gradient, and the KL if it has a weight."""
        settings = self.settings
        normalize = settings.normalize
        reference = load_reference(settings, model) if settings.kl_weight else None
        objective = Objective(
            PolicyGradient(
                normalize=constant(normalize) if isinstance(normalize, float) else normalize,
                ratio=settings.ratio,
                loss=settings.loss,
                clip=ClipRange(settings.clip_low, settings.clip_high),
                temperatures=Temperatures(
                    settings.sapo_temperature_pos, settings.sapo_temperature_neg
                ),
                reference=reference,
                kl_weight=settings.kl_weight,
                entropy_weight=settings.entropy_weight,
                temperature=settings.temperature,
            )
        )
        return with_reference(objective, reference)
