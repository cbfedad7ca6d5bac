"""Do two ways of computing the same thing agree, but for rounding? The bound is measured.

The noise of a computation is how far its outputs move when every operation in it rounds otherwise:
each floating-point result is moved at random by up to one rounding of its own type (Monte Carlo
arithmetic: Parker, Pierce and Eggert, 2000). So rotations in float32 inside a float64 model count
with their own rounding, and the bound fits the model, its weights, the device and the type. Other
ways to measure it, such as other rows or their order, would take a leak between rows for noise;
here the computation is left as it is and only its rounding changes.

In bfloat16 and float16 noise is so large that a leak can hide in it. There the same question is
asked in float32 too: every operation casts its own operands to float32 and drops them, so the
weights are never changed and no second copy of the model is held. FSDP2 gathers weights in their
own type, into memory that it keeps: there a low precision is compared by itself alone.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

FACTOR = 10.0
"""How many times its noise two ways of a computation may differ.

An operation's own error is half a rounding at most and is moved by up to one, so the noise is about
the largest difference that two sound ways show; random draws vary, and matrix products of other
shapes may add up in another order. A factor of ten leaves room for both."""

DRAWS = 2
"""How often the rounding is drawn; the largest noise counts."""

LOW_PRECISION = (torch.bfloat16, torch.float16)

Run: TypeAlias = Callable[[], Sequence[Tensor]]
"""A computation that can be repeated; its outputs are compared one by one."""

_COLLECTIVES = ("c10d", "_c10d_functional", "fsdp")
_LOOK_UPS = ("embedding", "index", "index_select", "gather")
"""What picks from a table, and must not copy the whole of it in float32."""

_SUMMED = {
    "mm": 0, "bmm": 0, "mv": 0, "dot": 0, "_grouped_mm": 0, "addmm": 1, "baddbmm": 1, "addmv": 1,
}  # fmt: skip
"""Products, and which argument's last dimension is summed over."""

_FLOAT32_PRODUCTS = {"highest": 2.0**-23, "high": 2.0**-10, "medium": 2.0**-7}
"""The rounding of float32 products by `torch.get_float32_matmul_precision`."""


@dataclass(frozen=True)
class Agreement:
    """How two ways of a computation compare.

    Attributes:
        difference: The largest relative difference of an output.
        noise: The largest relative difference that rounding makes.
        low: Whether bfloat16 or float16 took part, and could be computed as float32.
    """

    difference: float
    noise: float
    low: bool = False

    @property
    def holds(self) -> bool:
        """Whether the difference is no more than rounding explains; never with NaN."""
        return self.difference <= FACTOR * self.noise


@torch.no_grad()
def compare_ways(usual: Run, other: Run) -> Agreement:
    """Compare two ways of a computation, in its own types and then, if those are low, in float32.

    Args:
        usual: The way that is known to be right; its noise is measured.
        other: The way in question; it is run last.

    Returns:
        The first comparison that does not hold, else the last one; of all outputs together. Where
        an operation cannot be run in float32, that in the computation's own types.
    """
    [found] = _in_float32_too(lambda wide: [compare_in_one_precision(usual, other, wide=wide)])
    return found


@torch.no_grad()
def compare_outputs(usual: Run, other: Run) -> list[Agreement]:
    """`compare_ways` of each output by itself, for no more runs.

    Args:
        usual: As for `compare_ways`.
        other: As for `compare_ways`.

    Returns:
        The comparison of each output.
    """
    return _in_float32_too(lambda wide: _compare(usual, other, wide=wide))


def _in_float32_too(compare: Callable[[bool], list[Agreement]]) -> list[Agreement]:
    """Comparisons in the computation's types, and of those that hold, if they are low, in float32.

    Args:
        compare: Gives them; its argument says whether low types are computed as float32.
    """
    found = compare(False)
    if not any(one.holds and one.low for one in found):
        return found
    try:
        wide = compare(True)
    except (TypeError, ValueError, RuntimeError):  # an operation cannot be run in float32
        return found
    return [more if one.holds else one for one, more in zip(found, wide, strict=True)]


@torch.no_grad()
def compare_in_one_precision(usual: Run, other: Run, *, wide: bool = False) -> Agreement:
    """Compare two ways of a computation in one precision.

    Args:
        usual: The way that is known to be right; its noise is measured.
        other: The way in question; it is run last.
        wide: Whether bfloat16 and float16 are computed as float32.

    Returns:
        The comparison of all outputs together: the largest difference, and the largest noise.
    """
    found = _compare(usual, other, wide=wide)
    return Agreement(
        _largest(one.difference for one in found),
        _largest(one.noise for one in found),
        any(one.low for one in found),
    )


def _compare(usual: Run, other: Run, *, wide: bool) -> list[Agreement]:
    """The comparison of each output in one precision."""
    rounding = [_Arithmetic(wide=wide, seed=seed) for seed in range(DRAWS)]
    base = _run(usual, _Arithmetic(wide=wide))
    draws = [relative_differences(base, _run(usual, one)) for one in rounding]
    noises = torch.stack(draws).amax(0).tolist()
    differences = relative_differences(base, _run(other, _Arithmetic(wide=wide))).tolist()
    low = any(one.low and not one.sharded for one in rounding)
    return [Agreement(*pair, low) for pair in zip(differences, noises, strict=True)]


@torch.no_grad()
def rounding_noise(run: Run) -> list[float]:
    """The relative noise of each output of a computation.

    Args:
        run: The computation. Random numbers in it must be the same whenever it is called.

    Returns:
        The noise, output by output.
    """
    base = run()
    draws = [relative_differences(base, _run(run, _Arithmetic(seed=at))) for at in range(DRAWS)]
    return torch.stack(draws).amax(0).tolist()


def relative_differences(some: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """The norm of each difference over the norm of the first, 0 if both are 0.

    Args:
        some: Tensors.
        others: As many, of the same shapes.

    Returns:
        [tensors] float64.
    """
    found = []
    for one, other in zip(some, others, strict=True):
        difference, size = (one.double() - other.double()).norm(), one.double().norm()
        found.append(torch.where(difference == 0, difference, difference / size))
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.float64)


def perturb(tensor: Tensor, draw: torch.Generator, rounding: float | None = None) -> Tensor:
    """A tensor with each element moved by up to one rounding of its type, at random.

    Args:
        tensor: Floating point.
        draw: Where the random numbers come from; on the tensor's device.
        rounding: The relative size of a rounding, if not that of the type.

    Returns:
        A new tensor. What is not finite, or would not be, stays; so do whole numbers, if there is
        nothing else: masks and counts are exact.
    """
    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
    size = torch.finfo(tensor.dtype).eps if rounding is None else rounding
    signed = 2 * torch.rand(wide.shape, generator=draw, device=wide.device, dtype=wide.dtype) - 1
    found = (wide * (1 + size * signed)).to(tensor.dtype)
    whole = (tensor == tensor.round()).all()
    return torch.where(found.isfinite() & ~whole, found, tensor)


def computes_in_float32() -> bool:
    """Whether bfloat16 and float16 are being computed as float32 at the moment."""
    return _Arithmetic.widening > 0


class _Arithmetic(TorchDispatchMode):
    """Runs operations with other rounding, or in float32 in place of a lower precision.

    Views and results in place are left alone: they share memory with others.
    """

    widening = 0

    def __init__(self, *, wide: bool = False, seed: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.low = self.sharded = False
        self._wide, self._seed = wide, seed
        self._draws: dict[torch.device, torch.Generator] = {}

    def __enter__(self) -> "_Arithmetic":
        _Arithmetic.widening += self._wide
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        _Arithmetic.widening -= self._wide
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "namespace", "") in _COLLECTIVES:
            self.sharded = True
            return function(*args, **kwargs)
        aliases = _aliases(function)
        if self._wide:
            args, kwargs = _widened(function, aliases, args, kwargs)
        result = function(*args, **kwargs)
        if aliases:
            return result
        if self._wide:
            result = tree_map_only(Tensor, _float32, result)
        if self._seed is None or not any(map(_is_floating, args)) or _casts_weight(function, args):
            return result
        return tree_map_only(Tensor, lambda one: self._moved(one, function, args), result)

    def _moved(self, one: Tensor, function: Any, args: Any) -> Tensor:
        if not one.is_floating_point() or type(one) is not Tensor:  # a DTensor's part comes alone
            return one
        self.low |= one.dtype in LOW_PRECISION
        if one.device not in self._draws:
            self._draws[one.device] = torch.Generator(one.device).manual_seed(self._seed or 0)
        return perturb(one, self._draws[one.device], _rounding(one, function, args))


def _run(run: Run, arithmetic: _Arithmetic) -> Sequence[Tensor]:
    with arithmetic:
        return run()


def _largest(values: Iterable[float]) -> float:
    """The largest of all; NaN if one is."""
    return float(torch.tensor(list(values), dtype=torch.float64).max())


def _casts_weight(function: Any, args: Any) -> bool:
    """Whether an operation is the cast of a weight, which every way of a computation rounds alike.

    Autocast makes one of each weight in each run: to move them would take most of the time and,
    on an accelerator, memory several times that of the largest weight.
    """
    return function is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter)


@cache
def _aliases(function: Any) -> bool:
    """Whether an operation's result shares memory with an argument."""
    schema = getattr(function, "_schema", None)
    return schema is None or any(one.alias_info is not None for one in schema.returns)


def _rounding(result: Tensor, function: Any, args: Any) -> float | None:
    """The relative rounding of an operation's result, if it is not its type's alone.

    A product adds up many numbers in an order that its shape decides, which rounds by about the
    root of their number; they are added up in many strands, hence the 8. Products of low precision
    are added up in float32, so that their own rounding hides this.
    """
    name = function.overloadpacket.__name__ if hasattr(function, "overloadpacket") else ""
    if name not in _SUMMED or result.dtype in LOW_PRECISION:
        return None
    eps = float(torch.finfo(result.dtype).eps)
    if result.dtype == torch.float32:
        eps = _FLOAT32_PRODUCTS[torch.get_float32_matmul_precision()]
    summed = int(args[_SUMMED[name]].shape[-1])
    return eps * max(1.0, math.sqrt(summed) / 8)


def _widened(function: Any, aliases: bool, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments of an operation, in float32 where they are lower."""
    if kwargs.get("dtype") in LOW_PRECISION:
        kwargs = {**kwargs, "dtype": torch.float32}
    if aliases:  # a view stays one; what is written in place stays what it is
        if not args or not isinstance(args[0], Tensor) or args[0].dtype in LOW_PRECISION:
            return args, kwargs
        return (args[0], *tree_map_only(Tensor, _float32, args[1:])), kwargs
    if function.overloadpacket.__name__ in _LOOK_UPS:
        return args, kwargs
    return tree_map_only(Tensor, _float32, args), tree_map_only(Tensor, _float32, kwargs)


def _float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in LOW_PRECISION else tensor


def _is_floating(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_is_floating, value))
    return isinstance(value, Tensor) and value.is_floating_point()
