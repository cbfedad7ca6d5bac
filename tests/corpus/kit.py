"""What the families of the corpus share: a case, ragged data, a tiny model, its loss."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

V = 29


@dataclass(frozen=True)
class Case:
    """One subject with a known answer.

    Attributes:
        name: What a reader calls it.
        build: From a seed to the subject's names.
        cause: The seeded bug, or None of a sound subject.
        axis: Where the bug must show.
        also: Causes that the same bug may be given on other axes.
        axes: The axes to run; None: the default ones.
    """

    name: str
    build: Callable[[int], Mapping[str, Any]]
    cause: str | None = None
    axis: str = "micro-batch"
    also: tuple[str, ...] = ()
    axes: tuple[str, ...] | None = None


class Tiny(nn.Module):
    """A causal model without attention: a running sum of embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, 12)
        self.hidden = nn.Linear(12, 12)
        self.head = nn.Linear(12, V)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embed(ids)).cumsum(1)))


def lengths(seed: int) -> list[int]:
    """Different lengths for every seed; from seed 100 on also others than the smaller seeds'."""
    draw = torch.Generator().manual_seed(seed)
    number, shortest, longest = (8, 3, 22) if seed < 100 else (9 + seed % 3, 4, 41)
    order = torch.randperm(longest - shortest, generator=draw)[:number]
    return [shortest + int(one) for one in order]


def rows(seed: int) -> list[Tensor]:
    """Ragged token ids; none is 0, which pads."""
    draw = torch.Generator().manual_seed(seed + 1)
    return [torch.randint(1, V, (n,), generator=draw) for n in lengths(seed)]


def collate(examples: list[Tensor]) -> dict[str, Tensor]:
    """Padded on the right; every token has a label."""
    pad = nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(examples, batch_first=True),
        "labels": pad(examples, batch_first=True, padding_value=-100),
    }


def nll(model: nn.Module, micro: Mapping[str, Tensor], reduction: str = "sum") -> Tensor:
    """Next-token cross entropy."""
    logits, targets = model(micro["input_ids"])[:, :-1], micro["labels"][:, 1:]
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


def targets(micros: list[Any]) -> int:
    """Labels after the shift."""
    return sum(int((micro["labels"][:, 1:] != -100).sum()) for micro in micros)


def tokens(step: Callable[..., Any], **names: Any) -> Callable[[int], Mapping[str, Any]]:
    """A subject on ragged tokens with this step; names replace or add."""

    def build(seed: int) -> Mapping[str, Any]:
        base = {"model": Tiny, "examples": rows(seed), "collate": collate}
        return {**base, **({} if "train" in names else {"step": step}), **names}

    return build


def trained(train: Callable[..., Any], **names: Any) -> Callable[[int], Mapping[str, Any]]:
    """The same for a loop that updates."""
    return tokens(train, train=train, **names)
