"""Subjects for `samestep check`: LightningModules, run by Lightning's own Trainer.

    samestep check examples/check_lightning.py:MeanOfMeans
    samestep check examples/check_lightning.py:Sound

Automatic optimisation calls `training_step` for each micro-batch, divides the loss by
`accumulate_grad_batches`, propagates it, and steps once. Replace `Module` by your own.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

VOCABULARY = 50
Micro = dict[str, Tensor]


class Module(lightning.LightningModule):
    """As most are written: the mean loss of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(VOCABULARY, 16), nn.Tanh(), nn.Linear(16, VOCABULARY))

    def sums(self, batch: Micro) -> Tensor:
        """Summed cross entropy of the next token."""
        logits = self.net(batch["input_ids"])[:, :-1].flatten(0, 1)
        labels = batch["labels"][:, 1:].flatten()
        return functional.cross_entropy(logits, labels, reduction="sum")

    def training_step(self, batch: Micro, batch_idx: int) -> Tensor:
        """The mean over the batch's own targets."""
        del batch_idx
        return self.sums(batch) / targets(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Any; the auditor sees the gradients that it is given."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class CountingModule(Module):
    """The batch says how many targets its accumulation window has."""

    def training_step(self, batch: Micro, batch_idx: int) -> Tensor:
        """Lightning divides by the micro-batches of a window: undo that, divide by all targets."""
        del batch_idx
        return self.sums(batch) * self.trainer.accumulate_grad_batches / batch["window_targets"]


class MeanOfMeans:
    """The loop: Lightning's own, over one effective batch."""

    model: Any = Module
    examples = tuple(
        torch.arange(length) * 7 % VOCABULARY for length in (5, 17, 3, 9, 12, 4, 21, 7)
    )

    def collate(self, rows: list[Tensor]) -> Micro:
        """Pad on the right; padding is no target."""
        pad = nn.utils.rnn.pad_sequence
        labels = pad(rows, batch_first=True, padding_value=-100)
        return {"input_ids": pad(rows, batch_first=True), "labels": labels}

    def train(self, module: Module, micro_batches: list[Micro]) -> None:
        """One accumulation window of automatic optimisation."""
        with quiet():
            trainer = lightning.Trainer(
                accelerator="cpu",
                devices=1,
                max_epochs=1,
                accumulate_grad_batches=len(micro_batches),
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(module, DataLoader(micro_batches, batch_size=None))


class Sound(MeanOfMeans):
    """The targets of the whole window are counted before its first micro-batch."""

    model = CountingModule

    def train(self, module: Module, micro_batches: list[Micro]) -> None:
        """The same, of batches that carry the count."""
        count = torch.tensor(sum(map(targets, micro_batches)))
        super().train(module, [{**micro, "window_targets": count} for micro in micro_batches])


def targets(micro: Micro) -> int:
    """Labels that are predicted: after the shift, and not padding."""
    return int((micro["labels"][:, 1:] != -100).sum())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the advice that Lightning gives to every run."""
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logger.setLevel(before)
