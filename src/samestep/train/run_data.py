"""The data of a run: what is read, what is said of it, and in which steps it is learned."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from samestep.data.batching import StepPlan, num_steps, plan_steps
from samestep.data.describe import with_report
from samestep.data.load import rename_columns
from samestep.data.mixing import Mix, mix_of
from samestep.data.records import Records
from samestep.data.rows import Row
from samestep.data.stream_records import StreamRecords
from samestep.data.streams import MixedStream
from samestep.errors import ConfigError, DataError, is_no_fault_of_input
from samestep.models.load import resolve_source
from samestep.models.vocabulary import extend_tokenizer
from samestep.train.optim import load_optimizer, load_schedule
from samestep.train.recipes.base import Recipe, model_source, recipe_for
from samestep.train.rollouts import describe_generation
from samestep.train.settings.base import TrainSettings
from samestep.train.settings.evaluation import evaluation_sets
from samestep.train.settings.rollouts import GenerationFields
from samestep.train.settings.streams import is_stream
from samestep.utils.adapter_folder import is_adapter
from samestep.utils.sources import Source, describe_source, parts_of
from samestep.utils.waiting import waiting

log = logging.getLogger("samestep")


def step_plans(records: Records, settings: TrainSettings, *, start: int = 0) -> Iterator[StepPlan]:
    """The steps of a run without end.

    Args:
        records: Training records.
        settings: ``seed``, ``batch_size``, ``batch_tokens``.
        start: The number of the first step.

    Yields:
        The plan of each step.
    """
    if isinstance(records, StreamRecords):
        return records.plans(
            batch_size=settings.batch_size, batch_tokens=settings.batch_tokens, start=start
        )
    return plan_steps(
        records.lengths,
        seed=settings.seed,
        batch_size=settings.batch_size,
        batch_tokens=settings.batch_tokens,
        mix=training_mix(records, settings),
        start=start,
    )


def training_mix(records: Records, settings: TrainSettings) -> Mix | None:
    """What an epoch takes of the training records.

    Args:
        records: Training records.
        settings: ``data``.

    Returns:
        The mix; None if each is taken once.

    Raises:
        ConfigError: Sources have weights, but which records are of which is not known.
        DataError: No row of a source is left.
    """
    parts = parts_of(settings.data)
    if isinstance(records, StreamRecords):
        return None
    if not any(part.weight or part.rows for part in parts):
        return None
    sizes = None if records.report is None else records.report.by_source
    if sizes is None or sum(sizes) != len(records):
        raise ConfigError(
            f"data: the sources of {settings.objective} cannot be mixed by weight or rows: its "
            "records are not those of one source after another"
        )
    return mix_of(parts, (*sizes, *[0] * (len(parts) - len(sizes))))


def check_references(settings: TrainSettings) -> Recipe:
    """The recipe; fails early if what a setting names (an optimizer, say) does not exist.

    Args:
        settings: Finalized settings.

    Returns:
        The recipe of their objective.

    Raises:
        ConfigError: There is no such thing.
    """
    load_optimizer(settings.optimizer)
    load_schedule(settings.schedule)
    return recipe_for(settings)


def load_data(recipe: Recipe) -> tuple[Any, list[Records]]:
    """The tokenizer, and the records to train on, then those to evaluate on if there are any.

    Args:
        recipe: What reads them.

    Returns:
        Both.

    Raises:
        ConfigError: There is no tokenizer, or it does not fit the rows.
        DataError: The rows cannot be used.
    """
    settings = recipe.settings
    source = model_source(settings)
    if settings.trust_remote_code:
        log.warning("trust_remote_code: Python code that comes with the model will run")
    own = settings.model if is_adapter(settings.model) else source
    tokenizer = recipe.load_tokenizer(resolve_source(settings.tokenizer or own, kind="tokenizer"))
    extend_tokenizer(tokenizer, settings.add_tokens, settings.add_special_tokens)
    with waiting(f"reading {describe_source(settings.data)}"):
        streams = is_stream(settings, parts_of(settings.data))
        read = _open_stream if streams else _read
        data = [read(recipe, settings.data, tokenizer, None)]
    for held_out in evaluation_sets(settings).values():
        with waiting(f"reading {describe_source(held_out)}"):
            data.append(_read(recipe, held_out, tokenizer, data[0]))
    for records in data:
        if records.report is None:  # read by a recipe of the user's own
            with_report(records, (), tokenizer, format="records")
    return tokenizer, data


def _open_stream(
    recipe: Recipe, source: Source, tokenizer: Any, like: Records | None
) -> StreamRecords:
    """Records of streams, made of some of their rows at a time."""
    settings, parts = recipe.settings, parts_of(source)

    def make(rows: list[Row]) -> Records:
        columns = [settings.columns if part.columns is None else part.columns for part in parts]
        named = [row for each in rows for row in rename_columns([each], columns[each.source])]
        with waiting(f"reading {describe_source(source)}"):
            return _read(recipe, named, tokenizer, like, name=describe_source(source))

    return StreamRecords(
        MixedStream(parts), make, seed=settings.seed, buffer=settings.shuffle_buffer
    )


def _read(
    recipe: Recipe, source: Any, tokenizer: Any, like: Records | None, *, name: str = ""
) -> Records:
    """Records of a source; whatever reading its rows raises is an error of the data."""
    try:
        return recipe.read(source, tokenizer, like)
    except Exception as error:
        if is_no_fault_of_input(error):
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"{name or describe_source(source)}: the rows could not be read "
            f"({type(error).__name__}: {reason}); --debug shows where"
        ) from error


def described(settings: TrainSettings, data: Sequence[Records]) -> list[str]:
    """What was read of each source, for people.

    Args:
        settings: ``data``, ``eval_data``.
        data: What `load_data` gave.

    Returns:
        Some lines for each.
    """
    sources = (settings.data, *evaluation_sets(settings).values())
    lines = [
        records.report.render(describe_source(source))
        for source, records in zip(sources, data, strict=True)
        if records.report is not None
    ]
    if isinstance(settings, GenerationFields) and settings.generates:
        lines.append(describe_generation(settings))
    if isinstance(data[0], StreamRecords):
        lines.insert(1, data[0].describe())
    mix = training_mix(data[0], settings)
    return lines if mix is None else [*lines, mix.describe(parts_of(settings.data))]


def read_only(settings: TrainSettings) -> list[str]:
    """Read the data as a run would, and say what it would learn; nothing else is loaded.

    Args:
        settings: Finalized settings.

    Returns:
        Some lines for each source, and one for the steps.

    Raises:
        ConfigError: As for `load_data`.
        DataError: As for `load_data`.
    """
    _, data = load_data(check_references(settings))
    return what_is_learned(settings, data)


def what_is_learned(settings: TrainSettings, data: Sequence[Records]) -> list[str]:
    """Say what was read, and in how many steps it would be learned.

    Args:
        settings: Finalized settings.
        data: What `load_data` gave.

    Returns:
        Some lines for each source, and one for the steps.
    """
    size = (
        f"{settings.batch_size} examples"
        if settings.batch_size
        else (f"{settings.batch_tokens} tokens")
    )
    steps = total_steps(data[0], settings)
    if isinstance(settings, GenerationFields) and settings.generates:
        completions = f" ({(settings.batch_size or 0) * settings.completions} completions)"
        size = f"{settings.batch_size} prompts{completions}"
    return [*described(settings, data), f"{steps} steps of {size}; nothing was trained or written"]


def total_steps(records: Records, settings: TrainSettings) -> int:
    """How many steps a run takes.

    Args:
        records: Training records.
        settings: ``steps``, or ``epochs``.

    Returns:
        Their number.
    """
    if settings.steps is not None:
        return settings.steps
    assert settings.epochs is not None
    return num_steps(
        records.lengths,
        seed=settings.seed,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        batch_tokens=settings.batch_tokens,
        mix=training_mix(records, settings),
    )
