"""An objective of the user's own that is a loss alone, with rows of causal_lm or of dpo."""

from collections.abc import Sequence
from typing import Any

from samestep.data.records import Records
from samestep.engine.terms import Objective
from samestep.errors import ConfigError
from samestep.objectives.units import PAIR_COUNTERS
from samestep.train.recipes.base import Recipe
from samestep.train.recipes.language import read_language
from samestep.train.recipes.preference import read_pairs
from samestep.train.settings.base import TrainSettings
from samestep.train.settings.objectives import CustomSettings
from samestep.utils.plugins import load_object
from samestep.utils.sources import Source


class CustomRecipe(Recipe):
    """A function (model, micro-batch) to terms, or an `Objective`, in a place that users name."""

    settings: CustomSettings

    def __init__(self, settings: TrainSettings) -> None:
        """Load what the reference names.

        Raises:
            ConfigError: It is not there, or no objective.
        """
        super().__init__(settings)
        self._loss = load_object(settings.objective, what="objective")
        if isinstance(self._loss, type) or not (
            callable(self._loss) or isinstance(self._loss, Objective)
        ):
            what = "the class" if isinstance(self._loss, type) else "a"
            name = getattr(self._loss, "__name__", type(self._loss).__name__)
            raise ConfigError(
                f"objective: {settings.objective} is {what} {name}, not a function (model, "
                "micro-batch) to terms, a samestep.Objective or a subclass of "
                "samestep.train.recipes.base.Recipe"
            )

    def read(self, source: Source, tokenizer: Any, training: Records | None = None) -> Records:
        """Rows as of the objective whose form was chosen."""
        if self.settings.rows == "pairs":
            return read_pairs(self.settings, source, tokenizer)
        return read_language(self.settings, source, tokenizer)

    def build(self, model: Any, data: Sequence[Records]) -> Objective:
        """What the reference names, with the counters of the rows' units."""
        if isinstance(self._loss, Objective):
            return self._loss
        return Objective(self._loss, PAIR_COUNTERS if self.settings.rows == "pairs" else {})
