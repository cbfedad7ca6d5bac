"""Distillation: plain divergences of whole logits, under every split, with logits never whole."""

from typing import Any

import pytest
import torch
from cases import V, build
from largest import Largest
from torch import Tensor
from torch.nn.functional import kl_div

import samestep
from objectives import check_all_splits, check_wrong_is_caught, cut, ragged_records
from samestep.data.examples import Example
from samestep.data.records import Records
from samestep.engine.terms import Objective
from samestep.losses.distillation import divergences
from samestep.objectives.distillation import Distillation, TopKDistillation

N, T, SHARE = 8, 2.0, 0.25


def log_softmax(model: Any, sequence: Example) -> Tensor:
    model.set_attn_implementation("sdpa")
    logits = model(input_ids=sequence.input_ids[None]).logits[0, :-1]
    return (logits[sequence.labels[1:] != -100] / T).log_softmax(-1)


def plain(kind: str, log_q: Tensor, log_p: Tensor) -> Tensor:
    if kind == "forward_kl":
        return kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    if kind == "reverse_kl":
        return kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    middle = ((log_p.exp() + log_q.exp()) / 2).log()
    both = [kl_div(middle, one, log_target=True, reduction="none") for one in (log_p, log_q)]
    return (both[0] + both[1]).sum(-1) / 2


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("normalize", ["token", "sequence"])
def test_every_split(kind: Any, normalize: Any) -> None:
    # The student is one without float32 norms, which round the sum of two terms' gradients.
    model, teacher = build("gpt2"), build("llama")
    teacher.get_output_embeddings().weight.data *= 20
    records = ragged_records(N, weighted=True)

    def truth(model: Any) -> Tensor:
        total, count = torch.zeros(()).double(), 0.0
        for sequence in records.sequences:
            with torch.no_grad():
                log_p = log_softmax(teacher, sequence)
            losses = plain(kind, log_softmax(model, sequence), log_p)
            targets = sequence.labels[1:][sequence.labels[1:] != -100]
            logits = model(input_ids=sequence.input_ids[None]).logits[0, :-1]
            nll = -logits[-len(targets) :].log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
            each = (1 - SHARE) * T**2 * losses + SHARE * nll
            each = each.mean() if normalize == "sequence" else each.sum()
            total = total + sequence.weight * each
            count += sequence.weight * (1 if normalize == "sequence" else len(losses))
        return total / count

    loss = Distillation(teacher, kind, temperature=T, nll_weight=SHARE, normalize=normalize)
    for sizes, padding in (([N], "right"), ([1], "none"), ([3, 2], "none")):
        cut(teacher, records, sizes, padding)  # the teacher's attention follows the layout
        check_all_splits(model, records, Objective(loss), truth, splits=[(sizes, padding)])
    if normalize == "token":
        cut(teacher, records, [N], "right")
        check_wrong_is_caught(model, records, Objective(loss), truth)


def test_neither_models_logits_are_whole() -> None:
    student = torch.randn(200, 8, requires_grad=True)
    teacher, heads = torch.randn(200, 6), [torch.randn(500, 8), torch.randn(500, 6)]
    with Largest() as seen:
        losses = divergences(
            student,
            teacher,
            student_logits=lambda states: states @ heads[0].t(),
            teacher_logits=lambda states: states @ heads[1].t(),
            kind="forward_kl",
            chunk=10,
        )
        losses.sum().backward()
    assert seen.elements <= 10 * 500
    assert losses.shape == (200,)
    assert bool((losses > 0).all())


def test_a_teacher_like_the_student_leaves_nothing_to_learn() -> None:
    model = build("llama")
    micros = cut(model, ragged_records(N), [N], "right")
    _, terms = samestep.backward(model, micros, Distillation(build("llama")))
    cut(model, ragged_records(N), [N], "right")
    assert abs(terms["divergence"]) < 1e-12
    assert V > terms["nll"] > 1


def taught(records: Any, teacher: Any, k: int) -> Records:
    """The records with the teacher's k likeliest tokens at the places of their targets."""
    examples = records.sequences
    ids, logps = torch.zeros(len(examples.ids), k), torch.zeros(len(examples.ids), k).double()
    teacher.set_attn_implementation("sdpa")
    for at, example in enumerate(examples):
        with torch.no_grad():
            log_p = teacher(input_ids=example.input_ids[None]).logits[0, :-1].log_softmax(-1)
        part = slice(int(examples.offsets[at]) + 1, int(examples.offsets[at + 1]))
        logps[part], ids[part] = log_p.topk(k)
    return Records(examples, token_fields={"top_ids": ids.int(), "top_logps": logps})


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_what_a_teacher_said_before(kind: Any) -> None:
    """All that it did not say counts as one more token."""
    model, teacher = build("gpt2"), build("llama")
    teacher.get_output_embeddings().weight.data *= 20
    records = taught(ragged_records(N, weighted=True), teacher, 5)

    def truth(model: Any) -> Tensor:
        total, count = torch.zeros(()).double(), 0.0
        for at, sequence in enumerate(records.sequences):
            model.set_attn_implementation("sdpa")
            chosen = sequence.labels[1:] != -100
            log_q = model(input_ids=sequence.input_ids[None]).logits[0, :-1].log_softmax(-1)[chosen]
            part = slice(*records.sequences.offsets[at : at + 2].tolist())
            ids, log_p = (
                records.token_fields[name][part][1:][chosen] for name in ("top_ids", "top_logps")
            )
            log_q = log_q.gather(1, ids.long())
            both = [
                torch.cat([one, (1 - one.exp().sum(1, keepdim=True)).log()], 1)
                for one in (log_q, log_p)
            ]
            total = total + sequence.weight * plain(kind, *both).sum()
            count += sequence.weight * len(log_q)
        return total / count

    objective = Objective(TopKDistillation(kind))
    check_all_splits(model, records, objective, truth)
    check_wrong_is_caught(model, records, objective, truth)


def test_everything_that_a_teacher_could_say_is_the_whole_divergence() -> None:
    model, teacher = build("gpt2"), build("llama")
    teacher.get_output_embeddings().weight.data *= 20
    records = ragged_records(N)
    for kind in ("forward_kl", "reverse_kl", "jensen_shannon"):
        found = []
        for k in (2, V - 1, V):
            micros = cut(model, taught(records, teacher, k), [3], "none")
            found.append(samestep.backward(model, micros, TopKDistillation(kind))[0])  # type: ignore[arg-type]
        micros = cut(model, records, [N], "right")
        cut(teacher, records, [N], "right")
        whole, _ = samestep.backward(model, micros, Distillation(teacher, kind))  # type: ignore[arg-type]
        assert found[0] < whole  # of less that is known
        assert found[1] == pytest.approx(whole, rel=1e-10)
        assert found[2] == pytest.approx(whole, rel=1e-10)
