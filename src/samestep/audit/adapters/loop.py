"""A custom loop as a subject: four names in a file or on an object."""

import inspect
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from samestep.audit.batches import add_padding, alter, cast, facts_of, mask_targets
from samestep.audit.subject import PLAIN, Cut, Facts, Gradient, Observation, Setting
from samestep.errors import CheckError

NAMES = {
    "model": "model() -> nn.Module, the same architecture each time",
    "examples": "the examples of one effective batch, a sequence",
    "collate": "collate(list of examples) -> batch",
    "step": "step(model, micro_batches): leaves the gradient in .grad; or",
    "train": "train(model, micro_batches): updates the weights, by plain SGD",
}
OPTIONAL = {
    "pack": "pack(list of examples) -> batch, without padding",
    "evaluate": "evaluate(model, batches) -> loss, or {name: value}",
    "terms": "names of loss terms; step or train then takes term=",
    "wrap": "wrap(model) -> model for several ranks, such as DistributedDataParallel",
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
        return cls(**found)


def _members(source: Any) -> dict[str, Any]:
    if isinstance(source, Mapping):
        return dict(source)
    if isinstance(source, ModuleType):
        return vars(source)
    return {name: getattr(source, name) for name in dir(source) if not name.startswith("_")}


class LoopSubject:
    """Runs a custom loop; see `samestep.audit.subject.Subject`.

    Args:
        loop: The user's functions.
        name: For the report.

    Raises:
        CheckError: There are fewer than four examples: too few to cut.
    """

    uniform = False

    def __init__(self, loop: LoopNames, *, name: str) -> None:
        if len(loop.examples) < 4:
            raise CheckError(
                f"{name}: {len(loop.examples)} examples are too few to cut: give 4 or more, of "
                "different lengths"
            )
        self.loop = loop
        self.name = name
        self.size = len(loop.examples)
        self.terms = loop.terms
        seed_all(0)
        self._initial = {key: value.clone() for key, value in loop.model().state_dict().items()}
        self._facts = facts_of([loop.collate([example]) for example in loop.examples])

    def facts(self) -> Sequence[Facts] | None:
        """From ``labels`` of each example's own batch."""
        return self._facts

    def skips(self) -> Mapping[str, str]:
        """What needs names that the subject does not have."""
        loop, reasons = self.loop, {}
        if loop.pack is None:
            reasons["packing"] = f"the subject has no {OPTIONAL['pack']}"
        if loop.evaluate is None:
            for axis in ("evaluation-batch", "evaluation-first"):
                reasons[axis] = f"the subject has no {OPTIONAL['evaluate']}"
        if loop.wrap is None:
            reasons["ranks"] = f"the subject has no {OPTIONAL['wrap']}"
        if not loop.terms:
            reasons["terms"] = f"the subject has no {OPTIONAL['terms']}"
        if self._facts is None:
            reasons["zero-target"] = "batches are not mappings with a tensor 'labels'"
        if not _has_rows_of_labels(loop.collate([loop.examples[0]])):
            reasons["padding"] = "batches have no 'input_ids' and 'labels' [rows, length]"
        function = loop.step or loop.train
        if function is not None and not accepts(function, "accumulation"):
            reasons["short-window"] = (
                "step takes no accumulation=, the micro-batches of a full window; short "
                "micro-batches are tried under micro-batch"
            )
        return reasons

    def run(self, cut: Cut, setting: Setting = PLAIN) -> Observation:
        """One step on fresh weights."""
        model = self._model(setting)
        if setting.evaluate_first:
            self._evaluate(model, 2, setting)
            seed_all(setting.seed)
        return self._step(model, [self._batch(micro, setting) for micro in cut], setting)

    def chained(self, cut: Cut, setting: Setting = PLAIN) -> Observation | None:
        """Each micro-batch as an effective batch of its own, on the weights of the one before."""
        if self.loop.train is None:
            return None
        model = self._model(setting)
        before = _weights(model)
        for micro in cut:
            self._step(model, [self._batch(micro, setting)], setting)
        return Observation(_difference(before, _weights(model)))

    def padding_sides(self) -> tuple[Literal["right", "left"], ...]:
        """Both with an attention mask, else the right alone."""
        batch = self._batch((0,), PLAIN)
        return ("right", "left") if "attention_mask" in batch else ("right",)

    def shape(self, micro: tuple[int, ...]) -> tuple[int, int] | None:
        """That of ``input_ids``."""
        batch = self._batch(micro, PLAIN)
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        return (ids.shape[0], ids.shape[1]) if isinstance(ids, Tensor) and ids.dim() == 2 else None

    def evaluate(self, batch_size: int, setting: Setting = PLAIN) -> dict[str, float]:
        """The subject's own evaluation, over batches of a size."""
        return self._evaluate(self._model(setting), batch_size, setting)

    def _evaluate(self, model: nn.Module, batch_size: int, setting: Setting) -> dict[str, float]:
        assert self.loop.evaluate is not None
        starts = range(0, self.size, batch_size)
        cut = [tuple(range(start, min(start + batch_size, self.size))) for start in starts]
        return numbers(self.loop.evaluate(model, [self._batch(micro, setting) for micro in cut]))

    def _model(self, setting: Setting) -> nn.Module:
        seed_all(setting.seed)
        model = self.loop.model()
        model.load_state_dict(self._initial)
        if setting.dtype is not None:
            model.to(setting.dtype)
        if not setting.dropout:
            silence_dropout(model)
        seed_all(setting.seed)
        return model

    def _batch(self, micro: Sequence[int], setting: Setting) -> Any:
        examples = [self.loop.examples[index] for index in micro]
        if setting.packed:
            assert self.loop.pack is not None
            batch = self.loop.pack(examples)
        else:
            batch = self.loop.collate(examples)
        changed = [at for at, index in enumerate(micro) if index in setting.altered]
        if setting.twins:
            changed += [at for at, index in enumerate(micro) if index in micro[:at]]
        if changed:
            batch = alter(batch, changed)
        if setting.masked:
            rows = [at for at, index in enumerate(micro) if index in setting.masked]
            batch = mask_targets(batch, rows)
        if setting.padding:
            batch = add_padding(batch, setting.padding, side=setting.side)
        return batch if setting.dtype is None else cast(batch, setting.dtype)

    def _step(self, model: nn.Module, micros: list[Any], setting: Setting) -> Observation:
        function = self.loop.step or self.loop.train
        assert function is not None
        options: dict[str, Any] = {} if setting.term is None else {"term": setting.term}
        if accepts(function, "accumulation"):
            options["accumulation"] = setting.window or len(micros)
        precision = torch.finfo(next(model.parameters()).dtype).eps
        model.zero_grad()
        if self.loop.step is not None:
            reported = function(model, micros, **options)
            gradient = {
                name: weight.grad.detach().double().cpu().clone()
                for name, weight in model.named_parameters()
                if weight.grad is not None
            }
            return Observation(gradient, reported=numbers(reported), rounding=precision)
        before = _weights(model)
        reported = function(model, micros, **options)
        moved = _difference(before, _weights(model))
        return Observation(
            moved, reported=numbers(reported), rounding=precision * _norm(before) / _norm(moved)
        )


def _norm(gradient: Gradient) -> float:
    return max(math.hypot(*(float(tensor.norm()) for tensor in gradient.values())), 1e-300)


def _weights(model: nn.Module) -> Gradient:
    return {name: w.detach().double().cpu().clone() for name, w in model.named_parameters()}


def _difference(before: Gradient, after: Gradient) -> Gradient:
    return {name: before[name] - after[name] for name in before}


def seed_all(seed: int) -> None:
    """Seed every random number generator that a loop may draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def silence_dropout(model: nn.Module) -> None:
    """Set every dropout probability of a model to 0, as modules and as numbers on modules."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _has_rows_of_labels(batch: Any) -> bool:
    if not isinstance(batch, Mapping):
        return False
    ids, labels = batch.get("input_ids"), batch.get("labels")
    return isinstance(ids, Tensor) and isinstance(labels, Tensor) and ids.shape == labels.shape


def numbers(reported: Any) -> dict[str, float]:
    """What a loop returned, as numbers by name; what is not a number is left out."""
    if reported is None:
        return {}
    values = reported if isinstance(reported, Mapping) else {"loss": reported}
    return {
        str(name): float(value)
        for name, value in values.items()
        if isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
    }


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether a function takes an argument of this name."""
    return name in inspect.signature(function).parameters
