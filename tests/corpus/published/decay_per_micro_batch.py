"""keras-team/keras#19990: decay of the weights is applied at every accumulated micro-batch.

Bad: weights shrink between the micro-batches of a step. Fixed: once, with the update.
"""

import torch
from torch import nn
from torch.nn import functional

LENGTHS = (5, 17, 3, 9, 12, 4, 21, 7)


class Bad:
    each_time = True

    def model(self):
        return nn.Sequential(nn.Embedding(50, 12), nn.Tanh(), nn.Linear(12, 50))

    def examples(self):
        return [(torch.arange(n) * 7 + 3 * n) % 47 + 1 for n in LENGTHS]

    def collate(self, rows):
        pad = nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(rows, batch_first=True),
            "labels": pad(rows, batch_first=True, padding_value=-100),
        }

    def train(self, model, micros):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        total = sum((micro["labels"][:, 1:] != -100).sum() for micro in micros)
        for at, micro in enumerate(micros):
            logits = model(micro["input_ids"])[:, :-1].flatten(0, 1)
            (
                functional.cross_entropy(logits, micro["labels"][:, 1:].flatten(), reduction="sum")
                / total
            ).backward()
            last = at == len(micros) - 1
            if self.each_time or last:
                with torch.no_grad():
                    for weight in model.parameters():
                        weight *= 1 - 0.1 * 0.05
            if last:
                optimizer.step()


class Fixed(Bad):
    each_time = False


class LastDecays(Bad):
    """The decay of every micro-batch comes at the end, when all gradients are there."""

    def train(self, model, micros):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        total = sum((micro["labels"][:, 1:] != -100).sum() for micro in micros)
        for micro in micros:
            logits = model(micro["input_ids"])[:, :-1].flatten(0, 1)
            (
                functional.cross_entropy(logits, micro["labels"][:, 1:].flatten(), reduction="sum")
                / total
            ).backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight *= (1 - 0.1 * 0.05) ** len(micros)
        optimizer.step()
