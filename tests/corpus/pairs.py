"""What the families of pairs share: each bug beside its sound twin, and models of other kinds."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from kit import Case, V, lengths
from torch import Tensor, nn

Build = Callable[[int], Mapping[str, Any]]


def pair(
    name: str,
    make: Callable[[bool], Build],
    cause: str,
    axis: str = "micro-batch",
    **more: Any,
) -> list[Case]:
    """A bug, and the same loop set right; `make` is told which."""
    axes = None if axis == "dropout" else more.get("axes")
    return [
        Case(name, make(False), cause, axis, **more),
        Case(f"{name}: set right", make(True), axes=axes),
    ]


class Recurrent(nn.Module):
    """Reads from left to right."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.read = nn.Embedding(V, 10), nn.GRU(10, 14, batch_first=True)
        self.head = nn.Linear(14, V)

    def states(self, ids: Tensor) -> Tensor:
        return self.read(self.embed(ids))[0]

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.states(ids))


class Convolved(nn.Module):
    """Sees the two tokens before each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.near = nn.Embedding(V, 12), nn.Conv1d(12, 16, 3)
        self.head = nn.Linear(16, V)

    def states(self, ids: Tensor) -> Tensor:
        before = nn.functional.pad(self.embed(ids).transpose(1, 2), (2, 0))
        return torch.nn.functional.silu(self.near(before)).transpose(1, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.states(ids))


class Vectors(nn.Module):
    """A few numbers in, a few out."""

    def __init__(self, outputs: int = 4) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(7, 11), nn.Linear(11, outputs)

    def states(self, x: Tensor) -> Tensor:
        return torch.nn.functional.softplus(self.one(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.states(x))


def vectors(seed: int) -> list[dict[str, Any]]:
    """Points, each with a class, a value, a weight and a group."""
    number = len(lengths(seed))
    draw = torch.Generator().manual_seed(seed + 11)
    return [
        {
            "x": torch.randn(7, generator=draw),
            "kind": int(torch.randint(0, 4, (), generator=draw)),
            "value": float(torch.randn((), generator=draw)),
            "weight": 0.25 + (at * 5 % 13) / 6,
            "group": int(at % 3 == 0),
        }
        for at in range(number)
    ]


def stacked(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {
        key: torch.stack([one[key] for one in examples])
        if key == "x"
        else torch.tensor([one[key] for one in examples])
        for key in examples[0]
    }


def on_vectors(step: Callable[..., Any], **names: Any) -> Build:
    """A subject on vectors; ``train=`` replaces the step."""

    def build(seed: int) -> Mapping[str, Any]:
        base = {"model": Vectors, "examples": vectors(seed), "collate": stacked}
        return {**base, **({} if "train" in names else {"step": step}), **names}

    return build


def points(micros: list[Any]) -> int:
    return sum(len(micro["x"]) for micro in micros)
