"""datamol-io/graphium#391 (multi-task): a mean over the tasks that a micro-batch holds.

Bad: the mean of each task's own mean, over the tasks present, then over the accumulation. Fixed:
every task's sum over its count in the whole batch, over the tasks of the whole batch.
"""

import torch
from torch import nn
from torch.nn import functional

LENGTHS = (5, 17, 3, 9, 12, 4, 21, 7)
TASKS = (0, 0, 1, 0, 2, 1, 0, 2)


class Bad:
    def model(self):
        return nn.Sequential(nn.Embedding(50, 12), nn.Tanh(), nn.Linear(12, 50))

    def examples(self):
        return [
            ((torch.arange(n) * 7 + 3 * n) % 47 + 1, task)
            for n, task in zip(LENGTHS, TASKS, strict=False)
        ]

    def collate(self, rows):
        pad, ids = nn.utils.rnn.pad_sequence, [ids for ids, _ in rows]
        return {
            "input_ids": pad(ids, batch_first=True),
            "labels": pad(ids, batch_first=True, padding_value=-100),
            "task": torch.tensor([task for _, task in rows]),
        }

    def sums(self, model, micro):
        losses = functional.cross_entropy(
            model(micro["input_ids"])[:, :-1].transpose(1, 2),
            micro["labels"][:, 1:],
            reduction="none",
        ).sum(1)
        return {int(task): losses[micro["task"] == task].sum() for task in micro["task"].unique()}

    def counts(self, micros):
        found = {}
        for micro in micros:
            for labels, task in zip(micro["labels"][:, 1:], micro["task"].tolist(), strict=False):
                found[task] = found.get(task, 0) + (labels != -100).sum()
        return found

    def step(self, model, micros):
        for micro in micros:
            counts = self.counts([micro])
            loss = sum(one / counts[task] for task, one in self.sums(model, micro).items())
            (loss / len(counts) / len(micros)).backward()


class Fixed(Bad):
    def step(self, model, micros):
        counts = self.counts(micros)
        for micro in micros:
            loss = sum(one / counts[task] for task, one in self.sums(model, micro).items())
            (loss / len(counts)).backward()
