"""How often a step in mixed precision goes over all gradients: counted by operation, not timed."""

from collections import Counter

import torch
from cases import build, cut, ragged
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import samestep
from samestep.engine.terms import LossResult, MicroBatch

CAST = ("aten._to_copy.default", torch.bfloat16, torch.float32)


class Passes(TorchDispatchMode):
    """Elements of results of a weight's shape, by operation and types."""

    def __init__(self, shapes: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes = shapes
        self.elements: Counter[tuple[str, torch.dtype, torch.dtype]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and isinstance(args[0], Tensor) and out.shape in self.shapes:
            self.elements[str(func), args[0].dtype, out.dtype] += out.numel()
        return out


def test_a_micro_batch_casts_each_gradient_once_and_adds_it_once() -> None:
    """What docs/design.md counts: neither is more, for one micro-batch more."""
    model = build("llama", torch.float32)
    shapes = {tuple(weight.shape) for weight in model.parameters()}
    shapes |= {shape[::-1] for shape in shapes}  # a product may come transposed
    weights = sum(weight.numel() for weight in model.parameters())

    def mixed(model: torch.nn.Module, micro: MicroBatch) -> LossResult:
        with torch.autocast("cpu", torch.bfloat16):
            return samestep.CausalLMLoss()(model, micro)

    def passes(number: int) -> Counter[tuple[str, torch.dtype, torch.dtype]]:
        micros = cut(model, ragged(3 * number), [3], "none")
        assert len(micros) == number
        with torch.autocast("cpu", torch.bfloat16, enabled=False), Passes(shapes) as found:
            samestep.backward(model, micros, mixed, check_sums=False)
        return found.elements

    more = passes(4)
    more.subtract(passes(3))
    casts = more[CAST] / weights
    added = more["aten.add_.Tensor", torch.float32, torch.float32] / weights
    assert 0.5 < casts <= 1  # not those of the embedding and the head, which are made in float32
    assert added == 1
