"""Loops that cannot be run in float64 through and through, and gradients added up in bfloat16."""

from typing import Any

import torch
from kit import Case, V, collate, nll, targets, tokens
from token_loops import count_first, mean_of_means, sum_of_means
from torch import Tensor, nn


class Narrow(nn.Module):
    """Computes its hidden states in a type of its own, or refuses float64."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype
        self.embed, self.hidden = nn.Embedding(V, 24), nn.Linear(24, 24)
        self.head = nn.Linear(24, V)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        if self.dtype is None:
            if hidden.dtype == torch.float64:
                raise TypeError("float64 is not supported")
            return self.head(torch.tanh(self.hidden(hidden).cumsum(1) / 4))
        weight, bias = self.hidden.weight.to(self.dtype), self.hidden.bias.to(self.dtype)
        mixed = nn.functional.linear(hidden.to(self.dtype), weight, bias).to(hidden.dtype)
        return self.head(torch.tanh(mixed.cumsum(1) / 4))


def narrow(dtype: torch.dtype | None, step: Any) -> Any:
    return tokens(step, model=lambda: Narrow(dtype))


def autocast(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nll(model, micro) / targets(micros)
        loss.backward()


def float32_sums(model: nn.Module, micros: list[Any]) -> None:
    """Keeps the sum in float32 whatever the weights' type, and hands it over at the end."""
    sums = [torch.zeros(weight.shape) for weight in model.parameters()]
    for micro in micros:
        (nll(model, micro) / targets(micros)).backward()
        for total, weight in zip(sums, model.parameters(), strict=True):
            total += weight.grad.float()
            weight.grad = None
    for total, weight in zip(sums, model.parameters(), strict=True):
        weight.grad = total.to(weight.dtype)


LOW = ("low-precision",)

CASES = [
    Case("float32 inside", narrow(torch.float32, count_first)),
    Case("bfloat16 inside", narrow(torch.bfloat16, count_first)),
    Case("float16 inside", narrow(torch.float16, count_first)),
    Case("float32 only", narrow(None, count_first)),
    Case("autocast", tokens(autocast, collate=collate)),
    Case("sums in float32", tokens(float32_sums), axes=LOW),
    Case("float32 inside, mean of means", narrow(torch.float32, mean_of_means), "mean-of-means"),
    Case("bfloat16 inside, mean of means", narrow(torch.bfloat16, mean_of_means),
         "mean-of-means"),
    Case("bfloat16 inside, sum of means", narrow(torch.bfloat16, sum_of_means), "unscaled-sum"),
    Case("float32 only, mean of means", narrow(None, mean_of_means), "mean-of-means"),
    Case("sums in bfloat16", tokens(count_first), "accumulation-dtype", "low-precision",
         axes=LOW),
]  # fmt: skip
