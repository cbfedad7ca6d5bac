"""huggingface/trl#6006 (its review): what a teacher scored is shorter than what a student wrote.

Bad: losses are cut at the longest teacher of the micro-batch, all labels are counted. Fixed: every
row is cut at its own teacher's length, and what is left is counted.
"""

import torch
from torch import nn

LENGTHS = (5, 17, 3, 9, 12, 4, 21, 7)
SCORED = (5, 11, 3, 6, 12, 4, 9, 7)


class Bad:
    def model(self):
        return nn.Sequential(nn.Embedding(50, 12), nn.Tanh(), nn.Linear(12, 50))

    def examples(self):
        draw = torch.Generator().manual_seed(2)
        return [
            (
                (torch.arange(n) * 7 + 3 * n) % 47 + 1,
                torch.randn(50, generator=draw).log_softmax(-1).expand(n, 50),
                scored,
            )
            for n, scored in zip(LENGTHS, SCORED, strict=False)
        ]

    def collate(self, rows):
        pad = nn.utils.rnn.pad_sequence
        ids = [ids for ids, _, _ in rows]
        return {
            "input_ids": pad(ids, batch_first=True),
            "labels": pad(ids, batch_first=True, padding_value=-100),
            "teacher": pad([teacher for _, teacher, _ in rows], batch_first=True),
            "scored": torch.tensor([scored for _, _, scored in rows]),
        }

    def counted(self, micro):
        return micro["labels"] != -100

    def kept(self, micro):
        places = torch.arange(micro["labels"].shape[1])
        return self.counted(micro) & (places < micro["scored"].max())

    def step(self, model, micros):
        total = sum(self.counted(micro).sum() for micro in micros)
        for micro in micros:
            said = model(micro["input_ids"]).log_softmax(-1)
            divergence = (micro["teacher"].exp() * (micro["teacher"] - said)).sum(-1)
            ((divergence * self.kept(micro)).sum() / total).backward()


class Fixed(Bad):
    def counted(self, micro):
        places = torch.arange(micro["labels"].shape[1])
        return (micro["labels"] != -100) & (places < micro["scored"][:, None])

    kept = counted
