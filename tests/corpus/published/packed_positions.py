"""hiyouga/LlamaFactory#7318: packs keep sequences apart by a mask, but positions run on.

Learned: with learned positions the pack is another model. Rotary: only differences of positions
matter, so running positions change nothing: sound. Fixed: learned, positions start again.
"""

import torch
from torch import nn
from torch.nn import functional

LENGTHS = (5, 17, 3, 9, 12, 4, 21, 7)


class Attends(nn.Module):
    def __init__(self, rotary):
        super().__init__()
        self.rotary = rotary
        self.embed, self.place = nn.Embedding(50, 12), nn.Embedding(128, 12)
        self.qkv, self.out, self.head = nn.Linear(12, 36), nn.Linear(12, 12), nn.Linear(12, 50)

    def turned(self, x, positions):
        angles = positions[..., None] / 10.0 ** torch.linspace(0, 1.5, 6)
        one, two = x.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([one * cos - two * sin, one * sin + two * cos], -1)

    def forward(self, ids, segments, positions):
        hidden = self.embed(ids)
        if not self.rotary:
            hidden = hidden + self.place(positions)
        q, k, v = self.qkv(hidden).chunk(3, -1)
        if self.rotary:
            q, k = self.turned(q, positions), self.turned(k, positions)
        same = (segments[:, :, None] == segments[:, None]).tril()
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=same)
        return self.head(hidden + self.out(mixed))


class Learned:
    rotary, restart = False, False

    def model(self):
        return Attends(self.rotary)

    def examples(self):
        return [(torch.arange(n) * 7 + 3 * n) % 47 + 1 for n in LENGTHS]

    def collate(self, rows):
        pad = nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(rows, batch_first=True),
            "labels": pad(rows, batch_first=True, padding_value=-100),
            "segments": pad([torch.ones_like(row) for row in rows], batch_first=True),
        }

    def pack(self, rows):
        labels = [torch.cat([torch.tensor([-100]), row[1:]]) for row in rows]
        segments = [torch.full_like(row, at + 1) for at, row in enumerate(rows)]
        return {
            "input_ids": torch.cat(rows)[None],
            "labels": torch.cat(labels)[None],
            "segments": torch.cat(segments)[None],
        }

    def positions(self, segments):
        if not self.restart:
            return torch.arange(segments.shape[1]).expand_as(segments)
        before = (segments[:, :, None] == segments[:, None]).tril()
        return before.sum(-1) - 1

    def step(self, model, micros):
        total = sum((micro["labels"][:, 1:] != -100).sum() for micro in micros)
        for micro in micros:
            segments = micro["segments"]
            logits = model(micro["input_ids"], segments, self.positions(segments))
            (
                functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1), micro["labels"][:, 1:].flatten(), reduction="sum"
                )
                / total
            ).backward()


class Rotary(Learned):
    rotary = True


class Fixed(Learned):
    restart = True
