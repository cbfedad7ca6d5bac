"""The user's own functions of a custom loop, by the names under which a subject defines them."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from samestep.audit.adapters.knobs import Knobs, with_keyword
from samestep.audit.subject import Knob
from samestep.errors import CheckError

_REQUIRED = {
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
    "loader": "loader(examples, micro_batch_size) -> micro-batches, as your own loader deals them "
    "in one pass: batches, or lists of examples for collate",
    "knobs": 'knobs = {"name": (values, ...)}: sizes of your own that may not change the step',
}

_CALLED = ("model", "collate", "step", "train", "pack", "evaluate", "wrap", "loader")
"""Names of functions that may take a knob as a keyword."""


@dataclass(frozen=True)
class LoopFunctions:
    """The user's own functions, by the names under which a subject file defines them.

    Attributes:
        model: Makes the model, the same architecture each time.
        examples: Of one effective batch.
        collate: From examples to a batch.
        step: Leaves the gradient in ``.grad``; this or ``train``.
        train: Updates the weights.
        pack: From examples to a batch without padding.
        evaluate: From a model and batches to a loss, or numbers by name.
        terms: Names of loss terms.
        wrap: From a model to one for several ranks.
        shard: From indices, rank and world to the indices of that rank.
        loader: From examples and a micro-batch size to the micro-batches of one pass.
        knobs: Sizes of the loop's own.
        ranks: Whether it runs on several ranks: it names ``wrap``, or calls torch.distributed.
    """

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
    loader: Callable[[list[Any], int], Iterable[Any]] | None = None
    knobs: Knobs = field(default_factory=Knobs)
    ranks: bool = False

    @classmethod
    def of(cls, source: Any) -> "LoopFunctions":
        """Read the names off a module, a class instance, or a mapping.

        Raises:
            CheckError: A needed name is missing; lists all that are.
        """
        members = _members(source)
        missing = [name for name in ("model", "examples", "collate") if name not in members]
        if "step" not in members and "train" not in members:
            missing.append("step")
        if missing:
            lines = "\n".join(f"  - {_REQUIRED[name]}" for name in missing)
            raise CheckError(f"the subject lacks:\n{lines}\n`samestep check --init` writes one")
        fields = {name: members[name] for name in (*_REQUIRED, *OPTIONAL) if name in members}
        examples = fields["examples"]
        fields["examples"] = list(examples() if callable(examples) else examples)
        fields["terms"] = tuple(fields.get("terms") or ())
        declared = fields.pop("knobs", None)
        function = fields.get("step") or fields.get("train")
        loop = cls(**fields, ranks="wrap" in fields or _calls_distributed(function))
        if declared is None:
            return loop
        functions = [fields[name] for name in _CALLED if fields.get(name) is not None]
        knobs = Knobs.of(declared, functions=functions, holder=source, model=loop.model())
        return replace(loop, knobs=knobs)

    def turned(self, knob: Knob | None) -> "LoopFunctions":
        """The functions with a knob given as a keyword to those that take it."""
        keyword = self.knobs.keyword(knob)
        if not keyword:
            return self
        held = {name: getattr(self, name) for name in _CALLED}
        given: dict[str, Any] = {
            name: with_keyword(function, keyword)
            for name, function in held.items()
            if function is not None
        }
        return replace(self, **given)

    @property
    def functions(self) -> list[Callable[..., Any]]:
        """Those of them that the user gives."""
        held = (getattr(self, name) for name in _CALLED)
        return [function for function in held if function is not None]

    @property
    def evaluates_on_ranks(self) -> bool:
        """Whether ``evaluate`` reduces over ranks."""
        return self.evaluate is not None and _calls_distributed(self.evaluate)

    @property
    def update(self) -> Callable[..., Any]:
        """``step``, or else ``train``."""
        function = self.step or self.train
        assert function is not None
        return function

    def takes(self, argument: str) -> bool:
        """Whether ``step`` or ``train`` takes an argument of this name."""
        return argument in inspect.signature(self.update).parameters


def _members(source: Any) -> dict[str, Any]:
    if isinstance(source, Mapping):
        return dict(source)
    if isinstance(source, ModuleType):
        return vars(source)
    return {name: getattr(source, name) for name in dir(source) if not name.startswith("_")}


def _calls_distributed(function: Any, visited: frozenset[str] = frozenset()) -> bool:
    """Whether a function, or one of its own file that it calls, names torch.distributed."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return False
    inside = [const for const in code.co_consts if isinstance(const, CodeType)]
    names = {name for each in (code, *inside) for name in each.co_names} - visited
    scope = function.__globals__
    if "distributed" in names or any(scope.get(name) is torch.distributed for name in names):
        return True
    called = [scope[name] for name in names if isinstance(scope.get(name), FunctionType)]
    own = [each for each in called if each.__module__ == function.__module__]
    return any(_calls_distributed(each, visited | names) for each in own)
