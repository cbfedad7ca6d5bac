"""Attention over borders by GPU kernels: what they are asked for, checked by stand-ins on the CPU.

The stand-ins have the signatures of each version of PyTorch, refuse what those refuse, and compute
what their documentation says. The kernels themselves need a GPU: written for, not yet run.
"""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy

from samestep.kernels import packed_attention as packs
from samestep.kernels import varlen
from samestep.kernels.varlen import Pack
from samestep.models.activations import _policy

LENGTHS = [3, 1, 7]
BORDERS = torch.tensor([0, 3, 4, 11], dtype=torch.int32)


def kernel(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, window: tuple[int, int]
) -> Tensor:
    """Attention within each sequence, [length, heads, width], from the definition."""
    at, borders = torch.arange(len(query)), BORDERS.long()
    of = torch.bucketize(at, borders[1:], right=True)
    ahead = at[None] - at[:, None]
    mask = of[:, None] == of[None]
    mask &= (ahead <= window[1]) | (window[1] < 0)
    mask &= (-ahead <= window[0]) | (window[0] < 0)
    scores = torch.einsum("qhd,khd->hqk", query, key)
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    probs = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", probs, value)


def check(query: Tensor, key: Tensor, value: Tensor, *more: Any) -> None:
    """What FlashAttention demands."""
    assert query.shape[-1] == key.shape[-1] == value.shape[-1] <= 256
    assert query.shape[-1] % 8 == 0
    assert [len(one) for one in (query, key, value)] == [11] * 3
    assert torch.equal(more[0], BORDERS)
    assert torch.equal(more[1], BORDERS)
    assert more[2:] == (7, 7)


def of_2_10(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: Any, max_k: Any,
    is_causal: bool = False, return_aux: Any = None,
) -> Tensor:  # fmt: skip
    check(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
    assert query.shape[1] == key.shape[1] == value.shape[1]
    return kernel(query, key, value, scale=None, window=(-1, 0 if is_causal else -1))


def of_2_11(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: Any, max_k: Any,
    *, return_aux: Any = None, scale: Any = None, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    check(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
    assert query.shape[1] == key.shape[1] == value.shape[1]
    return kernel(query, key, value, scale=scale, window=window_size)


def of_2_12(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: Any, max_k: Any,
    *, return_aux: Any = None, scale: Any = None, window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False, seqused_k: Any = None, block_table: Any = None,
    num_splits: Any = None,
) -> Tensor:  # fmt: skip
    check(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], 1) for one in (key, value))
    return kernel(query, key, value, scale=scale, window=window_size)


def efficient(
    query: Tensor, key: Tensor, value: Tensor, bias: None, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float,
    custom_mask_type: int, compute_log_sumexp: bool = False, *, scale: float | None = None,
    seqlen_k: None = None, window_size: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert query.shape[:3] == key.shape[:3] == value.shape[:3]
    assert compute_log_sumexp == query.requires_grad
    assert torch.equal(cu_seqlens_q, BORDERS)
    assert dropout_p == 0
    assert window_size is None
    for one in (query, key, value):  # of float32 it takes 4 already, but not of bfloat16
        assert one.is_contiguous()
        assert one.shape[-1] % 8 == 0, "no kernel found to launch!"
    causal = {0: -1, 1: 0}[custom_mask_type]
    out = kernel(query[0], key[0], value[0], scale=scale, window=(-1, causal))
    return out[None], out, out, out


VERSIONS = [of_2_10, of_2_11, of_2_12]


def pack(
    heads: int = 4, key_heads: int = 2, width: int = 8, value_width: int | None = None,
    *, dtype: torch.dtype = torch.float64, **options: Any,
) -> Pack:  # fmt: skip
    draw = torch.Generator().manual_seed(0)

    def states(number: int, wide: int) -> Tensor:
        made = torch.randn(1, number, sum(LENGTHS), wide, generator=draw, dtype=torch.float64)
        return made.to(dtype).requires_grad_()

    query, key = states(heads, width), states(key_heads, width)
    value = states(key_heads, value_width or width)
    asked = {"scale": 0.3, "causal": True, "window": None, **options}
    return Pack(query, key, value, BORDERS, 7, **asked)


def assert_same(actual: Tensor, one: Pack) -> None:
    """Values and gradients are those of each sequence by itself."""
    expected = packs._by_sequence(one)
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn_like(expected)
    inputs = (one.query, one.key, one.value)
    wanted = torch.autograd.grad(expected, inputs, upstream)
    for found, other in zip(torch.autograd.grad(actual, inputs, upstream), wanted, strict=True):
        torch.testing.assert_close(found, other)


@pytest.mark.parametrize("function", VERSIONS)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"key_heads": 4},
        {"key_heads": 1},
        {"width": 5},
        {"width": 24, "value_width": 16},
        {"width": 8, "value_width": 12},
        {"causal": False},
    ],
    ids=str,
)
def test_every_version_gives_the_same(function: Callable[..., Any], shape: dict[str, Any]) -> None:
    one = pack(**shape)
    assert_same(varlen.by_flash(function, one), one)


@pytest.mark.parametrize("function", [of_2_11, of_2_12])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 3, 6])
def test_windows(function: Callable[..., Any], window: int, causal: bool) -> None:
    one = pack(window=window, causal=causal)
    assert_same(varlen.by_flash(function, one), one)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"key_heads": 1},
        {"width": 300, "value_width": 5},
        {"width": 4, "value_width": 24},
        {"width": 1},
        {"width": 62},
        {"causal": False},
    ],
    ids=str,
)
def test_the_memory_efficient_kernel(shape: dict[str, Any]) -> None:
    one = pack(**shape)
    found = varlen.by_efficient(efficient, one)
    assert found.shape[-1] == one.value.shape[-1]
    assert_same(found, one)


def test_what_has_a_fitting_width_is_not_copied() -> None:
    """Padding by nothing would copy queries, keys and values at each layer."""
    one, seen = pack(heads=2, key_heads=2, width=16, value_width=8), []

    def recorded(*states: Any, **options: Any) -> Tensor:
        seen.extend(each.data_ptr() for each in states[:3])
        return of_2_12(*states, **options)

    varlen.by_flash(recorded_like(recorded), one)
    assert seen[:2] == [one.query.data_ptr(), one.key.data_ptr()]
    assert seen[2] != one.value.data_ptr()  # all must have one width here


def recorded_like(function: Any) -> Any:
    """With the signature that the adapter reads."""
    function.__signature__ = inspect.signature(of_2_12)
    return function


@pytest.mark.parametrize(
    ("asked", "function", "says"),
    [
        ({"dtype": torch.float64}, of_2_12, "takes float64; --precision mixed or float32"),
        ({"dtype": torch.float32, "window": 3}, of_2_12, "takes no float32; --precision mixed"),
        ({"width": 264, "window": 3}, of_2_12, "heads up to 256 wide, not 264"),
        ({"window": 3}, of_2_10, "from PyTorch 2.11 on"),
        ({"window": 3}, None, "from PyTorch 2.11 on"),
        ({"window": 3}, of_2_12, "compute capability 8.0"),
    ],
)
def test_a_slow_way_on_an_accelerator_is_told_once(
    asked: dict[str, Any], function: Any, says: str,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    class Layer(nn.Module):
        is_causal = True

    one = pack(**{"dtype": torch.bfloat16, **asked})
    monkeypatch.setattr(varlen, "flash_function", lambda: function)
    monkeypatch.setattr(varlen, "_has_flash", lambda device: "8.0" not in says)
    monkeypatch.setattr(varlen, "has_kernels", lambda query: True)
    monkeypatch.setattr(packs, "has_kernels", lambda query: True)
    monkeypatch.setattr(packs, "_told", set())
    options = {"cu_seq_lens_q": BORDERS, "max_length_q": 7, "sliding_window": one.window}
    states = one.query, one.key, one.value
    packs.packed_attention(Layer(), *states, None, **options)
    assert caplog.messages == []  # on a CPU that is the way
    monkeypatch.setattr(packs, "on_accelerator", lambda states: True)
    for _ in range(3):
        packs.packed_attention(Layer(), *states, None, **options)
    assert len(caplog.messages) == 1
    assert says in caplog.text
    monkeypatch.setattr(varlen, "has_kernels", lambda query: False)
    monkeypatch.setattr(packs, "has_kernels", lambda query: False)
    packs.packed_attention(Layer(), *states, None, **options)
    assert "those of CUDA devices" in caplog.messages[1]


def test_the_stand_ins_have_the_installed_signatures() -> None:
    flash = varlen.flash_function()
    assert flash is not None
    installed = inspect.signature(flash).parameters
    for version in VERSIONS:
        known = set(inspect.signature(version).parameters)
        if set(installed) == known:
            break
    else:
        pytest.fail(f"a new varlen_attn: {list(installed)}")
    schema = torch.ops.aten._efficient_attention_forward.default._schema
    names = list(inspect.signature(efficient).parameters)
    assert [argument.name for argument in schema.arguments] == names


@pytest.mark.parametrize(
    ("function", "asked", "taken"),
    [
        (of_2_10, {}, True),
        (of_2_10, {"window": 3}, False),
        (of_2_11, {"window": 3}, True),
        (of_2_12, {"width": 256}, True),
        (of_2_12, {"width": 264}, False),
        (of_2_12, {"width": 64, "value_width": 264}, False),
        (of_2_12, {"dtype": torch.float16}, True),
        (of_2_12, {"dtype": torch.float32}, False),
        (of_2_12, {"dtype": torch.float64}, False),
    ],
)
def test_what_flash_attention_takes(
    function: Callable[..., Any], asked: dict[str, Any], taken: bool
) -> None:
    assert varlen.takes(function, pack(**{"dtype": torch.bfloat16, **asked})) == taken


@pytest.mark.parametrize("function", [None, *VERSIONS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("width", [8, 264])
@pytest.mark.parametrize("recent", [True, False])
def test_every_pack_has_a_way(
    monkeypatch: pytest.MonkeyPatch,
    function: Callable[..., Any] | None,
    dtype: torch.dtype,
    window: int | None,
    width: int,
    recent: bool,
) -> None:
    """None means sequence by sequence; nothing is refused, and float64 never loses digits."""
    monkeypatch.setattr(varlen, "flash_function", lambda: function)
    monkeypatch.setattr(varlen, "_has_flash", lambda device: recent)
    monkeypatch.setattr(varlen, "by_flash", lambda function, pack: "flash")
    monkeypatch.setattr(varlen, "by_efficient", lambda function, pack: "efficient")
    way = varlen.attend(pack(width=width, dtype=dtype, window=window))
    if dtype == torch.float64:
        assert way is None
    elif dtype == torch.bfloat16 and width == 8 and window is None and function and recent:
        assert way == "flash"
    elif window is None:
        assert way == "efficient"
    else:
        assert way in (None, "flash")


def test_the_real_kernel_has_these_shapes() -> None:
    """The installed operator on tensors without memory."""
    flash = varlen.flash_function()
    assert flash is not None
    one = pack(dtype=torch.bfloat16, width=20, value_width=12)
    meta = Pack(
        *(one_.detach().to("meta") for one_ in (one.query, one.key, one.value, one.borders)),
        7,
        0.3,
        True,
        3,
    )
    assert varlen.by_flash(flash, meta).shape == (1, 11, 4, 12)


def test_selective_checkpointing_keeps_its_results() -> None:
    assert varlen.flash_function() is not None  # defines the operator
    for operation in (
        torch.ops.torch_attn._varlen_attn.default,
        torch.ops.aten._efficient_attention_forward.default,
    ):
        assert _policy(None, operation) == CheckpointPolicy.MUST_SAVE


def test_autocast_reaches_attention_over_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Layer(nn.Module):
        is_causal = True

    one = pack(dtype=torch.float32)
    states = [one.query, one.key, one.value.bfloat16()]  # as rotations leave them
    borders = {"cu_seq_lens_q": BORDERS, "max_length_q": 7}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = packs.packed_attention(Layer(), *states, None, **borders)[0]
    assert out.dtype == torch.bfloat16
