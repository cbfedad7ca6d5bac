"""Subjects that refuse what a diagnosis tries: their fault is still named."""

from typing import Any

import torch
from torch import Tensor, nn

from samestep.audit.check import check


class AsLongAsItsRows(nn.Module):
    """Rows of tokens, none of them wider than its longest: more padding is refused."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(19, 6)
        self.head = nn.Linear(6, 19)

    def forward(self, ids: Tensor) -> Tensor:
        if not bool(ids[:, -1].any()):
            raise ValueError("a column of padding")
        return self.head(torch.tanh(self.embed(ids)))


def collate(rows: list[Tensor]) -> dict[str, Tensor]:
    pad = nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(rows, batch_first=True),
        "labels": pad(rows, batch_first=True, padding_value=-100),
    }


def step(model: nn.Module, micros: list[Any]) -> None:
    """All tokens of the window, and a mean over the micro-batch's own."""
    number = sum((micro["labels"] != -100).sum() for micro in micros)
    for micro in micros:
        logits, real = model(micro["input_ids"]), micro["labels"] != -100
        labels = micro["labels"][real]
        loss = nn.functional.cross_entropy(logits[real], labels, reduction="sum") / number
        (loss + 0.1 * logits[real].square().mean()).backward()


def test_a_subject_that_refuses_more_padding_is_diagnosed() -> None:
    draw = torch.Generator().manual_seed(2)
    rows = [torch.randint(1, 19, (n,), generator=draw) for n in (4, 11, 6, 3, 9, 5, 8, 7)]
    names = {"model": AsLongAsItsRows, "examples": rows, "collate": collate, "step": step}
    axis = check(names, axes=["micro-batch"]).axes[0]
    assert axis.cause == "second-term-per-micro-batch", axis.evidence
