"""Policy gradients: the papers' formulas over the whole batch, under every split."""

from typing import Any

import pytest
import torch
from cases import build
from torch import Tensor

import samestep
from objectives import check_all_splits, check_wrong_is_caught, log_probs, ragged_records
from samestep.data.records import Records
from samestep.engine.terms import Objective
from samestep.losses.preference import ClipRange
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
