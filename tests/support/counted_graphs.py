"""Compiled layers without a compiler: graphs are counted and run as they are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from samestep.kernels import packed_attention, varlen
from samestep.models import compiled
from samestep.train import compilation


class Graphs:
    """A backend that counts the graphs that it gets, and how often they run."""

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda out: out) -> None:
        self.made = self.runs = 0
        self._change = change

    def __call__(self, module: Any, _: Any) -> Any:
        self.made += 1

        def run(*inputs: Any) -> Any:
            self.runs += 1
            return tuple(
                self._change(out) if isinstance(out, Tensor) and out.requires_grad else out
                for out in module.forward(*inputs)
            )

        return run


def attention(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, _: Any, longest: int, __: int,
    *, scale: float, window_size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """`varlen_attn` of PyTorch 2.11, causal, from the definition."""
    assert window_size == (-1, 0)
    at = torch.arange(query.shape[0])
    of = torch.bucketize(at, borders.long(), right=True)
    seen = (of[:, None] == of[None]) & (at[None] <= at[:, None])
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


def count_graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    """Compiled layers are made by a backend that counts, and packs go to `attention`."""
    found = Graphs()
    monkeypatch.setattr(compiled, "BACKEND", found)
    attend_as_on_a_gpu(monkeypatch)
    return found


def attend_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs go the way that they go on a GPU, to a kernel in plain PyTorch."""
    for module in (packed_attention, compilation):
        monkeypatch.setattr(module, "has_kernels", lambda query: True)
    monkeypatch.setattr(varlen, "_has_flash", lambda device: True)
    monkeypatch.setattr(varlen, "takes", lambda function, pack: True)
    monkeypatch.setattr(varlen, "flash_function", lambda: attention)
    varlen._names(attention)
