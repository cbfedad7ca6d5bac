"""Faults of some weights only, the others accumulate as they should.

First: AMD-AGI/Primus#1046, the head keeps the first micro-batch's gradient alone. Frozen:
paiml/entrenar#264, the head is left out as soon as there is accumulation. Fixed: neither.
"""

import torch
from torch import nn
from torch.nn import functional

LENGTHS = (5, 17, 3, 9, 12, 4, 21, 7)


class Fixed:
    def model(self):
        return nn.Sequential(nn.Embedding(50, 12), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 50))

    def examples(self):
        return [(torch.arange(n) * 7 + 3 * n) % 47 + 1 for n in LENGTHS]

    def collate(self, rows):
        pad = nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(rows, batch_first=True),
            "labels": pad(rows, batch_first=True, padding_value=-100),
        }

    def after(self, weight, number, of):
        """After the backward of a micro-batch."""

    def step(self, model, micros):
        total = sum((micro["labels"][:, 1:] != -100).sum() for micro in micros)
        for number, micro in enumerate(micros):
            logits = model(micro["input_ids"])[:, :-1].flatten(0, 1)
            (
                functional.cross_entropy(logits, micro["labels"][:, 1:].flatten(), reduction="sum")
                / total
            ).backward()
            self.after(model[3].weight, number, len(micros))


class First(Fixed):
    def after(self, weight, number, of):
        if not number:
            weight.kept = weight.grad.clone()
        weight.grad.copy_(weight.kept)


class Frozen(Fixed):
    def after(self, weight, number, of):
        if of > 1:
            weight.grad = None
