"""starVLA/starVLA#210 (also tracel-ai/burn#5695): the schedule moves at every micro-batch.

Bad: the same gradient is applied at another learning rate. Fixed: the schedule moves once.
"""

import torch
from torch import nn
from torch.nn import functional

LENGTHS = (5, 17, 3, 9, 12, 4, 21, 7)


class Bad:
    each_time = True
    optimizer = torch.optim.SGD

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
        optimizer = self.optimizer(model.parameters(), lr=0.1)
        warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 100)
        total = sum((micro["labels"][:, 1:] != -100).sum() for micro in micros)
        logged = 0.0
        for at, micro in enumerate(micros):
            logits = model(micro["input_ids"])[:, :-1].flatten(0, 1)
            loss = (
                functional.cross_entropy(logits, micro["labels"][:, 1:].flatten(), reduction="sum")
                / total
            )
            loss.backward()
            logged += loss.item()
            if at == len(micros) - 1:
                optimizer.step()
            if self.each_time or at == len(micros) - 1:
                warm.step()
        return {"loss": logged, "learning_rate": warm.get_last_lr()[0]}


class Fixed(Bad):
    each_time = False


class Silent(Bad):
    """The same fault, and the rate is not reported."""

    def train(self, model, micros):
        return super().train(model, micros)["loss"]
