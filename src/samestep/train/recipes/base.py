"""What an objective does with its settings, in the order of a run: the base class of recipes."""

import logging
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from samestep.data.collate import Padding, collate_records
from samestep.data.load import load_rows
from samestep.data.records import Records
from samestep.data.rows import Row
from samestep.engine.terms import Objective
from samestep.errors import ConfigError
from samestep.models.activations import checkpoint_activations
from samestep.models.compiled import run_eagerly
from samestep.models.load import (
    base_of,
    check_token_range,
    load_model,
    load_tokenizer,
    resolve_source,
)
from samestep.models.lora import num_embeddings
from samestep.models.placement import made_on
from samestep.models.probes import choose_padding, logits_of
from samestep.train.precision import weight_dtype
from samestep.train.rollouts import RolloutMaker
from samestep.train.settings.adapters import continued_adapter
from samestep.train.settings.base import TrainSettings
from samestep.train.settings.objectives import OBJECTIVES
from samestep.train.settings.streams import is_stream
from samestep.utils.files import cache_folder
from samestep.utils.plugins import load_object
from samestep.utils.sources import Source, describe_source, parts_of

log = logging.getLogger("samestep")


class Recipe:
    """What an objective reads, loads, collates, checks and builds.

    A subclass overrides what is different; `read` and `build` it must define.

    Args:
        settings: Finalized settings of the objective.

    Attributes:
        settings: The same.
    """

    settings: TrainSettings

    settings_class: ClassVar[type[TrainSettings]] = TrainSettings
    """The class of the settings of a recipe that ``objective`` names by file.py:name or
    package.module:name; its fields are fields of YAML and flags. For an objective of the table the
    table says it."""

    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    """The class of transformers that loads the model."""

    peft_task: ClassVar[str] = "CAUSAL_LM"
    """What PEFT calls the kind of the model; it decides which heads train beside adapters, and
    whether only a decoder's targets are looked at."""

    measures_costs: ClassVar[bool] = True
    """Whether the cost of micro-batches is measured where ``micro_tokens`` is auto."""

    def __init__(self, settings: TrainSettings) -> None:
        self.settings = settings

    def load_tokenizer(self, source: str) -> Any:
        """What reads the rows and is saved beside the model: a tokenizer.

        Args:
            source: What `samestep.models.load.resolve_source` gave.

        Returns:
            A tokenizer or processor of transformers; None where there is no text.

        Raises:
            ConfigError: There is none, or it cannot be read.
        """
        return load_tokenizer(source, trust_remote_code=self.settings.trust_remote_code)

    def pad_id(self, tokenizer: Any) -> int:
        """What padding is filled with; nothing depends on it."""
        return tokenizer.pad_token_id or 0

    def read(self, source: Source, tokenizer: Any, training: Records | None = None) -> Records:
        """The records of a data source.

        Args:
            source: A value of ``data`` or ``eval_data``.
            tokenizer: What `load_tokenizer` gave.
            training: The training records, when those to evaluate on are read.

        Returns:
            At least one record.

        Raises:
            DataError: The rows cannot be used.
        """
        raise NotImplementedError

    def load_rows(self, source: Source) -> list[Row]:
        """The rows of a data source, converted as ``row_format`` says.

        Args:
            source: As for `read`.

        Returns:
            The rows.

        Raises:
            DataError: They cannot be read.
        """
        return load_rows(source, row_format=self.settings.row_format, columns=self.settings.columns)

    def one_source(self, source: Source) -> str:
        """The source of an objective whose rows name files that lie beside them.

        Args:
            source: As for `read`.

        Returns:
            The one that it is.

        Raises:
            ConfigError: There are several.
        """
        parts = parts_of(source)
        if len(parts) == 1:
            return parts[0].path
        raise ConfigError(
            f"data: {self.settings.objective} finds files beside the rows, so it takes one source, "
            f"not {len(parts)} ({describe_source(source)})"
        )

    def load_model(self, source: str, data: Sequence[Records]) -> Any:
        """The model to train, in train mode; `load_with` makes it on its device.

        Args:
            source: What `samestep.models.load.resolve_source` gave.
            data: The training records, then those to evaluate on if there are any.

        Returns:
            A model of ``auto_class``.

        Raises:
            ConfigError: It cannot be loaded.
        """
        return self.load_with(source)

    def load_with(self, source: str, **changes: Any) -> Any:
        """The model, with changes of its config such as the number of classes."""
        return load_model(
            source,
            auto_class=self.auto_class,
            init=self.settings.init,
            dtype=weight_dtype(self.settings, trains=self.settings.lora_rank is None),
            seed=self.settings.seed,
            trust_remote_code=self.settings.trust_remote_code,
            settings=changes,
            quantization=self.settings.quantization,
        )

    def check_fit(self, model: Any, data: Sequence[Records]) -> None:
        """Refuse data that the model cannot take.

        Args:
            model: The model.
            data: As for `load_model`.

        Raises:
            ConfigError: A token or a position has no embedding.
        """
        for at, records in enumerate(data):
            check_token_range(model, {"eval_data" if at else "data": records})

    def choose_padding(self, model: Any) -> Padding:
        """The layout of micro-batches; the model's attention is set to serve it.

        Args:
            model: On its device.

        Returns:
            The layout.

        Raises:
            ConfigError: The layout of the settings lets sequences see each other.
        """
        return choose_padding(model, self.settings.padding, self.outputs)

    def outputs(self, model: Any, micro: dict[str, Any]) -> Tensor:
        """What the model makes of a micro-batch: a sequence must not change its neighbour's part.

        Args:
            model: The model.
            micro: At least ``input_ids``.

        Returns:
            [rows, length, ...] by token, or [sequences, width].
        """
        return logits_of(model, micro)

    def checkpoint_activations(self, model: Any) -> None:
        """Choose what the model keeps for its backward; under auto everything, to begin with."""
        mode = self.settings.gradient_checkpointing
        checkpoint_activations(model, "none" if mode == "auto" else mode)

    def recompute_activations(self, model: Any) -> bool:
        """Under ``gradient_checkpointing`` auto: keep less for the backward from here on.

        Args:
            model: The model, changed in place.

        Returns:
            Whether it was changed.
        """
        # What is offloaded cannot be recomputed, too: see `samestep.train.settings.base.finalize`.
        settings = self.settings
        fixed = settings.gradient_checkpointing != "auto" or settings.activation_offload
        done = model.is_activation_checkpointing or not model.supports_gradient_checkpointing
        if fixed or done:
            return False
        if run_eagerly(model):
            log.info("compile: none from here on: layers that recompute run uncompiled")
        checkpoint_activations(model, "selective")
        return True

    def collate(
        self,
        data: Records,
        indices: Sequence[int],
        *,
        padding: Padding,
        pad_id: int,
        key: tuple[int, int],
    ) -> dict[str, Any]:
        """One micro-batch of records.

        Args:
            data: The data set.
            indices: Which of its records; at least one.
            padding: The layout.
            pad_id: What to fill padding with.
            key: (seed, step): what is random about an example is a function of this and its row.

        Returns:
            What the model and the objective read.
        """
        return collate_records([data[at] for at in indices], padding=padding, pad_id=pad_id)

    def rollouts(self, model: Any, tokenizer: Any, data: Records) -> RolloutMaker | None:
        """What generates the examples of each step; None: the records are the examples.

        Args:
            model: On its device, with its adapters.
            tokenizer: What `load_tokenizer` gave.
            data: The training records.

        Returns:
            None, unless a recipe generates.

        Raises:
            ConfigError: The model cannot generate.
        """
        return None

    def build(self, model: Any, data: Sequence[Records]) -> Objective:
        """What to optimise.

        Args:
            model: The model, on its device, with its adapters.
            data: As for `load_model`.

        Returns:
            The objective.

        Raises:
            ConfigError: A setting does not fit the model or the data.
        """
        raise NotImplementedError


def recipe_for(settings: TrainSettings) -> Recipe:
    """The recipe of an objective.

    Args:
        settings: Finalized settings; ``objective`` names it.

    Returns:
        The recipe.

    Raises:
        ConfigError: There is no such objective, or it is not one.
    """
    row = OBJECTIVES.get(settings.objective)
    recipe = load_object(row.recipe if row else settings.objective, what="objective")
    if isinstance(recipe, type) and issubclass(recipe, Recipe):
        return recipe(settings)
    custom: type[Recipe] = import_module("samestep.train.recipes.custom").CustomRecipe
    return custom(settings)


def token_cache(settings: TrainSettings) -> Path | None:
    """Where tokens of rows are kept; nowhere for a stream, which would fill the disk.

    Args:
        settings: ``data``, ``stream``.
    """
    return None if is_stream(settings, parts_of(settings.data)) else cache_folder() / "tokens"


def model_source(settings: TrainSettings) -> str:
    """What transformers loads to begin with: the model, or the base of adapters that train on.

    Args:
        settings: ``model``, ``model_adapter``.

    Returns:
        A folder or a Hub name.

    Raises:
        ConfigError: There is no such model, or it cannot be used.
    """
    adapter = continued_adapter(settings, settings.model)
    return resolve_source(settings.model) if adapter is None else base_of(adapter)


def load_frozen(
    source: str,
    model: Any,
    *,
    field: str,
    trust_remote_code: bool,
    dtype: torch.dtype | None = None,
) -> Any:
    """A second model beside the one that trains, on its device and with its attention.

    Args:
        source: A Hub name or folder.
        model: The model that trains.
        field: The setting that names the source, for the message.
        trust_remote_code: Run Python code that comes with it.
        dtype: Of its weights; None: that of the model.

    Returns:
        The model.

    Raises:
        ConfigError: It cannot be loaded, or has another vocabulary.
    """
    with made_on(model.device):
        second = load_model(
            resolve_source(source), dtype=dtype or model.dtype, trust_remote_code=trust_remote_code
        )
    own, frozen = (num_embeddings(each) for each in (model, second))
    if own != frozen:
        raise ConfigError(
            f"{field}: it has {frozen} embeddings, the model has {own}: they must share a "
            "vocabulary"
        )
    second.to(model.device).set_attn_implementation(model.config._attn_implementation)
    return second
