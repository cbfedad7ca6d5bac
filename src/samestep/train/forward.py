"""Forwards of training outside of the step's own: keyed dropout, fields computed once, bad rows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from samestep.data.records import Records
from samestep.engine.counts import count_units
from samestep.engine.modes import eval_mode
from samestep.engine.oom import describe_rows
from samestep.engine.terms import Counter, LossFn, LossResult, Objective, term_tensors
from samestep.engine.two_pass import TwoPass
from samestep.models.dropout import key_dropout
from samestep.models.outputs import without_cache
from samestep.train.micro_batches import MicroBatches

_ROWS_NAMED = 10
"""How many rows that are not finite are named."""


def with_context(
    loss_fn: LossFn, context: Callable[[Any, Any], AbstractContextManager[None]]
) -> LossFn:
    """A loss of which each call runs inside a context.

    Args:
        loss_fn: The loss.
        context: Makes the context of a call from its model and micro-batch.

    Returns:
        A loss; declared by `samestep.TwoPass` if the first one is.
    """

    def inside(model: Any, micro: Any) -> LossResult:
        with context(model, micro):
            return loss_fn(model, micro)

    return TwoPass(inside) if isinstance(loss_fn, TwoPass) else inside


def without_caches(objective: Objective) -> Objective:
    """An objective of the user's own, whose forwards keep no keys and values for a next token.

    Args:
        objective: Its losses may run the model as they like.

    Returns:
        The same objective, inside `samestep.models.outputs.without_cache`.
    """
    annotate = objective.annotate

    def annotated(model: nn.Module, micro: Mapping[str, Any]) -> dict[str, Tensor]:
        assert annotate is not None
        with without_cache(model):
            return annotate(model, micro)

    return replace(
        objective,
        loss_fn=with_context(objective.loss_fn, lambda model, _: without_cache(model)),
        annotate=None if annotate is None else annotated,
    )


def with_keyed_dropout(loss_fn: LossFn, *, seed: int, step: int) -> LossFn:
    """The loss, with the model's dropout keyed to (seed, step, example) before each forward.

    Args:
        loss_fn: The loss.
        seed: The run's seed.
        step: The step's number.

    Returns:
        A loss; declared by `samestep.TwoPass` if the first one is.
    """

    @contextmanager
    def keyed(model: Any, micro: Any) -> Iterator[None]:
        key_dropout(model, micro, seed=seed, step=step)
        yield

    return with_context(loss_fn, keyed)


@torch.no_grad()
def precompute_fields(
    model: nn.Module,
    records: Records,
    *,
    micro_batches: MicroBatches,
    annotate: Callable[[nn.Module, Mapping[str, Any]], dict[str, Tensor]],
) -> Records:
    """The records with further fields, such as log-probabilities of a reference model.

    Args:
        model: Put in eval mode meanwhile.
        records: All of them are run once, on every rank.
        micro_batches: Cuts them.
        annotate: As `samestep.engine.terms.Objective.annotate`.

    Returns:
        The records with the further fields, which are not part of their fingerprint.
    """
    place = {row: at for at, row in enumerate(records.first_rows())}
    order: list[int] = []
    fields: dict[str, list[Tensor]] = {}
    with eval_mode(model):
        for micro_batch in micro_batches.batches(range(len(records)), 0):
            # Not every objective has all of a record's sequences in the micro-batch itself.
            rows = micro_batch["example_ids"].tolist()
            order += [place[row] for row in rows if row in place]
            for name, values in annotate(model, micro_batch).items():
                fields.setdefault(name, []).append(values.cpu())
    back = torch.tensor(order).argsort()
    return records.with_fields({name: torch.cat(parts)[back] for name, parts in fields.items()})


def find_nonfinite_rows(
    model: nn.Module,
    micro_batch_of: Callable[[int], dict[str, Any]],
    *,
    indices: Sequence[int],
    loss_fn: LossFn,
    counters: Mapping[str, Counter],
    name_of: Callable[[int], str] = lambda index: "",
) -> list[str]:
    """The rows whose loss or gradient is not finite, each run by itself.

    Args:
        model: With replicated weights; its gradients are cleared.
        micro_batch_of: The micro-batch of one record.
        indices: The records of this rank.
        loss_fn: The loss.
        counters: As for the step.
        name_of: What a record is called, where that is not the rows of its sequences.

    Returns:
        A line a record: its rows, and what is not finite. Empty if none is bad by itself, as when
        an overflow needs all of them together.
    """
    lines = []
    for index in indices:
        micro = micro_batch_of(index)
        if not any(count_units([micro], counters).values()):
            continue
        problem = _nonfinite_part(model, micro, loss_fn=loss_fn)
        if problem:
            lines.append(f"{name_of(index) or describe_rows(micro).strip(' ()')}: {problem}")
    return lines[:_ROWS_NAMED]


def _nonfinite_part(model: nn.Module, micro: dict[str, Any], *, loss_fn: LossFn) -> str:
    """What is not finite about one record: a term, or the gradient; empty if nothing is."""
    model.zero_grad()
    tensors = term_tensors(loss_fn(model, micro))
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            return f"{name} is {float(tensor.detach().sum())}"
    with_graph = [tensor.sum() for tensor in tensors.values() if tensor.requires_grad]
    if with_graph:
        torch.stack([tensor.double() for tensor in with_graph]).sum().backward()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
    model.zero_grad()
    return "" if finite else "its gradient is not finite"
