"""Records of several kinds, cut into micro-batches; a plain reference; and a wrong step."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from cases import V, gradients, worst
from torch import Tensor, nn

import samestep
from samestep.data.collate import Padding, collate_records
from samestep.data.examples import Example, Examples
from samestep.data.records import Records
from samestep.engine.counts import count_units
from samestep.engine.terms import Objective, Term
from samestep.kernels import packed_attention

SPLITS: list[tuple[list[int], Padding]] = [
    ([64], "right"),
    ([1], "none"),
    ([2], "left"),
    ([3, 1, 4], "none"),
]
"""Sizes of micro-batches, and their layout."""


def ragged_records(
    number: int, *, width: int = 1, seed: int = 0, weighted: bool = False, **fields: Tensor
) -> Records:
    """Records of 4 to 20 tokens a sequence, with masked prompts; each has a target."""
    draw = torch.Generator().manual_seed(seed)

    def uniform(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    examples = []
    for record in range(number):
        weight = 0.5 + float(torch.rand((), generator=draw)) if weighted else 1.0
        prompt = torch.randint(2, V, (uniform(2, 9),), generator=draw)
        for _ in range(width):
            completion = torch.randint(2, V, (uniform(2, 12),), generator=draw)
            ids = torch.cat([prompt, completion])
            labels = ids.clone()
            labels[: len(prompt)] = -100
            examples.append(Example(ids, labels, weight, row=len(examples) + 7 * record))
    return Records(Examples.from_examples(examples), width=width, fields=fields)


def cut(
    model: Any, records: Sequence[Any], sizes: Sequence[int], padding: Padding
) -> list[dict[str, Any]]:
    """Micro-batches of these sizes, again and again, until the records end."""
    packed_attention.register()
    model.set_attn_implementation(packed_attention.NAME if padding == "none" else "sdpa")
    micros, at, turn = [], 0, 0
    while at < len(records):
        size = sizes[turn % len(sizes)]
        micros.append(collate_records(list(records)[at : at + size], padding=padding))
        at, turn = at + size, turn + 1
    return micros


def log_probs(model: Any, example: Example) -> Tensor:
    """Log likelihood of each target of one sequence by itself, from whole logits [targets]."""
    model.set_attn_implementation("sdpa")
    chosen = example.labels[1:] != -100
    logits = model(input_ids=example.input_ids[None]).logits[0, :-1][chosen]
    return logits.log_softmax(-1).gather(1, example.labels[1:][chosen][:, None]).squeeze(1)


def side_by_side(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Vectors of different lengths as [rows, longest] with zeros, and the mask of what is real."""
    padded = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    ones = nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True)
    return padded, ones.bool()


def check_all_splits(
    model: Any,
    records: Sequence[Any],
    objective: Objective,
    truth: Callable[[Any], Tensor],
    *,
    bound: float = 1e-12,
    splits: Sequence[tuple[list[int], Padding]] = SPLITS,
) -> dict[str, float]:
    """The objective and every weight's gradient are those of ``truth(model)`` under every split.

    The last split takes the records in reverse order. Returns the terms' values.
    """
    model.zero_grad()
    wanted_loss = truth(model)
    wanted_loss.backward()
    wanted = gradients(model)
    terms: dict[str, float] = {}
    for sizes, padding in splits:
        ordered = list(records)[::-1] if (sizes, padding) == splits[-1] else list(records)
        micros = cut(model, ordered, sizes, padding)
        loss, terms = samestep.backward(
            model, micros, objective.loss_fn, counters=objective.counters
        )
        assert abs(loss - wanted_loss.item()) <= bound * max(1.0, abs(wanted_loss.item()))
        assert worst(gradients(model), wanted) < bound, (sizes, padding)
    return terms


def mean_of_means(objective: Objective) -> Objective:
    """The same loss, divided by each micro-batch's own counts and averaged: the classic mistake."""

    def wrong(model: nn.Module, micro: Mapping[str, Any]) -> dict[str, Term]:
        own = count_units([micro], objective.counters)
        terms = {}
        for name, term in objective.loss_fn(model, micro).items():  # type: ignore[union-attr]
            if isinstance(term, samestep.Coupled):
                total = term.value(term.part)
            else:
                total = term.total / (own[term.unit] if isinstance(term.unit, str) else 1)
            terms[name] = Term(total, "micro-batch", term.weight)
        return terms

    return Objective(wrong, {**objective.counters, "micro-batch": lambda _: 1.0})


def check_wrong_is_caught(
    model: Any, records: Sequence[Any], objective: Objective, truth: Callable[[Any], Tensor]
) -> None:
    """The same comparison fails for a mean of means."""
    model.zero_grad()
    truth(model).backward()
    wanted = gradients(model)
    wrong = mean_of_means(objective)
    micros = cut(model, records, [3, 1, 4], "right")
    samestep.backward(model, micros, wrong.loss_fn, counters=wrong.counters)
    assert worst(gradients(model), wanted) > 1e-3
