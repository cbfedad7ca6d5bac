"""Subjects for `samestep check`: two Accelerate loops, one that averages means and the fixed one.

    samestep check examples/check_accelerate.py:MeanOfMeans
    samestep check examples/check_accelerate.py:Sound

`train` is called with micro-batches and a fresh model; what your own loop does between the first
micro-batch and the optimizer step goes there. Optimizers are observed, so use your own.
"""

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 50
Micro = dict[str, Tensor]


class MeanOfMeans:
    """The loop of the documentation: each loss is a mean over its own micro-batch."""

    def examples(self) -> list[Tensor]:
        """One effective batch. Different lengths: equal ones hide the bug."""
        return [torch.arange(length) * 7 % VOCABULARY for length in (5, 17, 3, 9, 12, 4, 21, 7)]

    def model(self) -> nn.Module:
        """The same architecture each time; the auditor sets the weights."""
        return nn.Sequential(nn.Embedding(VOCABULARY, 16), nn.Tanh(), nn.Linear(16, VOCABULARY))

    def collate(self, rows: list[Tensor]) -> Micro:
        """Pad on the right; padding is no target."""
        pad = nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(rows, batch_first=True),
            "labels": pad(rows, batch_first=True, padding_value=-100),
        }

    def loss(self, sums: Tensor, micro: Micro, micros: list[Micro]) -> Tensor:
        """What is propagated, of a micro-batch's summed loss. Accelerate divides by the number."""
        del micros
        return sums / targets(micro)

    def train(self, model: nn.Module, micro_batches: list[Micro]) -> None:
        """One effective batch."""
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=len(micro_batches))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer = accelerator.prepare(model, optimizer)
        for micro in micro_batches:
            with accelerator.accumulate(model):
                logits = model(micro["input_ids"])[:, :-1].flatten(0, 1)
                sums = functional.cross_entropy(
                    logits, micro["labels"][:, 1:].flatten(), reduction="sum"
                )
                accelerator.backward(self.loss(sums, micro, micro_batches))
                optimizer.step()
                optimizer.zero_grad()


class Sound(MeanOfMeans):
    """The targets of the whole accumulated batch are counted first."""

    def loss(self, sums: Tensor, micro: Micro, micros: list[Micro]) -> Tensor:
        """Undo Accelerate's division by the number of micro-batches, and divide by all targets."""
        del micro
        return sums * len(micros) / sum(targets(one) for one in micros)


def targets(micro: Micro) -> int:
    """Labels that are predicted: after the shift, and not padding."""
    return int((micro["labels"][:, 1:] != -100).sum())
