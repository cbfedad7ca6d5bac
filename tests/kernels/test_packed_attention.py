"""Attention over packs against plain attention of each sequence by itself."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from samestep.errors import ConfigError
from samestep.kernels.packed_attention import packed_attention

LENGTHS = [3, 1, 7]
BORDERS = torch.tensor([0, 3, 4, 11], dtype=torch.int32)


class Layer(nn.Module):
    is_causal = True


def states(heads: int) -> Tensor:
    return torch.randn(1, heads, sum(LENGTHS), 4, dtype=torch.float64, requires_grad=True)


def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    borders = {"cu_seq_lens_q": BORDERS, "max_length_q": 7}
    return packed_attention(Layer(), query, key, value, None, **{**borders, **options})[0]


def plain(query: Tensor, key: Tensor, value: Tensor, *, window: int, causal: bool = True) -> Tensor:
    """Softmax over the whole pack under a mask written from the definition."""
    sequence = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
    at = torch.arange(sum(LENGTHS))
    mask = sequence[:, None] == sequence[None]
    if causal:
        mask &= at[None] <= at[:, None]
    mask &= (at[:, None] - at[None]).abs() < window
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = (query @ key.transpose(-1, -2) / 2).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [99, 7, 3, 1])
def test_values_and_gradients(key_heads: int, window: int) -> None:
    query, key, value = states(4), states(key_heads), states(key_heads)
    actual = attend(query, key, value, sliding_window=None if window == 99 else window)
    expected = plain(query, key, value, window=window)
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn_like(actual)
    for one, other in zip(
        torch.autograd.grad(actual, (query, key, value), upstream),
        torch.autograd.grad(expected, (query, key, value), upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("window", [99, 3, 1])
def test_without_causality_a_sequence_sees_what_follows_too(window: int) -> None:
    query, key, value = states(2), states(2), states(2)
    limit = None if window == 99 else window
    actual = attend(query, key, value, is_causal=False, sliding_window=limit)
    torch.testing.assert_close(actual, plain(query, key, value, window=window, causal=False))


def test_a_neighbour_is_never_seen() -> None:
    query, key, value = states(2), states(2), states(2)
    before = attend(query, key, value)[:, 3:4]
    poisoned = value.detach().clone()
    poisoned[:, :, :3] = torch.nan
    assert torch.equal(attend(query, key, poisoned)[:, 3:4], before)
    whole = scaled_dot_product_attention(query, key, poisoned, is_causal=True)
    assert bool(whole[:, :, 3:4].isnan().any())  # what a pack without borders would give


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cu_seq_lens_q": None}, "borders"),
        ({"softcap": 30.0}, "softcap"),
        ({"dropout": 0.1}, "dropout"),
    ],
)
def test_what_it_does_not_do_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attend(states(2), states(2), states(2), **options)
