"""samestep.step in a loop of your own: any model, any loss, micro-batches of any sizes.

    python examples/own_loop.py

The loss returns sums with units; the step counts the units over the whole effective batch and
divides once. Split the batch differently and the printed losses stay the same.
"""

import torch
from torch import Tensor, nn

import samestep

VOCABULARY, WIDTH = 50, 16


class NextToken(nn.Module):
    """The smallest language model: an embedding, one hidden layer, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Hidden states [rows, length, width] for ids [rows, length]."""
        return torch.tanh(self.hidden(self.embed(ids)))


def loss_fn(model: NextToken, micro_batch: dict[str, Tensor]) -> dict[str, samestep.Term]:
    """Two terms in two units: cross entropy over tokens, a small penalty over sequences."""
    hidden = model(micro_batch["input_ids"])
    targets = micro_batch["labels"][:, 1:]
    sums = samestep.linear_cross_entropy(hidden[:, :-1], model.head.weight, targets)
    return {
        "nll": samestep.Term(sums.loss, unit="token"),
        "accuracy": samestep.Term(sums.correct, unit="token", weight=0.0),
        "activity": samestep.Term(hidden[:, 0].square().sum(), unit="sequence", weight=0.01),
    }


def ragged_rows(number: int) -> list[Tensor]:
    """Rows of 4 to 30 tokens that count upwards, so that there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(0, VOCABULARY, (number,), generator=generator)
    lengths = torch.randint(4, 31, (number,), generator=generator)
    return [
        (start + torch.arange(int(length))) % VOCABULARY
        for start, length in zip(starts, lengths, strict=True)
    ]


def pad(rows: list[Tensor]) -> dict[str, Tensor]:
    """A micro-batch: padded ids, and labels that are -100 on the padding."""
    pad_sequence = nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad_sequence(rows, batch_first=True),
        "labels": pad_sequence(rows, batch_first=True, padding_value=-100),
    }


def train(micro_batch_size: int, steps: int = 20) -> list[float]:
    """The losses of a run whose effective batch of 32 is split into micro-batches of a size."""
    torch.manual_seed(0)
    model = NextToken()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = ragged_rows(32)
    losses = []
    for _ in range(steps):
        micro_batches = [
            pad(rows[start : start + micro_batch_size]) for start in range(0, 32, micro_batch_size)
        ]
        report = samestep.step(model, optimizer, micro_batches, loss_fn, max_grad_norm=1.0)
        losses.append(report.loss)
    return losses


if __name__ == "__main__":
    for size in (32, 8, 1):
        losses = train(size)
        print(f"{size:2} x {32 // size:2}: first loss {losses[0]:.6f}, last {losses[-1]:.6f}")
