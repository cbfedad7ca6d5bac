"""Knobs: the sizes of a loop's own that a subject declares, and how a run is given one."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from samestep.audit.subject import Knob
from samestep.errors import CheckError


@dataclass(frozen=True)
class Knobs:
    """What a subject declares as ``knobs = {"name": (value, ...)}``, and where each name lives.

    Attributes:
        values: Of each knob.
        holder: The module, class or object that the subject is; None: it has no attributes.
        keywords: Names that are keywords of the subject's functions.
    """

    values: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    holder: Any = None
    keywords: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        declared: Any,
        *,
        functions: Sequence[Any],
        holder: Any,
        model: Any = None,
        open_ended: bool = False,
    ) -> "Knobs":
        """Check a declaration.

        Args:
            declared: As the subject has it; None: no knobs.
            functions: Those that may take a knob as a keyword.
            holder: Of attributes.
            model: One of the subject's models, which may have the attribute too.
            open_ended: A function of ``**options`` takes every knob.

        Raises:
            CheckError: Lists every knob that has no values, or that nothing takes.
        """
        if declared is None:
            return cls()
        if not isinstance(declared, Mapping):
            raise CheckError(f'knobs must be {{"name": (values, ...)}}, not {declared!r}')
        keywords = frozenset(
            name
            for name in declared
            if any(_takes(function, name, open_ended=open_ended) for function in functions)
        )
        problems = []
        for name, values in declared.items():
            if not isinstance(values, Sequence) or isinstance(values, str) or not values:
                problems.append(f"{name}: give a tuple of values, not {values!r}")
            places = (holder, model)
            if name not in keywords and not any(_has(place, name) for place in places):
                problems.append(
                    f"{name}: no function of the subject takes it as a keyword, and neither the "
                    "subject nor its model has an attribute of this name"
                )
        if problems:
            raise CheckError("\n".join(["knobs:", *(f"  - {each}" for each in problems)]))
        return cls(dict(declared), holder, keywords)

    def keyword(self, knob: Knob | None) -> dict[str, Any]:
        """The knob as a keyword; empty if it is none."""
        if knob is None or knob[0] not in self.keywords:
            return {}
        return {knob[0]: self.value(knob)}

    def value(self, knob: Knob) -> Any:
        """The value that a run is given."""
        return self.values[knob[0]][knob[1]]

    @contextlib.contextmanager
    def on_holder(self, knob: Knob | None) -> Iterator[None]:
        """Within the block the attribute of the subject has the value."""
        if knob is None or knob[0] in self.keywords or not _has(self.holder, knob[0]):
            yield
            return
        name = knob[0]
        own = name in vars(self.holder)
        before = getattr(self.holder, name)
        setattr(self.holder, name, self.value(knob))
        try:
            yield
        finally:
            if own:
                setattr(self.holder, name, before)
            else:
                delattr(self.holder, name)

    def on_model(self, model: Any, knob: Knob | None) -> None:
        """Give the attribute of a new model the value, where it is the model's."""
        if knob is None or knob[0] in self.keywords or _has(self.holder, knob[0]):
            return
        setattr(model, knob[0], self.value(knob))


NO_KNOBS = Knobs()


def with_keyword(function: Callable[..., Any], keyword: Mapping[str, Any]) -> Callable[..., Any]:
    """A function with a keyword given, if it takes it."""
    taken = {name: value for name, value in keyword.items() if _takes(function, name)}
    return functools.partial(function, **taken) if taken else function


def _takes(function: Any, name: str, *, open_ended: bool = False) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some built-in classes have no signature
        return False
    if open_ended and any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return True
    named = parameters.get(name)
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return named is not None and named.kind in kinds


def _has(place: Any, name: str) -> bool:
    return place is not None and not isinstance(place, Mapping) and hasattr(place, name)
