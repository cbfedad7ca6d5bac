"""Loops of libraries that leave the loss to the user: with a mean, as in their guides."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from samestep.loops.units import SHIFTED_LABELS, count_units

WORDS = 50
Micro = dict[str, Tensor]


class _Loop:
    """What the loops share: a model, ragged rows, a collator."""

    def examples(self) -> list[Tensor]:
        """One effective batch, of different lengths."""
        return [torch.arange(length) * 7 % WORDS for length in (5, 17, 3, 9, 12, 4, 21, 7)]

    def collate(self, rows: list[Tensor]) -> Micro:
        """Pad on the right; padding is no target."""
        pad = nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(rows, batch_first=True),
            "labels": pad(rows, batch_first=True, padding_value=-100),
        }


class AccelerateLoop(_Loop):
    """``accelerator.accumulate``, as the guide of accelerate has it.

    Args:
        windows: Whether the micro-batches come from `samestep.windows`.
    """

    def __init__(self, *, windows: bool = False) -> None:
        self.windows = windows

    def model(self) -> nn.Module:
        """A bigram model."""
        return nn.Sequential(nn.Embedding(WORDS, 16), nn.Tanh(), nn.Linear(16, WORDS))

    def train(self, model: nn.Module, micro_batches: list[Micro]) -> None:
        """One effective batch."""
        from accelerate import Accelerator

        from samestep.loops.accelerate import windows

        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=len(micro_batches))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader: Any = torch.utils.data.DataLoader(cast(Any, micro_batches), batch_size=None)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        pairs: Any = ((micro, 1.0) for micro in loader)
        if self.windows:
            pairs = windows(loader, accelerator, unit=SHIFTED_LABELS)
        for micro, factor in pairs:
            with accelerator.accumulate(model):
                accelerator.backward(_mean_loss(model, micro) * factor)
                optimizer.step()
                optimizer.zero_grad()


class LightningLoop(_Loop):
    """A LightningModule under automatic optimisation, trained by Lightning's own Trainer.

    Args:
        exact: Whether the module is one of `samestep.loops.lightning.exact`.
    """

    def __init__(self, *, exact: bool = False) -> None:
        self.exact = exact

    def model(self) -> nn.Module:
        """The module."""
        from samestep.loops.lightning import exact

        module = _lightning_module()
        return exact(module, unit=SHIFTED_LABELS) if self.exact else module

    def train(self, module: Any, micro_batches: list[Micro]) -> None:
        """One effective batch."""
        from lightning import Trainer

        with _quiet():
            trainer = Trainer(
                max_epochs=1,
                accelerator="cpu",
                accumulate_grad_batches=len(micro_batches),
                logger=False,
                barebones=True,
            )
            loader: Any = torch.utils.data.DataLoader(cast(Any, micro_batches), batch_size=None)
            trainer.fit(module, loader)


def _mean_loss(model: nn.Module, micro: Micro) -> Tensor:
    logits: Tensor = model(micro["input_ids"])[:, :-1].flatten(0, 1)
    labels = micro["labels"][:, 1:].flatten()
    # A micro-batch without targets has no mean; its factor is 0.
    if not count_units(micro, SHIFTED_LABELS):
        return logits.sum() * 0.0
    return functional.cross_entropy(logits, labels)


def _lightning_module() -> nn.Module:
    from lightning import LightningModule

    class Module(LightningModule):
        """A bigram model."""

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Embedding(WORDS, 16), nn.Tanh(), nn.Linear(16, WORDS))

        def training_step(self, batch: Micro, batch_idx: int) -> Tensor:
            """Mean cross entropy of the next token."""
            del batch_idx
            return _mean_loss(self.net, batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            """Plain SGD."""
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Module()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes of Lightning on machines and missing workers."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
