"""What a loop holds outside of its model, and which outlives a run: put back before the next one.

A counter of steps that is a global of the file, a loss object with a running scale: every run of an
audit has to begin where the first one did, or no two of them could be compared.
"""

import argparse
import functools
import inspect
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from samestep.audit.adapters.batches import copied

MAX_ELEMENTS = 2**16
"""Of a value that is kept: what is larger is data."""

_ATOMS = (bool, int, float, complex, str, bytes, type(None))

_SEQUENCES = (list, tuple, set, deque)
_MAPPINGS = (dict, OrderedDict, defaultdict, Counter)
_NAMESPACES = (argparse.Namespace, SimpleNamespace)

_NOTHING = object()
"""In place of a value that is not there."""


@dataclass(frozen=True)
class _Place:
    """Where a value lives, and what it was at first."""

    read: Callable[[], Any]
    write: Callable[[Any], None]
    delete: Callable[[], None]
    first: Any

    def put_back(self) -> None:
        now = self.read()
        if now is self.first or _same(now, self.first):
            return
        if self.first is _NOTHING:
            self.delete()
            return
        first = copied(self.first)
        if type(now) is type(first) and isinstance(now, list | set | deque | dict):
            now.clear()  # others may hold it too
            now.extend(first) if isinstance(now, list | deque) else now.update(first)
        else:
            self.write(first)


class HeldState:
    """Plain values that functions of a file reach: globals, closures, attributes of own objects.

    Random generators, networks' weights and optimizers are left as they are.

    Args:
        functions: The user's own.
        except_for: Names that are set from outside.
    """

    def __init__(self, functions: Iterable[Any], *, except_for: Iterable[str] = ()) -> None:
        self._ignored = frozenset(except_for)
        self._visited: set[tuple[int, str]] = set()
        self._places: list[_Place] = []
        self._objects: list[tuple[Any, frozenset[str]]] = []
        for function in functions:
            self._visit(function, getattr(inspect.unwrap(function), "__module__", None))

    def put_back(self) -> None:
        """Let every value be what it was at first."""
        for place in self._places:
            place.put_back()
        for holder, names in self._objects:
            for name in vars(holder).keys() - names - self._ignored:
                if _is_plain(vars(holder)[name]):
                    delattr(holder, name)

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that puts everything back whenever it is called."""

        @functools.wraps(function)
        def called(*args: Any, **options: Any) -> Any:
            self.put_back()
            return function(*args, **options)

        return called

    def _visit(self, value: Any, module: str | None) -> None:
        """Look for places behind a function, a class or an object of a file."""
        if not self._is_new(value):
            return
        if isinstance(value, MethodType):
            self._visit(value.__func__, module)
            self._visit(value.__self__, module)
        elif isinstance(value, FunctionType):
            if value.__module__ == module:
                self._visit_function(value, module)
        elif isinstance(value, type):
            for base in value.__mro__ if value.__module__ == module else ():
                if base.__module__ == module:
                    self._visit_attributes(base, module)
        elif type(value).__module__ == module or isinstance(value, _NAMESPACES):
            self._visit(type(value), module)
            if hasattr(value, "__dict__"):
                self._objects.append((value, frozenset(vars(value))))
                self._visit_attributes(value, module)

    def _is_new(self, holder: Any, name: str = "") -> bool:
        key = (id(holder), name)
        is_new = key not in self._visited
        self._visited.add(key)
        return is_new

    def _visit_function(self, function: FunctionType, module: str | None) -> None:
        if hasattr(function, "__wrapped__"):
            self._visit(function.__wrapped__, module)
        scope = function.__globals__
        for name in _names(function.__code__):
            write, delete = (
                functools.partial(change, name) for change in (scope.__setitem__, scope.pop)
            )
            read = functools.partial(scope.get, name, _NOTHING)
            self._keep(scope, name, module, read=read, write=write, delete=delete)
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        for name, cell in cells:
            read, write = (
                functools.partial(change, cell, "cell_contents") for change in (getattr, setattr)
            )
            try:
                read()
            except ValueError:  # nothing is there yet
                continue
            self._keep(cell, name, module, read=read, write=write, delete=lambda: None)

    def _visit_attributes(self, holder: Any, module: str | None) -> None:
        for name in list(vars(holder)):
            if name.startswith("__"):
                continue
            value = vars(holder)[name]
            if isinstance(value, staticmethod | classmethod):
                self._visit(value.__func__, module)
                continue
            read = functools.partial(_attribute, holder, name)
            write, delete = (
                functools.partial(change, holder, name) for change in (setattr, delattr)
            )
            self._keep(holder, name, module, read=read, write=write, delete=delete)

    def _keep(
        self,
        holder: Any,
        name: str,
        module: str | None,
        *,
        read: Callable[[], Any],
        write: Callable[[Any], None],
        delete: Callable[[], Any],
    ) -> None:
        """Keep what is plain, and look behind what is not."""
        if name in self._ignored:
            return
        value = read()
        if value is not _NOTHING and not _is_plain(value):
            self._visit(value, module)
        elif self._is_new(holder, name):
            first = value if value is _NOTHING else copied(value)
            self._places.append(_Place(read, write, delete, first))


def _attribute(holder: Any, name: str) -> Any:
    return vars(holder).get(name, _NOTHING)


def _names(code: CodeType) -> Iterator[str]:
    """Of globals and attributes that code and what is defined inside it names."""
    yield from code.co_names
    for inside in code.co_consts:
        if isinstance(inside, CodeType):
            yield from _names(inside)


def _is_plain(value: Any) -> bool:
    return 0 <= _elements(value) <= MAX_ELEMENTS


def _elements(value: Any) -> int:
    """How many numbers a value holds; far below zero if it holds anything else."""
    if isinstance(value, _ATOMS):
        return 1
    if type(value) is Tensor:
        plain = value.layout == torch.strided and not value.requires_grad
        return value.numel() if plain else -(2**60)
    if type(value) in _SEQUENCES:
        return sum(map(_elements, value))
    if type(value) in _MAPPINGS:
        return sum(_elements(key) + _elements(each) for key, each in value.items())
    return -(2**60)


def _same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        alike = one.shape == other.shape and one.dtype == other.dtype
        return alike and torch.equal(one, other)
    if isinstance(one, list | tuple | deque):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return bool(one == other)
