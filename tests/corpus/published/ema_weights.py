"""SWivid/F5-TTS#631: the average of the weights is updated at every micro-batch.

Bad: what is saved (`average`) depends on the accumulation; the gradient does not. Fixed: once.
"""

import torch
from torch import nn
from torch.nn import functional

LENGTHS = (5, 17, 3, 9, 12, 4, 21, 7)


class Averaged(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(50, 12), nn.Tanh(), nn.Linear(12, 50))
        self.average = nn.Sequential(nn.Embedding(50, 12), nn.Tanh(), nn.Linear(12, 50))
        self.average.requires_grad_(False)

    def follow(self):
        with torch.no_grad():
            for one, other in zip(self.average.parameters(), self.body.parameters(), strict=False):
                one.lerp_(other, 0.1)


class Bad:
    model = Averaged
    each_time = True

    def examples(self):
        return [(torch.arange(n) * 7 + 3 * n) % 47 + 1 for n in LENGTHS]

    def collate(self, rows):
        pad = nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(rows, batch_first=True),
            "labels": pad(rows, batch_first=True, padding_value=-100),
        }

    def train(self, model, micros):
        optimizer = torch.optim.AdamW(model.body.parameters(), lr=0.05)
        total = sum((micro["labels"][:, 1:] != -100).sum() for micro in micros)
        for at, micro in enumerate(micros):
            logits = model.body(micro["input_ids"])[:, :-1].flatten(0, 1)
            loss = (
                functional.cross_entropy(logits, micro["labels"][:, 1:].flatten(), reduction="sum")
                / total
            )
            loss.backward()
            last = at == len(micros) - 1
            if last:
                optimizer.step()
            if self.each_time or last:
                model.follow()


class Fixed(Bad):
    each_time = False
