"""NVIDIA-NeMo/Automodel#2257 (also timoschick/pet#36): an unfinished window is never applied.

Bad: the optimizer steps only where a window is full; what is left is cleared later. Mean: the same
in a loop that averages over the window. Fixed: what is left is applied too.
"""

import torch
from torch import nn
from torch.nn import functional

LENGTHS = (6,) * 8


class Bad:
    flush = False

    def model(self):
        return nn.Sequential(nn.Embedding(50, 12), nn.Tanh(), nn.Linear(12, 50))

    def examples(self):
        return [(torch.arange(n) * (7 + at) + 3 * n) % 47 + 1 for at, n in enumerate(LENGTHS)]

    def collate(self, rows):
        pad = nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(rows, batch_first=True),
            "labels": pad(rows, batch_first=True, padding_value=-100),
        }

    def share(self, micro, micros, accumulation):
        return 1 / sum((one["labels"][:, 1:] != -100).sum() for one in micros)

    def train(self, model, micros, accumulation):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for at, micro in enumerate(micros):
            logits = model(micro["input_ids"])[:, :-1].flatten(0, 1)
            loss = functional.cross_entropy(
                logits, micro["labels"][:, 1:].flatten(), reduction="sum"
            )
            (loss * self.share(micro, micros, accumulation)).backward()
            full = (at + 1) % accumulation == 0
            if full or (self.flush and at == len(micros) - 1):
                optimizer.step()
                optimizer.zero_grad()


class Mean(Bad):
    def share(self, micro, micros, accumulation):
        return 1 / (micro["labels"][:, 1:] != -100).sum() / accumulation


class Fixed(Bad):
    flush = True
