"""A sound loop that does its backward inside optimizer.step(closure), as Lightning does.

samestep check check_closure_sound.py   -> should be exact
"""

import torch
from torch import nn
from torch.nn import functional as F

examples = [torch.arange(n) * 7 % 50 for n in (5, 17, 3, 9, 12, 4, 21, 7)]


def model():
    return nn.Sequential(nn.Embedding(50, 16), nn.Tanh(), nn.Linear(16, 50))


def collate(rows):
    pad = nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(rows, batch_first=True),
        "labels": pad(rows, batch_first=True, padding_value=-100),
    }


def train(model, micro_batches):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    total = sum((m["labels"][:, 1:] != -100).sum() for m in micro_batches)

    def backward(micro):
        logits = model(micro["input_ids"])[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, micro["labels"][:, 1:].flatten(), reduction="sum") / total
        loss.backward()
        return loss

    for micro in micro_batches[:-1]:  # accumulation: no step
        backward(micro)
    optimizer.step(lambda: backward(micro_batches[-1]))  # the last one inside the closure
    optimizer.zero_grad()
