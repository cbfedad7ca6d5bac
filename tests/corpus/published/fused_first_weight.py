"""linkedin/Liger-Kernel#1298: a fused loss takes the first token's weight for all in its backward.

Bad: the forward is right, the gradient of each micro-batch is scaled by its first token's weight.
Fixed: by each token's own.
"""

import torch
from torch import nn

LENGTHS = (5, 17, 3, 9, 12, 4, 21, 7)


class Fused(torch.autograd.Function):
    """Token losses of a linear head; gradients are made in the forward."""

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        log = (hidden @ weight.T).log_softmax(-1)
        ctx.save_for_backward(hidden, weight, log.exp(), targets)
        return -log.gather(1, targets[:, None])[:, 0]

    @staticmethod
    def backward(ctx, given):
        hidden, weight, p, targets = ctx.saved_tensors
        error = p.clone()
        error[torch.arange(len(targets)), targets] -= 1
        error = error * given[0]  # one number for all tokens
        return error @ weight, error.T @ hidden, None


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(50, 12), nn.Linear(12, 12), nn.Tanh())
        self.head = nn.Linear(12, 50, bias=False)


class Bad:
    model = Model

    def losses(self, hidden, weight, targets):
        return Fused.apply(hidden, weight, targets)

    def examples(self):
        return [(torch.arange(n) * 7 + 3 * n) % 47 + 1 for n in LENGTHS]

    def collate(self, rows):
        pad = nn.utils.rnn.pad_sequence
        weights = [1.0 + (row % 3) + 0.5 * (len(row) % 2) for row in rows]
        return {
            "input_ids": pad(rows, batch_first=True),
            "labels": pad(rows, batch_first=True, padding_value=-100),
            "weights": pad(weights, batch_first=True),
        }

    def step(self, model, micros):
        real = [micro["labels"][:, 1:] != -100 for micro in micros]
        total = sum(
            micro["weights"][:, 1:][at].sum() for micro, at in zip(micros, real, strict=False)
        )
        logged = 0.0
        for micro, at in zip(micros, real, strict=False):
            hidden = model.body(micro["input_ids"])[:, :-1][at]
            losses = self.losses(hidden, model.head.weight, micro["labels"][:, 1:][at])
            loss = (losses * micro["weights"][:, 1:][at]).sum() / total
            loss.backward()
            logged += loss.item()
        return logged


class Fixed(Bad):
    def losses(self, hidden, weight, targets):
        return nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none")
