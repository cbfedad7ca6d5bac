"""KTO: the paper's formula over the whole batch, under every split."""

import copy
from typing import Any

import pytest
import torch
from cases import build, gradients, worst
from torch import Tensor

import samestep
from objectives import SPLITS, log_probs, ragged_records
from samestep.data.records import Records
from samestep.engine.two_pass import TwoPass
from samestep.kernels import packed_attention
from samestep.objectives.kto import KTO, KTO_COUNTERS
from samestep.objectives.log_probs import Reference
from samestep.train.recipes.preference import KTORecipe
from samestep.train.settings.language import KTOSettings

BETA, UP, DOWN = 1.0, 1.5, 0.7
RECIPE = KTORecipe(KTOSettings(model="m", data="d", out="o"))


def cut(model: Any, records: Records, sizes: list[int], padding: Any) -> list[dict[str, Any]]:
    packed_attention.register()
    model.set_attn_implementation(packed_attention.NAME if padding == "none" else "sdpa")
    micros, at, turn = [], 0, 0
    while at < len(records):
        end = min(at + sizes[turn % len(sizes)], len(records))
        indices = range(at, end)
        micros.append(RECIPE.collate(records, indices, padding=padding, pad_id=0, key=(0, 0)))
        at, turn = end, turn + 1
    return micros


def truth(model: Any, other: Any, records: Records) -> Tensor:
    ratios = []
    for sequence in records.sequences:
        with torch.no_grad():
            reference = log_probs(other, sequence).sum()
        ratios.append(log_probs(model, sequence).sum() - reference)
    own, apart = torch.stack(ratios[::2]), torch.stack(ratios[1::2])
    weights = records.sequences.weights[::2]
    z = ((weights * apart).sum() / weights.sum()).clamp(min=0).detach()
    losses = [
        weight * (UP * (1 - torch.sigmoid(BETA * (r - z))))
        if good
        else weight * (DOWN * (1 - torch.sigmoid(BETA * (z - r))))
        for r, good, weight in zip(own, records.fields["label"], weights, strict=True)
    ]
    return torch.stack(losses).sum() / weights.sum()


def case(*, weighted: bool = True, one_class: bool = False) -> tuple[Any, Any, Records]:
    labels = torch.arange(8) % 3 == 0
    labels = torch.ones_like(labels) if one_class else labels
    model = build("llama")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.6)
    return model, other, ragged_records(8, width=2, weighted=weighted, label=labels)


@pytest.mark.parametrize("one_class", [False, True])
def test_it_is_the_formula_under_every_split(one_class: bool) -> None:
    model, other, records = case(one_class=one_class)
    wanted_loss = truth(model, other, records)
    wanted_loss.backward()
    wanted = gradients(model)
    loss = KTO(Reference(other), beta=BETA, desirable_weight=UP, undesirable_weight=DOWN)
    for sizes, padding in SPLITS:
        micros = cut(model, records, sizes, padding)
        found, terms = samestep.backward(model, micros, TwoPass(loss), counters=KTO_COUNTERS)
        assert found == pytest.approx(wanted_loss.item(), rel=1e-12)
        assert worst(gradients(model), wanted) < 1e-12
    assert terms["kl"] > 0
    assert (terms["reward_undesirable"] == 0) == one_class


def test_a_reference_point_of_each_micro_batch_is_caught() -> None:
    model, other, records = case(weighted=False)
    truth(model, other, records).backward()
    wanted = gradients(model)
    loss = KTO(Reference(other), beta=BETA, desirable_weight=UP, undesirable_weight=DOWN)

    def local(model: Any, micro: Any) -> samestep.Term:
        kto = loss(model, micro)["kto"]
        assert isinstance(kto, samestep.Coupled)
        return samestep.Term(kto.value(kto.part) * len(kto.part), "examples")

    counters = {"examples": lambda micro: len(micro["example_ids"])}
    samestep.backward(model, cut(model, records, [3, 1], "right"), local, counters=counters)
    assert worst(gradients(model), wanted) > 1e-3
