"""What a run computes once about its data, such as what a reference model says of it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from samestep.data.records import Records
from samestep.train.batches import MicroBatches


@torch.no_grad()
def annotated(
    model: nn.Module,
    records: Records,
    micro_batches: MicroBatches,
    annotate: Callable[[nn.Module, Mapping[str, Any]], dict[str, Tensor]],
) -> Records:
    """The records with the fields that a function finds for them.

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
    found: dict[str, list[Tensor]] = {}
    training = model.training
    model.eval()
    for micro in micro_batches.of(range(len(records)), 0):
        # Not every objective has all of a record's sequences in the micro-batch itself.
        order += [place[row] for row in micro["example_ids"].tolist() if row in place]
        for name, values in annotate(model, micro).items():
            found.setdefault(name, []).append(values.cpu())
    model.train(training)
    back = torch.tensor(order).argsort()
    return records.with_fields({name: torch.cat(parts)[back] for name, parts in found.items()})
