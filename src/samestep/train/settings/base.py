"""The settings of a run that do not depend on what it optimises, and how they fit together."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import tyro
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from samestep.errors import ConfigError
from samestep.train.optim import OPTIMIZERS, SCHEDULES
from samestep.train.settings.peers import peer_notes
from samestep.utils.messages import describe_validation_errors
from samestep.utils.plugins import is_reference

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
        *("activation_offload", "device"),
        *("ranks", "parallel", "cpu_offload", "rank_timeout", "not_finite"),
        *("eval_data", "eval_every", "save_every", "save_minutes", "keep", "track", "merge", "out"),
    }
)
"""Settings that a resumed run may change, because they cannot change a step."""


_LORA_LR_FACTOR = 10
"""How much higher the default rate of adapters is: they start at 0, and are few."""


def _row_of(table: Mapping[str, Any]) -> Any:
    """Checks a field that names a row of a table, or by its form an object of the user's own."""

    def check(name: str) -> str:
        if name not in table and not is_reference(name):
            raise PydanticCustomError(
                "not_in_table",
                "should be {expected}, or file.py:name or package.module:name of one of your own",
                {"expected": " or ".join(repr(row) for row in table)},
            )
        return name

    return AfterValidator(check)


def _shown_as(table: Mapping[str, Any]) -> Any:
    """How ``--help`` shows the values of such a field."""
    return tyro.conf.arg(metavar="{" + ",".join(table) + "}|FILE.py:NAME|MODULE:NAME")


def _one_or_several(value: Any) -> Any:
    """One source as itself, as it always was; several as a tuple."""
    if isinstance(value, list | tuple):
        return value[0] if len(value) == 1 else tuple(value)
    return value


_SOURCES = BeforeValidator(_one_or_several)


class TrainSettings(BaseModel):
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
                error, fields, renamed=RENAMED_FIELDS, elsewhere=peer_notes(fields)
            )
            raise ConfigError("\n  - ".join(["the settings are wrong:", *problems])) from None

    objective: str
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""
    model: str
    """Hub name, folder, or .gguf file."""
    data: Annotated[str | tuple[str, ...], _SOURCES]
    """Training rows: a .jsonl, .json, .csv, .tsv or .parquet file, a folder of them, a pattern or a
    Hub name; several are read in order."""
    out: str
    """Folder for the log, the checkpoints and the trained model."""

    tokenizer: str | None = None
    """Hub name or folder, if it is not beside the model."""
    init: Literal["pretrained", "random"] = "pretrained"
    """Start from the model's weights, or from random ones (needs its config alone)."""
    eval_data: Annotated[str | tuple[str, ...] | None, _SOURCES] = None
    """Rows to evaluate on, before, after, and every --eval-every steps."""
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

    optimizer: Annotated[str, _row_of(OPTIMIZERS), _shown_as(OPTIMIZERS)] = "adamw"
    """Update rule: PyTorch's own, or a subclass of torch.optim.Optimizer of one's own."""
    lr: float = Field(default=2e-5, gt=0)
    """Peak learning rate; with --lora-rank ten times as high by default, 2e-4."""
    schedule: Annotated[str, _row_of(SCHEDULES), _shown_as(SCHEDULES)] = "linear"
    """How the learning rate falls after warm-up; linear and cosine end at 0."""
    warmup: float = Field(default=0.0, ge=0)
    """Warm-up: a share of the steps if below 1, else a number of steps."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay, on matrices only."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Clip the gradient's global norm; None: do not."""

    lora_rank: int | None = Field(default=None, ge=1)
    """Train LoRA adapters of this rank instead of all weights."""
    lora_alpha: float | None = Field(default=None, gt=0)
    """LoRA's scale; by default twice the rank."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the adapters; its masks belong to the examples, so the step stays exact."""
    lora_targets: tuple[str, ...] = ("all-linear",)
    """Names of the modules that get adapters."""
    merge: bool = False
    """Fold the adapters into the saved model."""

    precision: Literal["auto", "mixed", "float32", "bfloat16", "float64"] = "auto"
    """Types of weights and products. mixed: products in bfloat16, weights that train in float32;
    bfloat16: weights too, which loses small updates; auto: mixed on a GPU that has bfloat16, else
    float32. Gradients add up in float32 at least."""
    gradient_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    """What the backward computes again: nothing, all but matrix products and attention, or whole
    layers. auto: nothing, or (selective) where the longest row would not fit into memory. Changes
    speed and memory, not the step."""
    activation_offload: bool = False
    """On accelerators: activations wait for the backward in the CPU's memory, not recomputed."""
    device: str = "auto"
    """cpu, cuda, mps; auto takes what there is."""
    seed: int = Field(default=0, ge=0)
    """Of the random weights, the order of the data, and dropout."""

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

    eval_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations."""
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
    """Read the data, say what would be learned, show a row with its targets, and stop there."""

    def problems(self) -> list[str]:
        """Contradictions between the settings of the objective itself, a line each."""
        return []

    def saved(self) -> dict[str, Any]:
        """The settings that ``config.yaml`` keeps: all but how this call treats ``out``."""
        return self.model_dump(mode="json", exclude={"resume", "overwrite", "dry_run"})


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
    problems = [*settings.problems(), *_contradictions(settings)]
    if problems:
        raise ConfigError("\n".join(problems))
    filled: dict[str, Any] = {}
    if settings.batch_size is None and settings.batch_tokens is None:
        filled["batch_size"] = 32
    if settings.steps is None and settings.epochs is None:
        filled["epochs"] = 1
    if settings.lora_rank is not None and settings.lora_alpha is None:
        filled["lora_alpha"] = 2.0 * settings.lora_rank
    chosen = settings.model_fields_set | filled.keys()
    if settings.lora_rank is not None and "lr" not in chosen:
        filled["lr"] = _LORA_LR_FACTOR * settings.lr
    result = settings.model_copy(update=filled)
    result.model_fields_set.intersection_update(chosen)
    return result


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
    if settings.batch_size is not None and settings.batch_tokens is not None:
        problems.append("batch_size and batch_tokens are both given: keep one")
    if settings.steps is not None and settings.epochs is not None:
        problems.append("steps and epochs are both given: keep one")
    if isinstance(settings.micro_tokens, int) and settings.micro_tokens < 1:
        problems.append(f"micro_tokens: at least 1, or 'auto', not {settings.micro_tokens}")
    if settings.micro_batch is not None and settings.micro_tokens != "auto":
        problems.append("micro_batch and micro_tokens are both given: keep one")
    if settings.activation_offload and settings.gradient_checkpointing in ("selective", "full"):
        problems.append("activation_offload: it needs gradient_checkpointing none")
    if settings.resume and settings.overwrite:
        problems.append("resume and overwrite contradict each other")
    if settings.lora_rank is None:
        lora = ("lora_alpha", "lora_dropout", "lora_targets", "merge")
        defaults = TrainSettings.model_fields
        set_anyway = [name for name in lora if getattr(settings, name) != defaults[name].default]
        problems += [f"{name} is given without lora_rank" for name in set_anyway]
    return problems
