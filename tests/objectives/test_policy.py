"""Policy gradients: the papers' formulas over the whole batch, under every split."""

import copy
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import build
from torch import Tensor

import samestep
from objectives import (
    SPLITS,
    check_all_splits,
    check_wrong_is_caught,
    log_probs,
    ragged_records,
    side_by_side,
)
from samestep.data.collate import collate_records
from samestep.data.examples import Example
from samestep.data.records import Records
from samestep.engine.terms import Objective, named_terms
from samestep.losses.policy import ClipRange, Temperatures
from samestep.models.lm_head import HiddenStates, LogitRule
from samestep.objectives.language import DFT
from samestep.objectives.log_probs import Reference
from samestep.objectives.policy import PolicyGradient

N, CLIP, KL = 8, ClipRange(0.2, 0.28), 0.05


def rollouts(model: Any, *, old: bool, weighted: bool = False) -> Records:
    """Rollouts whose old policy differs enough from the new one to reach the clip."""
    advantage = torch.randn(N, generator=torch.Generator().manual_seed(1)).double()
    plain = ragged_records(N, weighted=weighted)
    if not old:
        return Records(plain.sequences, fields={"advantage": advantage})
    values = torch.zeros(len(plain.sequences.ids), dtype=torch.float64)
    draw = torch.Generator().manual_seed(2)
    for at, sequence in enumerate(plain.sequences):
        part = slice(int(plain.sequences.offsets[at]), int(plain.sequences.offsets[at + 1]))
        with torch.no_grad():
            new = log_probs(model, sequence)
        noise = 0.3 * torch.randn(len(new), generator=draw)
        values[part][sequence.labels != -100] = new + noise
    return Records(
        plain.sequences, fields={"advantage": advantage}, token_fields={"old_log_p": values}
    )


def surrogate(new: Tensor, old: Tensor, advantage: Tensor, ratio: str) -> Tensor:
    log_ratio = new - old
    if ratio == "sequence":
        log_ratio = log_ratio.mean().expand_as(log_ratio)
    q = log_ratio.exp()
    return -torch.minimum(q * advantage, q.clamp(0.8, 1.28) * advantage)


def plain(records: Records, normalize: Any, ratio: str, other: Any = None) -> Any:
    def truth(model: Any) -> Tensor:
        total, count = torch.zeros(()).double(), 0.0
        for record in records:
            (sequence,) = record.sequences
            new = log_probs(model, sequence)
            old = new.detach()
            if "old_log_p" in record.token_fields:
                old = record.token_fields["old_log_p"][0][sequence.labels != -100]
            losses = surrogate(new, old, record.fields["advantage"], ratio)
            if other is not None:
                with torch.no_grad():
                    d = log_probs(other, sequence) - new.detach()
                d = d - (new - new.detach())
                losses = losses + KL * (d.exp() - d - 1)
            each = losses.mean() if normalize == "sequence" else losses.sum()
            total = total + sequence.weight * each
            count += sequence.weight * (1 if normalize == "sequence" else len(losses))
        return total / (count if isinstance(normalize, str) else normalize)

    return truth


@pytest.mark.parametrize("normalize", ["token", "sequence", 64.0])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("old", [True, False])
def test_every_split(normalize: Any, ratio: Any, old: bool) -> None:
    model = build("llama")
    records = rollouts(model, old=old, weighted=True)
    unit = samestep.constant(normalize) if isinstance(normalize, float) else normalize
    objective = Objective(PolicyGradient(normalize=unit, ratio=ratio, clip=CLIP))
    truth = plain(records, normalize, ratio)
    terms = check_all_splits(model, records, objective, truth)
    assert (terms["clipped"] > 0) == old or ratio == "sequence"
    if normalize == "token":
        check_wrong_is_caught(model, records, objective, truth)


def test_the_kl_to_a_reference() -> None:
    model, other = build("llama"), build("llama")
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    records = rollouts(model, old=True)
    loss = PolicyGradient(clip=CLIP, reference=Reference(other), kl_weight=KL)
    terms = check_all_splits(
        model, records, Objective(loss), plain(records, "token", "token", other)
    )
    assert terms["kl"] > 0


def test_the_temperature_of_sampling_is_that_of_the_loss() -> None:
    model = build("llama")
    records = rollouts(model, old=False, weighted=True)
    cooled = copy.deepcopy(model)
    with torch.no_grad():
        cooled.lm_head.weight.div_(0.7)
    kept = {"reference": Reference(build("llama")), "kl_weight": KL, "entropy_weight": 0.1}
    other = build("llama")
    with torch.no_grad():
        other.lm_head.weight.div_(0.7)
    micro = collate_records(list(records), padding="none", pad_id=0)
    found = named_terms(PolicyGradient(temperature=0.7, **kept)(model, micro))
    kept["reference"] = Reference(other)
    wanted = named_terms(PolicyGradient(**kept)(cooled, micro))
    assert {*found} == {*wanted}
    for name, term in found.items():
        torch.testing.assert_close(term.total, wanted[name].total, rtol=1e-12, atol=1e-12)
    sum(term.total * term.weight for term in found.values() if term.weight).backward()
    sum(term.total * term.weight for term in wanted.values() if term.weight).backward()
    for (name, weight), other in zip(model.named_parameters(), cooled.parameters(), strict=True):
        scale = 0.7 if "lm_head" in name else 1.0  # of a weight that is larger by 1 / 0.7
        torch.testing.assert_close(weight.grad * scale, other.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", [LogitRule(), LogitRule(0.5), LogitRule(2.0, 3.0), None], ids=str)
def test_a_temperature_divides_whatever_a_model_makes_of_its_head(rule: LogitRule | None) -> None:
    head = torch.nn.Linear(6, 9, bias=False, dtype=torch.float64)
    hidden = torch.randn(4, 6, dtype=torch.float64) * 3
    states = HiddenStates(head, head(hidden) if rule is None else hidden, rule, None)
    tempered = states.tempered(0.7)
    torch.testing.assert_close(
        tempered.logits(tempered.states), states.logits(states.states) / 0.7, rtol=1e-12, atol=1e-12
    )


def of_trl(records: Records, loss_type: str, level: str, bonus: float) -> Any:
    """What TRL's own `GRPOTrainer._compute_loss` makes of these rollouts."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    def truth(model: Any) -> Tensor:
        sequences = list(records.sequences)
        policy, mask = side_by_side([log_probs(model, one) for one in sequences])
        entropy, _ = side_by_side([entropies(model, one) for one in sequences])
        old = [
            record.token_fields["old_log_p"][0][one.labels != -100]
            for record, one in zip(records, sequences, strict=True)
        ]
        fake: Any = SimpleNamespace(
            _get_per_token_logps_and_entropies=lambda *_, **__: (policy, entropy, None),
            model=SimpleNamespace(training=False),
            accelerator=SimpleNamespace(
                num_processes=1, gather=lambda one: one, reduce=lambda one, **_: one
            ),
            args=SimpleNamespace(delta=None, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05),
            _metrics={"eval": defaultdict(list)},
            aux_loss_enabled=False,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            importance_sampling_level=level,
            beta=0.0,
            loss_type=loss_type,
            epsilon_low=CLIP.low,
            epsilon_high=1 + CLIP.high if loss_type == "cispo" else CLIP.high,
            use_vllm=False,
            _entropy_bonus_enabled=bonus != 0,
            entropy_coef=bonus,
            use_adaptive_entropy=False,
        )
        inputs = {
            "prompt_ids": torch.zeros(len(sequences), 1),
            "prompt_mask": torch.ones(len(sequences), 1),
            "completion_ids": torch.zeros(mask.shape),
            "completion_mask": mask.double(),
            "advantages": records.fields["advantage"],
            "old_per_token_logps": side_by_side(old)[0],
            "num_items_in_batch": mask.sum(),
        }
        loss: Tensor = GRPOTrainer._compute_loss(fake, model, inputs)
        return loss

    return truth


def entropies(model: Any, example: Example) -> Tensor:
    """The entropy of the distribution of each target [targets], from whole logits."""
    chosen = example.labels[1:] != -100
    log_p = model(input_ids=example.input_ids[None]).logits[0, :-1][chosen].log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize(
    ("loss", "ratio", "normalize", "theirs", "bonus"),
    [
        ("clipped", "token", "sequence", "grpo", 0.02),
        ("clipped", "sequence", "sequence", "grpo", 0.0),  # GSPO
        ("cispo", "token", "token", "cispo", 0.0),
        ("cispo", "sequence", "token", "cispo", 0.02),
        ("sapo", "token", "sequence", "sapo", 0.02),
        ("sapo", "sequence", "sequence", "sapo", 0.0),
    ],
)
def test_surrogates_are_trls_under_every_split(
    loss: Any, ratio: Any, normalize: Any, theirs: str, bonus: float
) -> None:
    model = build("gpt2")  # llama's norms are in float32, and the truth runs the model twice
    records = rollouts(model, old=True)
    objective = Objective(
        PolicyGradient(normalize, ratio, loss=loss, clip=CLIP, entropy_weight=bonus)
    )
    truth = of_trl(records, theirs, ratio, bonus)
    terms = check_all_splits(
        model,
        records,
        objective,
        truth,
        bound=1e-6 if loss == "sapo" else 1e-12,  # TRL has its temperatures in float32
        splits=[SPLITS[1], SPLITS[3]],
    )
    assert ("clipped" in terms) == (loss != "sapo")
    assert terms["entropy"] > 0
    check_wrong_is_caught(model, records, objective, truth)


def test_the_bonus_is_by_token_whatever_the_loss_is_divided_by() -> None:
    """With weights of rows too; a bonus in the unit of the loss is another objective."""
    model = build("gpt2")
    records = rollouts(model, old=True, weighted=True)

    def truth(model: Any) -> Tensor:
        total, count = torch.zeros(()).double(), 0.0
        for sequence in records.sequences:
            each = entropies(model, sequence)
            total = total + sequence.weight * each.sum()
            count += sequence.weight * len(each)
        return plain(records, 64.0, "token")(model) - 0.02 * total / count

    loss = PolicyGradient(samestep.constant(64), clip=CLIP, entropy_weight=0.02)
    check_all_splits(model, records, Objective(loss), truth, splits=[SPLITS[1], SPLITS[3]])


def test_sapo_is_exact_under_every_split() -> None:
    model = build("llama")
    records = rollouts(model, old=True, weighted=True)

    def truth(model: Any) -> Tensor:
        total, count = torch.zeros(()).double(), 0.0
        for record in records:
            (sequence,) = record.sequences
            new, old = log_probs(model, sequence), record.token_fields["old_log_p"][0]
            t = 2.0 if record.fields["advantage"] > 0 else 3.0
            gate = (t * ((new - old[sequence.labels != -100]).exp() - 1)).sigmoid() * 4 / t
            total = total - sequence.weight * record.fields["advantage"] * gate.sum()
            count += sequence.weight * len(new)
        return total / count

    loss = PolicyGradient(loss="sapo", temperatures=Temperatures(2.0, 3.0))
    check_all_splits(model, records, Objective(loss), truth, splits=[SPLITS[1], SPLITS[3]])
    check_wrong_is_caught(model, records, Objective(loss), truth)


@pytest.mark.parametrize("normalize", ["token", "sequence"])
def test_dft_is_nll_times_its_probability(normalize: Any) -> None:
    model, records = build("gpt2"), ragged_records(N, weighted=True)

    def truth(model: Any) -> Tensor:
        total, count = torch.zeros(()).double(), 0.0
        for sequence in records.sequences:
            log_p = log_probs(model, sequence)
            losses = -log_p.exp().detach() * log_p
            each = losses.mean() if normalize == "sequence" else losses.sum()
            total = total + sequence.weight * each
            count += sequence.weight * (1 if normalize == "sequence" else len(losses))
        return total / count

    terms = check_all_splits(model, records, Objective(DFT(normalize)), truth)
    assert terms["nll"] > terms["dft"]
