"""Attention over packs against plain attention of each sequence by itself."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from samestep.errors import ConfigError
from samestep.kernels import packed_attention as packs
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


def low_precision_pack(lengths: list[int]) -> tuple[list[Tensor], dict[str, Any]]:
    """Queries and keys in float32, as rotations leave them, values as a layer gives them."""
    torch.manual_seed(0)
    found = [torch.randn(1, heads, sum(lengths), 8) for heads in (4, 2, 2)]
    found[2] = found[2].bfloat16()
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    more = {"cu_seq_lens_q": borders, "max_length_q": max(lengths)}
    return [one.requires_grad_() for one in found], more


def test_short_sequences_attend_in_float32_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which type that is hangs on the sequence alone, not on what stands beside it."""
    types = {}

    def noted(query: Tensor, *others: Tensor, **options: Any) -> Tensor:
        assert not torch.is_autocast_enabled("cpu"), "it would cast them back"
        types[query.shape[2]] = {one.dtype for one in (query, *others)}
        return scaled_dot_product_attention(query, *others, **options)

    monkeypatch.setattr(packs, "scaled_dot_product_attention", noted)
    inputs, borders = low_precision_pack([255, 5, 256])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = packed_attention(Layer(), *inputs, None, **borders)[0]
    assert out.dtype == torch.bfloat16
    assert types == {255: {torch.float32}, 5: {torch.float32}, 256: {torch.bfloat16}}


def test_low_precision_is_no_further_from_float64_than_pytorchs_own() -> None:
    lengths = [40, 7, 90]
    inputs, borders = low_precision_pack(lengths)
    upstream = torch.randn(1, sum(lengths), 4, 8).bfloat16()

    def found(dtype: torch.dtype) -> list[Tensor]:
        """Attention of each sequence by PyTorch, and its gradients."""
        parts = zip(*(one.to(dtype).split(lengths, 2) for one in inputs), strict=True)
        outs = [scaled_dot_product_attention(*p, is_causal=True, enable_gqa=True) for p in parts]
        out = torch.cat([one.transpose(1, 2) for one in outs], 1)
        return [out, *torch.autograd.grad(out, inputs, upstream.to(dtype))]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = packed_attention(Layer(), *inputs, None, **borders)[0]
    ours = [out, *torch.autograd.grad(out, inputs, upstream)]
    for exact, plain_one, one in zip(
        found(torch.float64), found(torch.bfloat16), ours, strict=True
    ):
        error, plain_error = ((other.double() - exact).norm() for other in (one, plain_one))
        assert error <= plain_error
        assert error > 0
