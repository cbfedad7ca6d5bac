"""Own probe after linkedin/Liger-Kernel#1298 (r04): a penalty is optimised that is not reported.

Tokens: its inputs are integers. Features: the same loop on float features, as `torch.stack` in
`collate` makes them. Both should be told that the report is not what is optimised.
"""

import torch
from torch import nn
from torch.nn import functional


class Tokens:
    def model(self):
        return nn.Sequential(nn.Embedding(50, 12), nn.Tanh(), nn.Linear(12, 5))

    def examples(self):
        return [(torch.tensor(7 * at % 47 + 1), at % 5) for at in range(8)]

    def collate(self, rows):
        return {"x": torch.stack([x for x, _ in rows]), "y": torch.tensor([y for _, y in rows])}

    def step(self, model, micros):
        total, logged = sum(len(micro["y"]) for micro in micros), 0.0
        for micro in micros:
            loss = functional.cross_entropy(model(micro["x"]), micro["y"], reduction="sum") / total
            loss.backward()
            logged += loss.item()
        (0.1 * sum(weight.square().sum() for weight in model.parameters())).backward()
        return logged


class Features(Tokens):
    def model(self):
        return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 5))

    def examples(self):
        draw = torch.Generator().manual_seed(4)
        return [(torch.randn(6, generator=draw), at % 5) for at in range(8)]
