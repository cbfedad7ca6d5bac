"""tenstorrent/tt-metal#46548: scored once for the batch, advantages meet the wrong micro-batches.

Bad: every micro-batch takes the first advantages of the batch. Fixed: its own.
"""

import torch
from torch import nn

LENGTHS = (5, 17, 3, 9, 12, 4, 21, 7)


class Bad:
    own = False

    def model(self):
        return nn.Sequential(nn.Embedding(50, 12), nn.Tanh(), nn.Linear(12, 50))

    def examples(self):
        """A completion, and its score less the mean of its group, made before training."""
        scores = torch.tensor([0.0, 1.0, 0.5, 0.0, 1.0, 0.25, 0.0, 0.75]).view(2, 4)
        advantages = (scores - scores.mean(1, keepdim=True)).flatten().tolist()
        return [
            ((torch.arange(n) * 7 + 3 * n) % 47 + 1, one)
            for n, one in zip(LENGTHS, advantages, strict=False)
        ]

    def collate(self, rows):
        pad = nn.utils.rnn.pad_sequence
        ids = pad([row for row, _ in rows], batch_first=True)
        return {"input_ids": ids, "advantages": torch.tensor([one for _, one in rows])}

    def step(self, model, micros):
        everything = torch.cat([micro["advantages"] for micro in micros])
        at = 0
        for micro in micros:
            rows = len(micro["input_ids"])
            advantages = everything[at : at + rows] if self.own else everything[:rows]
            log = model(micro["input_ids"])[:, :-1].log_softmax(-1)
            log = log.gather(2, micro["input_ids"][:, 1:, None])[..., 0]
            real = micro["input_ids"][:, 1:] != 0
            means = (log * real).sum(1) / real.sum(1)
            (-(means * advantages).sum() / len(everything)).backward()
            at += rows


class Fixed(Bad):
    own = True
