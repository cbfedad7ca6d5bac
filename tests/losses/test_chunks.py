"""Rows of logits at a time: on accelerators as many as memory allows, without being run there.

Tensors on the "meta" device have shapes and no memory: what a computation would take is counted.
"""

from collections.abc import Callable
from typing import Any
from weakref import finalize

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from samestep.kernels import gemm
from samestep.losses.cross_entropy import module_cross_entropy
from samestep.losses.distillation import divergences
from samestep.losses.likelihood import linear_likelihoods, module_likelihoods
from samestep.losses.linear_cross_entropy import linear_cross_entropy
from samestep.losses.logits import CHUNK_ROWS, HeadGradients, chunk_rows, columns_of

GB = 2**30
WIDTH = 64


class Allocated(TorchDispatchMode):
    """Counts the bytes of new storages that live at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, Tensor):
                self._known.add(given.untyped_storage()._cdata)
        result = function(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size

        def freed() -> None:
            self._known.discard(key)
            self.now -= size

        finalize(storage, freed)


@pytest.mark.parametrize("vocabulary", [32_000, 128_256, 262_144])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_accelerator_gets_as_many_rows_as_a_gigabyte_holds(
    vocabulary: int, dtype: torch.dtype
) -> None:
    states = torch.empty(20_000, WIDTH, dtype=dtype, device="meta")
    rows = chunk_rows(None, states, vocabulary=vocabulary)
    assert rows == min(CHUNK_ROWS, GB // (8 * vocabulary))
    assert chunk_rows(None, states, vocabulary=1000) == CHUNK_ROWS
    assert rows > 5 * chunk_rows(None, torch.empty(1, WIDTH), vocabulary=vocabulary)


def loss_of(name: str, vocabulary: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    made: dict[str, Any] = {"dtype": dtype, "device": "meta"}
    hidden = torch.empty(6000, WIDTH, **made, requires_grad=True)
    head = nn.Linear(WIDTH, vocabulary, bias=False, **made)
    targets = torch.empty(6000, dtype=torch.long, device="meta")
    positions = torch.empty(6000, dtype=torch.long, device="meta")
    at: dict[str, Any] = {"positions": positions}
    losses: dict[str, Callable[[], Tensor]] = {
        "cross_entropy": lambda: linear_cross_entropy(hidden, head.weight, targets, **at).loss,
        "capped": lambda: (
            linear_cross_entropy(hidden, head.weight, targets, softcap=30.0, **at).loss
        ),
        "likelihoods": lambda: linear_likelihoods(hidden, head.weight, targets, **at).nll.sum(),
        "any head": lambda: module_cross_entropy(head, hidden, targets, **at).loss,
        "any head's likelihoods": lambda: module_likelihoods(head, hidden, targets, **at).nll.sum(),
        "distillation": lambda: divergences(
            hidden,
            hidden.detach(),
            student_logits=head,
            teacher_logits=head,
            kind="jensen_shannon",
            vocabulary=columns_of(head),
        ).sum(),
    }
    return losses[name]


@pytest.mark.sampled(5)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "name",
    [
        *("cross_entropy", "capped", "likelihoods"),
        *("any head", "any head's likelihoods", "distillation"),
    ],
)
def test_temporaries_fit_into_a_gigabyte(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(gemm, "adds_in_place", lambda *types: True)
    loss = loss_of(name, 262_144, dtype)
    with Allocated() as allocated:
        loss().backward()
    # The gradients, in float32 and in their type, and what is of the size of the hidden states.
    lasting = 10 * 6000 * WIDTH * 4 + 262_144 * WIDTH * (4 + 4)
    assert 0.2 * GB < allocated.peak - lasting <= GB


def test_a_product_is_added_in_float32_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator one operation, and nothing as large as the gradient beside it."""
    monkeypatch.setattr(gemm, "adds_in_place", lambda *types: True)
    made: dict[str, Any] = {"dtype": torch.bfloat16, "device": "meta"}
    hidden, weight = torch.empty(512, WIDTH, **made), torch.empty(100_000, WIDTH, **made)
    gradients = HeadGradients(
        hidden, weight, bias=None, needs_grad=(False, True, False), dtype=torch.float32
    )
    logits = torch.empty(512, 100_000, **made)
    with Allocated() as allocated:
        gradients.add(slice(0, 512), logits)
    assert allocated.peak < 100_000 * WIDTH * 2


def test_a_device_that_cannot_is_asked_once() -> None:
    assert not gemm.adds_in_place(torch.device("cpu"), torch.bfloat16, torch.float32)


def test_low_precision_adds_up_in_float32() -> None:
    total = torch.full((4, 4), 2.0**-10)
    ones = torch.ones(4, 8, dtype=torch.bfloat16)
    gemm.add_matmul_(total, ones, ones.t())
    assert torch.equal(total, torch.full((4, 4), 8 + 2.0**-10))
