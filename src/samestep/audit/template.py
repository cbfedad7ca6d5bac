"""A subject for `samestep check`: replace the four functions by your own loop.

    samestep check THIS_FILE.py

The auditor cuts the same examples into micro-batches in several ways and compares the gradients
that your loop leaves. Every run starts from the same weights.
"""

import torch
from torch import nn
from torch.nn import functional

VOCABULARY = 50


def model() -> nn.Module:
    """A small version of your model: how a loop normalises does not depend on the size."""
    return nn.Sequential(nn.Embedding(VOCABULARY, 16), nn.Linear(16, 16), nn.Tanh(),
                         nn.Linear(16, VOCABULARY))  # fmt: skip


# One effective batch, 8 examples or so. Different lengths: equal ones hide the bug.
examples = [torch.arange(length) * 7 % VOCABULARY for length in (5, 17, 3, 9, 12, 4, 21, 7)]


def collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Examples to a batch. With "labels" and "input_ids" [rows, length] more axes can be run."""
    pad = nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(rows, batch_first=True),
        "labels": pad(rows, batch_first=True, padding_value=-100),
    }


def step(model: nn.Module, micro_batches: list[dict[str, torch.Tensor]]) -> float:
    """Your loop up to the optimizer: leave the gradient in .grad, return the loss you log.

    This one averages means. The auditor will say so; the comments below fix it.
    """
    logged = 0.0
    # targets = sum((micro["labels"][:, 1:] != -100).sum() for micro in micro_batches)
    for micro in micro_batches:
        logits = model(micro["input_ids"])[:, :-1]
        loss = functional.cross_entropy(
            logits.flatten(0, 1), micro["labels"][:, 1:].flatten(), reduction="mean"
        )
        loss = loss / len(micro_batches)  # reduction="sum" above, and / targets here
        loss.backward()
        logged += loss.item()
    return logged


# Instead of step: train(model, micro_batches) that also updates. The gradient is captured when a
# torch optimizer steps; without one, it is how far the weights moved, so let them move plainly.
# Optional, each opens more axes:
#   evaluate(model, batches) -> loss, or {name: value}
#   pack(rows) -> a batch without padding
#   wrap(model) -> the model for several ranks, such as DistributedDataParallel. Then every run is
#     in a process group (gloo), of one process or of two, and each rank calls step or train with
#     its own micro-batches. wrap = None if your step calls torch.distributed by itself.
#   shard(indices, rank, world) -> the indices of one rank, as your sampler deals them
#   loader(examples, micro_batch_size) -> the micro-batches of one pass of your own loader (sampler,
#     grouping by length, token budget): batches, or lists of examples
#   knobs = {"chunk": (1, 64)}: sizes of your own that may not change the step. A name is a keyword
#     of one of your functions, a global of this file, or an attribute of the model
#   terms = ("nll", "aux"), with step(model, micro_batches, term=None)
#   step(model, micro_batches, accumulation) where accumulation is a full window's micro-batches
