"""A subject for `samestep check`: a Lightning module, run as automatic optimisation runs it.

    samestep check examples/check_lightning.py

Lightning calls `training_step` for each micro-batch, divides the loss by
`accumulate_grad_batches`, propagates it, and steps once. Written out as a loop of `train`, that
needs no Trainer and no installation; replace `Module` by your own LightningModule.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 50


class Module(nn.Module):
    """As a LightningModule: the loss of a batch, and the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(VOCABULARY, 16), nn.Tanh(), nn.Linear(16, VOCABULARY))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean cross entropy of the next token."""
        del batch_idx
        logits = self.net(batch["input_ids"])[:, :-1].flatten(0, 1)
        return functional.cross_entropy(logits, batch["labels"][:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Any; the auditor sees the gradients that it is given."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


model = Module
examples = [torch.arange(length) * 7 % VOCABULARY for length in (5, 17, 3, 9, 12, 4, 21, 7)]


def collate(rows: list[Tensor]) -> dict[str, Tensor]:
    """Pad on the right; padding is no target."""
    pad = nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(rows, batch_first=True),
        "labels": pad(rows, batch_first=True, padding_value=-100),
    }


def train(module: Module, micro_batches: list[dict[str, Tensor]]) -> None:
    """What Lightning does with one accumulated batch."""
    optimizer = module.configure_optimizers()
    for number, micro in enumerate(micro_batches):
        (module.training_step(micro, number) / len(micro_batches)).backward()
    optimizer.step()
    optimizer.zero_grad()
