"""An objective of the user's own, from a Python file."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from samestep.errors import ConfigError
from samestep.train.config import TrainConfig
from samestep.train.objectives.causal_lm import read_language
from samestep.train.objectives.preference import read_pairs

if TYPE_CHECKING:
    from samestep.data.records import Records
    from samestep.engine.terms import Objective


class CustomConfig(TrainConfig):
    """Train on an objective from a file: a function (model, micro-batch) to terms."""

    objective: str
    """file.py:name of a function, a `samestep.TwoPass` or a `samestep.Objective`."""
    rows: Literal["completions", "pairs"] = "completions"
    """Which rows it takes: those of causal_lm, or those of dpo."""

    def read(self, source: str, tokenizer: Any, like: "Records | None" = None) -> "Records":
        """Rows as of the objective whose form was chosen."""
        if self.rows == "pairs":
            return read_pairs(self, source, tokenizer)
        return read_language(self, source, tokenizer, "completion")

    def build(self, model: Any, data: Sequence["Records"]) -> "Objective":
        """What the file defines."""
        from samestep.engine.terms import Objective
        from samestep.objectives.units import PAIR_COUNTERS

        found = load_from_file(self.objective)
        if isinstance(found, Objective):
            return found
        if not callable(found):
            raise ConfigError(
                f"objective: {self.objective} is {type(found).__name__}, not a function "
                "(model, micro-batch) to terms"
            )
        return Objective(found, PAIR_COUNTERS if self.rows == "pairs" else {})


def load_from_file(reference: str) -> Any:
    """What "file.py:name" names.

    Raises:
        ConfigError: The file or the name is not there, or running the file fails.
    """
    path, _, name = reference.rpartition(":")
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"objective: there is no file {file}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(f"objective: {file} fails: {type(error).__name__}: {error}") from error
    if name not in vars(module):
        names = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise ConfigError(f"objective: {file} defines no {name!r}; it has: {', '.join(names)}")
    return vars(module)[name]
