"""The settings of a run that do not depend on what it optimises, and how they fit together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError

from samestep.errors import ConfigError
from samestep.train.settings.adapters import (
    AdapterFields,
    adapter_problems,
    with_saved_adapter,
)
from samestep.train.settings.evaluation import (
    CHOSEN_BY,
    EVALUATION_MAY_CHANGE,
    EvaluationFields,
    evaluation_problems,
    evaluation_sets,
    one_or_several,
)
from samestep.train.settings.optimization import (
    OptimizationFields,
    optimization_problems,
    pairs_of_flags,
)
from samestep.train.settings.peers import peer_notes
from samestep.train.settings.rollouts import ROLLOUTS_MAY_CHANGE
from samestep.train.settings.streams import StreamFields, is_stream, stream_problems
from samestep.train.settings.vocabulary import VocabularyFields, vocabulary_problems
from samestep.utils.flags import leaf
from samestep.utils.messages import describe_validation_errors
from samestep.utils.sources import DataSource, Source, parts_of

RENAMED_FIELDS = {
    "centring": "center_rewards",
    "dtype": "precision",
    "mixed_precision": "precision",
}
"""Former names of fields, and what they are called now."""


def with_current_names(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a ``config.yaml`` that an earlier version may have written, named as today.

    Args:
        saved: Values by name.

    Returns:
        Values by today's name. ``mixed_precision`` was a switch beside ``dtype``.
    """
    mixed = saved.get("mixed_precision", False)
    fields = {
        RENAMED_FIELDS.get(name, name): value
        for name, value in saved.items()
        if name != "mixed_precision"
    }
    return fields | {"precision": "mixed"} if mixed else fields


RESUME_MAY_CHANGE = frozenset(
    {
        *("micro_batch", "micro_tokens", "memory_limit", "padding", "gradient_checkpointing"),
        *("activation_offload", "device", "threads", "compile", "deterministic"),
        *("ranks", "parallel", "cpu_offload", "rank_timeout", "not_finite"),
        *EVALUATION_MAY_CHANGE,
        *ROLLOUTS_MAY_CHANGE,
        "generation_batch",
        *("save_every", "save_minutes", "keep", "track", "merge", "out"),
    }
)
"""Settings that a resumed run may change, because they cannot change a step."""

DEFINES_BITS = frozenset(
    {
        *("micro_batch", "micro_tokens", "padding", "gradient_checkpointing", "threads"),
        *("compile", "generation_batch"),
    }
)
"""Those of them that a run under ``bitwise`` keeps: they cannot change the step, but its bits."""

BITWISE_MICRO_TOKENS = 1024
"""Tokens a pack under ``bitwise`` where none are given: no measurement may choose them."""


_LORA_LR_FACTOR = 10
"""How much higher the default rate of adapters is: they start at 0, and are few."""


_SOURCES = BeforeValidator(one_or_several)


class TrainSettings(
    EvaluationFields, OptimizationFields, AdapterFields, VocabularyFields, StreamFields
):
    """The settings that all objectives share; each objective's own class adds its own."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def __init__(self, **values: Any) -> None:
        """Check every field by itself; `finalize` looks at combinations.

        Raises:
            ConfigError: All fields that are wrong, in one message.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            fields = type(self).model_fields
            problems = describe_validation_errors(
                error,
                fields,
                renamed=RENAMED_FIELDS,
                elsewhere=peer_notes(fields),
            )
            raise ConfigError("\n  - ".join(["the settings are wrong:", *problems])) from None

    objective: str
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""
    model: str
    """Hub name, folder, or .gguf file."""
    data: Annotated[Source, _SOURCES, leaf("SOURCE ...")]
    """Training rows: a .jsonl, .json, .csv, .tsv or .parquet file, a folder of them, a pattern, a
    URL or a Hub name; several are read in order. In YAML a source may be {path, split, config,
    columns, weight, rows}: its share, or its number of rows, of every epoch."""
    out: str
    """Folder for the log, the checkpoints and the trained model."""

    tokenizer: str | None = None
    """Hub name or folder, if it is not beside the model."""
    init: Literal["pretrained", "random"] = "pretrained"
    """Start from the model's weights, or from random ones (needs its config alone)."""
    columns: Annotated[
        dict[str, str], BeforeValidator(pairs_of_flags), leaf("KNOWN=THEIRS ...")
    ] = Field(default={})
    """Columns that the rows call otherwise, as in prompt=question; of sources without their own."""
    row_format: str | None = None
    """What turns columns of your own into known ones: file.py:name or package.module:name."""
    max_length: int | None = Field(default=None, ge=2)
    """Cut rows after this many tokens; by default not at all."""
    append_eos: bool = True
    """End texts and completions with the end-of-sequence token."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    batch_size: int | None = Field(default=None, ge=1)
    """Examples a step (32, unless --batch-tokens is given)."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Input tokens a step, instead of --batch-size."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Sequences a micro-batch. Changes speed and memory, not the step."""
    micro_tokens: int | Literal["auto"] = "auto"
    """Tokens a micro-batch, unless --micro-batch is given. Not the step either."""
    memory_limit: float | None = Field(default=None, gt=0)
    """GB that --micro-tokens auto may fill (80 % of what is free). Not the step either."""
    padding: Literal["auto", "none", "right", "left"] = "auto"
    """How micro-batches are laid out; auto: none, where the model allows. Not the step either."""

    steps: int | None = Field(default=None, ge=1)
    """Steps to train, instead of --epochs."""
    epochs: int | None = Field(default=None, ge=1)
    """Passes over the data (1, unless --steps is given)."""

    precision: Literal["auto", "mixed", "float32", "bfloat16", "float64"] = "auto"
    """Types of weights and products. mixed: products in bfloat16, weights that train in float32;
    bfloat16: weights too, which loses small updates; auto: mixed on a GPU that has bfloat16, else
    float32. Gradients add up in float32 at least."""
    gradient_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    """What the backward computes again: nothing, all but matrix products and attention, or whole
    layers. auto: nothing, or (selective) where the longest row would not fit into memory. Changes
    speed and memory, not the step."""
    compile: Literal["auto", "none", "layers"] = "auto"
    """layers: torch.compile of each decoder layer, once for all lengths. auto: on accelerators, if
    that is measured to be faster and the run is long enough to earn it back. Not the step."""
    activation_offload: bool = False
    """On accelerators: activations wait for the backward in the CPU's memory, not recomputed."""
    device: str = "auto"
    """cpu, cuda, mps; auto takes what there is."""
    deterministic: bool = False
    """On accelerators: kernels that give the same bits each time, so that a resumed run equals an
    uninterrupted one bit for bit, as it does on a CPU anyway. Slower; not the step either."""
    seed: int = Field(default=0, ge=0)
    """Of the random weights, the order of the data, and dropout."""

    bitwise: bool = False
    """The same bits on any number of ranks, through any interruption; `samestep verify` checks
    them. The packs (--micro-tokens or --micro-batch) are then part of the run."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of each process on a CPU. Changes speed, not the step; under --bitwise part of the
    run, as many as there are when it starts."""

    ranks: int | None = Field(default=None, ge=1)
    """Processes to start on this machine. Under torchrun it is torchrun that says how many."""
    parallel: Literal["auto", "ddp", "fsdp2"] = "auto"
    """Weights on every rank (ddp), or sharded over them (fsdp2); auto: ddp where they fit."""
    cpu_offload: bool = False
    """fsdp2: keep shards and optimizer state in the CPU's memory."""
    rank_timeout: float = Field(default=600.0, ge=1)
    """Seconds in which nothing moves, after which several ranks give up, naming the rank; six times
    that in loading, three times in saving."""
    not_finite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is not finite: end the run, or go on without it."""

    save_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints, beside --save-minutes."""
    save_minutes: float | None = Field(default=10.0, gt=0)
    """Minutes after which a step is followed by a checkpoint; None: by --save-every alone."""
    keep: int = Field(default=2, ge=0)
    """Checkpoints to keep; 0: two on the way, and none once the model is saved."""
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Also log to these."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint."""
    overwrite: bool = False
    """Replace the run in --out."""
    dry_run: bool = False
    """Read the data, say what would be learned, show a row with its targets, what a step takes in
    memory and time, and stop there."""
    measure: bool = True
    """In a dry run: load the model and take a step of it, as far as it goes in 10 seconds. Without,
    memory is counted from the model's config, and no weight is loaded."""

    def problems(self) -> list[str]:
        """Contradictions between the settings of the objective itself, a line each."""
        return []

    def saved(self) -> dict[str, Any]:
        """The settings that ``config.yaml`` keeps: all but how this call treats ``out``."""
        return self.model_dump(mode="json", exclude={"resume", "overwrite", "dry_run", "measure"})


@dataclass(frozen=True)
class ObjectiveRow:
    """A row of the table of objectives, `samestep.train.settings.objectives.OBJECTIVES`.

    Attributes:
        settings: The class of its settings.
        recipe: ``module:Class`` of its recipe, imported when a run begins: it needs PyTorch.
    """

    settings: type[TrainSettings]
    recipe: str


Settings = TypeVar("Settings", bound=TrainSettings)


def finalize(settings: Settings) -> Settings:
    """Check the settings against each other, and fill in the defaults that depend on others.

    Args:
        settings: Each field right by itself.

    Returns:
        The settings that a run takes.

    Raises:
        ConfigError: All contradictions, in one message.
    """
    settings, adapter = with_saved_adapter(settings, settings.model, settings.init)
    problems = [
        *adapter,
        *settings.problems(),
        *_contradictions(settings),
        *optimization_problems(settings),
        *adapter_problems(settings),
        *vocabulary_problems(settings),
        *evaluation_problems(settings, settings.objective),
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    filled: dict[str, Any] = {}
    if settings.batch_size is None and settings.batch_tokens is None:
        filled["batch_size"] = 32
    if settings.steps is None and settings.epochs is None:
        filled["epochs"] = 1
    if settings.bitwise:
        filled |= _defined_bits(settings)
    if settings.lora_rank is not None and settings.lora_alpha is None:
        filled["lora_alpha"] = 2.0 * settings.lora_rank
    chosen = settings.model_fields_set | filled.keys()
    if settings.lora_rank is not None and "lr" not in chosen:
        filled["lr"] = _LORA_LR_FACTOR * settings.lr
    result = settings.model_copy(update=filled)
    result.model_fields_set.intersection_update(chosen)
    return result


def _defined_bits(settings: TrainSettings) -> dict[str, Any]:
    """What ``auto`` is where nothing may depend on a machine's memory or on a measurement."""
    filled: dict[str, Any] = {"parallel": "ddp"}
    if settings.micro_tokens == "auto" and settings.micro_batch is None:
        filled["micro_tokens"] = BITWISE_MICRO_TOKENS
    if settings.gradient_checkpointing == "auto":
        filled["gradient_checkpointing"] = "none"
    if settings.compile == "auto":
        filled["compile"] = "none"
    return filled


def resume_may_change(before: Mapping[str, Any], settings: TrainSettings) -> frozenset[str]:
    """The settings that a resumed run may change.

    Args:
        before: Those that the run had.
        settings: Those that it is to go on with.

    Returns:
        Their names: under ``bitwise`` those that change no bit, which a run may leave; not those by
        which its model is chosen.
    """
    free = RESUME_MAY_CHANGE - set(CHOSEN_BY if settings.best is not None else ())
    if not settings.bitwise:
        return free | ({"bitwise"} if before.get("bitwise") else set())
    return free - (DEFINES_BITS - ({"threads"} if settings.threads is None else set()))


_LARGEST = 2**63 - 1
"""Whole numbers that a setting may have: those beyond it are none to libraries in C."""


def _too_large(settings: TrainSettings) -> list[str]:
    return [
        f"{name}: {value} is too large (at most {_LARGEST:,})"
        for name, value in settings
        if isinstance(value, int) and abs(value) > _LARGEST
    ]


def _contradictions(settings: TrainSettings) -> list[str]:
    problems = _too_large(settings)
    if settings.bitwise and settings.parallel == "fsdp2":
        problems.append(
            "bitwise: not under parallel fsdp2, which sums in an order that depends on the ranks"
        )
    if settings.quantization is not None and settings.parallel == "fsdp2":
        problems.append(
            "quantization: not under parallel fsdp2, which has no shards of quantised weights; use "
            "ddp"
        )
    if settings.quantization is not None and settings.compile == "layers":
        problems.append("compile: layers over quantised weights run uncompiled; use auto or none")
    if settings.quantization is not None and settings.init == "random":
        problems.append("quantization: it stores pretrained weights; init random has none")
    if settings.bitwise and settings.precision == "float64":
        problems.append(
            "bitwise: sums keep fewer bits than float64 has: precision float32 or mixed"
        )
    if settings.batch_size is not None and settings.batch_tokens is not None:
        problems.append("batch_size and batch_tokens are both given: keep one")
    if settings.steps is not None and settings.epochs is not None:
        problems.append("steps and epochs are both given: keep one")
    for name, source in [("data", settings.data), *evaluation_sets(settings).items()]:
        if not all(part.path for part in parts_of(source)):
            problems.append(f"{name or 'eval_data'}: a source has an empty name")
    parts = parts_of(settings.data)
    problems += [] if is_stream(settings, parts) else _mix_problems(parts)
    sets = evaluation_sets(settings).values()
    problems += stream_problems(
        settings,
        parts,
        objective=settings.objective,
        evaluated=[part for source in sets for part in parts_of(source)],
        lengths={
            name: bool(getattr(settings, name, None))
            for name in ("steps", "epochs", "bitwise", "precompute_reference")
        },
    )
    if isinstance(settings.micro_tokens, int) and settings.micro_tokens < 1:
        problems.append(f"micro_tokens: at least 1, or 'auto', not {settings.micro_tokens}")
    if settings.micro_batch is not None and settings.micro_tokens != "auto":
        problems.append("micro_batch and micro_tokens are both given: keep one")
    if settings.activation_offload and settings.gradient_checkpointing in ("selective", "full"):
        problems.append("activation_offload: it needs gradient_checkpointing none")
    if settings.compile == "layers" and (
        settings.activation_offload or settings.gradient_checkpointing in ("selective", "full")
    ):
        problems.append(
            "compile: layers that recompute or offload their activations run uncompiled; use auto, "
            "or gradient_checkpointing none without activation_offload"
        )
    if settings.resume and settings.overwrite:
        problems.append("resume and overwrite contradict each other")
    return problems


def _mix_problems(parts: Sequence[DataSource]) -> list[str]:
    """Contradictions between sources that an epoch takes parts of."""
    problems = []
    weighed = [part.path for part in parts if part.weight is not None]
    counted = [part.path for part in parts if part.rows is not None]
    if weighed and counted:
        problems.append("data: weight and rows are both given: keep one of them for all sources")
    elif weighed and len(weighed) < len(parts):
        others = [part.path for part in parts if part.weight is None]
        problems.append(f"data: {', '.join(others)} has no weight: all sources need one, or none")
    return problems
