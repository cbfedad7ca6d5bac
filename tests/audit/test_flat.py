"""Batches of rows without borders: several of each example (points, boxes), one after another."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from samestep.audit.adapters.batches import locate_examples, mask_targets
from samestep.audit.check import check
from samestep.errors import CheckError

NODES = ((5, 2), (12, 7), (3, 1), (9, 4), (6, 5), (14, 3), (4, 2), (8, 1))
"""Of each example, and how many of them are marked."""


class Graphs:
    """All nodes have one loss, marked ones another; either is a mean over its own nodes."""

    whole = False

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(11)
        self.examples = [
            (torch.randn(n, 3, generator=draw), (torch.arange(n) < marked).double())
            for n, marked in NODES
        ]

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))

    def collate(self, examples: list[Any]) -> dict[str, Tensor]:
        nodes, marked = zip(*examples, strict=True)
        return {"nodes": torch.cat(nodes), "marked": torch.cat(marked)}

    def states(self, model: nn.Module, nodes: Tensor) -> Tensor:
        return model(nodes)

    def step(self, model: nn.Module, micros: list[Any]) -> None:
        for micro in micros:
            of = micros if self.whole else [micro]
            nodes = sum(len(each["nodes"]) for each in of)
            marked = sum(each["marked"].sum() for each in of)
            states = self.states(model, micro["nodes"])
            loss = states[:, 0].square().sum() / nodes
            loss = loss + ((states[:, 1] - 1).square() * micro["marked"]).sum() / marked
            (loss / (1 if self.whole else len(micros))).backward()


class Whole(Graphs):
    whole = True


class Centred(Graphs):
    """States are taken from the mean of the micro-batch's nodes."""

    whole = True

    def states(self, model: nn.Module, nodes: Tensor) -> Tensor:
        states = model(nodes)
        return states - states.mean(0)


class ByNodes(Graphs):
    """Means over graphs, weighted by nodes; no node is padding."""

    def step(self, model: nn.Module, micros: list[Any]) -> None:
        nodes = sum(len(micro["nodes"]) for micro in micros)
        for micro in micros:
            begins = micro["marked"].diff(prepend=torch.zeros(1)) > 0  # marked nodes come first
            graphs = begins.sum()
            mean = model(micro["nodes"]).square().sum() / graphs
            (mean * len(micro["nodes"]) / nodes).backward()


@pytest.mark.parametrize(
    ("graphs", "cause"),
    [
        (Graphs, "mean-of-means"),
        (Centred, "batch-coupled-term"),
        (ByNodes, "example-weighted"),
        (Whole, None),
    ],
)
def test_rows_without_borders_are_told_apart(graphs: type[Graphs], cause: str | None) -> None:
    assert check(graphs, axes=["micro-batch"]).axes[0].cause == cause


def test_examples_of_several_rows_are_located() -> None:
    batch = {"nodes": torch.zeros(6, 2), "labels": torch.arange(6)}
    locations = locate_examples(batch, [None, None], rows=[2, 4])
    assert locations == [(slice(0, 2),), (slice(2, 6),)]
    assert mask_targets(batch, locations[1:])["labels"].tolist() == [0, 1] + [-100] * 4
    with pytest.raises(CheckError, match="several rows"):
        mask_targets({**batch, "labels": torch.arange(2)}, locations[1:])
    with pytest.raises(CheckError, match="cannot be told apart"):
        locate_examples(batch, [None, None], rows=[2, 3])
