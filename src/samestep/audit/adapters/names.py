"""The names by which a custom loop is given to the auditor."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from samestep.errors import CheckError

NAMES = {
    "model": "model() -> nn.Module, the same architecture each time",
    "examples": "the examples of one effective batch, a sequence",
    "collate": "collate(list of examples) -> batch",
    "step": "step(model, micro_batches): leaves the gradient in .grad; or",
    "train": "train(model, micro_batches): updates the weights",
}
OPTIONAL = {
    "pack": "pack(list of examples) -> batch, without padding",
    "evaluate": "evaluate(model, batches) -> loss, or {name: value}",
    "terms": "names of loss terms; step or train then takes term=",
    "wrap": "wrap(model) -> model for several ranks, such as DistributedDataParallel; None where "
    "step or train calls torch.distributed by itself",
    "shard": "shard(indices, rank, world) -> the indices of one rank, as your sampler deals them",
}


@dataclass(frozen=True)
class LoopNames:
    """The user's own functions, by the names of `NAMES` and `OPTIONAL`."""

    model: Callable[[], nn.Module]
    examples: Sequence[Any]
    collate: Callable[[list[Any]], Any]
    step: Callable[..., Any] | None = None
    train: Callable[..., Any] | None = None
    pack: Callable[[list[Any]], Any] | None = None
    evaluate: Callable[[nn.Module, list[Any]], Any] | None = None
    terms: tuple[str, ...] = ()
    wrap: Callable[[nn.Module], nn.Module] | None = None
    shard: Callable[[list[int], int, int], Sequence[int]] | None = None
    ranks: bool = False
    """Whether it runs on several ranks: it names ``wrap``, or calls torch.distributed itself."""

    @classmethod
    def of(cls, source: Any) -> "LoopNames":
        """Read the names off a module, a class instance, or a mapping.

        Raises:
            CheckError: A needed name is missing; lists all that are.
        """
        members = _members(source)
        missing = [name for name in ("model", "examples", "collate") if name not in members]
        if "step" not in members and "train" not in members:
            missing.append("step")
        if missing:
            lines = "\n".join(f"  - {NAMES[name]}" for name in missing)
            raise CheckError(f"the subject lacks:\n{lines}\n`samestep check --init` writes one")
        found = {name: members[name] for name in (*NAMES, *OPTIONAL) if name in members}
        examples = found["examples"]
        found["examples"] = list(examples() if callable(examples) else examples)
        found["terms"] = tuple(found.get("terms") or ())
        function = found.get("step") or found.get("train")
        return cls(**found, ranks="wrap" in found or _calls_distributed(function))


def _calls_distributed(function: Any, seen: frozenset[str] = frozenset()) -> bool:
    """Whether a function, or one of its own file that it calls, names torch.distributed."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return False
    inside = [const for const in code.co_consts if isinstance(const, CodeType)]
    names = {name for one in (code, *inside) for name in one.co_names} - seen
    known = function.__globals__
    if "distributed" in names or any(known.get(name) is torch.distributed for name in names):
        return True
    called = [known[name] for name in names if isinstance(known.get(name), FunctionType)]
    own = [one for one in called if one.__module__ == function.__module__]
    return any(_calls_distributed(one, seen | names) for one in own)


def _members(source: Any) -> dict[str, Any]:
    if isinstance(source, Mapping):
        return dict(source)
    if isinstance(source, ModuleType):
        return vars(source)
    return {name: getattr(source, name) for name in dir(source) if not name.startswith("_")}


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether a function takes an argument of this name."""
    return name in inspect.signature(function).parameters
