"""The settings of a run that do not depend on what it optimises, and how they fit together."""

import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from samestep.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from samestep.data.collate import Padding
    from samestep.data.records import Records
    from samestep.engine.terms import Objective


class TrainConfig(BaseModel):
    """The settings that all objectives share; each objective's own class adds its own.

    The base class of `samestep.train.objectives`: a subclass says which rows it reads, which model
    it trains, and what it optimises.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        """Check every field by itself; `checked` looks at combinations.

        Raises:
            ConfigError: All fields that are wrong, in one message.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems = _describe(error, type(self).model_fields)
            raise ConfigError("\n".join(["the settings are wrong:", *problems])) from None

    objective: str
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""
    model: str
    """Hub name, folder, or .gguf file."""
    data: str
    """Training rows: a .jsonl, .json, .csv or .parquet file, a folder of them, or a Hub name."""
    out: str
    """Folder for the log, the checkpoints and the trained model."""

    tokenizer: str | None = None
    """Hub name or folder, if it is not beside the model."""
    init: Literal["pretrained", "random"] = "pretrained"
    """Start from the model's weights, or from random ones (needs its config alone)."""
    eval_data: str | None = None
    """Rows to evaluate on, before, after, and every --eval-every steps."""
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

    optimizer: Literal["adamw", "sgd", "adafactor"] = "adamw"
    """Update rule, PyTorch's own."""
    lr: float = Field(default=2e-5, gt=0)
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
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

    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the weights and of the computation; gradients add up in float32 at least."""
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
    mixed_precision: bool = False
    """fsdp2: compute in bfloat16 over weights of --dtype; gradients add up in float32."""
    cpu_offload: bool = False
    """fsdp2: keep shards and optimizer state in the CPU's memory."""
    rank_timeout: float = Field(default=600.0, ge=1)
    """Seconds without progress after which a run on several ranks gives up, naming the rank."""
    not_finite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is not finite: end the run, or go on without it."""

    eval_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations."""
    save_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; by default only at the end."""
    keep: int = Field(default=2, ge=1)
    """Checkpoints to keep."""
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Also log to these."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint."""
    overwrite: bool = False
    """Replace the run in --out."""

    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    """The class of transformers that loads the model."""
    task: ClassVar[str] = "CAUSAL_LM"
    """What PEFT calls the kind of the model; it decides which heads train beside adapters, and
    whether only a decoder's targets are looked at."""

    calibrated: ClassVar[bool] = True
    """Whether the cost of micro-batches is measured where ``micro_tokens`` is auto."""

    def load_tokenizer(self, source: str) -> Any:
        """What reads the rows and is saved beside the model: a tokenizer.

        Args:
            source: What `samestep.models.load.resolve_source` gave.

        Raises:
            ConfigError: There is none, or it cannot be read.
        """
        from samestep.models.load import load_tokenizer

        return load_tokenizer(source, trust_remote_code=self.trust_remote_code)

    def pad_id(self, tokenizer: Any) -> int:
        """What padding is filled with; nothing depends on it."""
        return tokenizer.pad_token_id or 0

    def read(self, source: str, tokenizer: Any, like: "Records | None" = None) -> "Records":
        """The records of a data source.

        Args:
            source: A value of ``data`` or ``eval_data``.
            tokenizer: The model's tokenizer.
            like: The training records, when those to evaluate on are read.

        Returns:
            At least one record.

        Raises:
            DataError: The rows cannot be used.
        """
        raise NotImplementedError

    def load(self, source: str, data: Sequence["Records"]) -> Any:
        """The model to train, on the CPU, in train mode.

        Args:
            source: What `samestep.models.load.resolve_source` gave.
            data: The training records, then those to evaluate on if there are any.

        Returns:
            A model of ``auto_class``.
        """
        return self.load_with(source)

    def load_with(self, source: str, **settings: Any) -> Any:
        """The model, with settings of its config such as the number of classes."""
        import torch

        from samestep.models.load import load_model

        return load_model(
            source,
            auto_class=self.auto_class,
            init=self.init,
            dtype=getattr(torch, self.dtype),
            seed=self.seed,
            trust_remote_code=self.trust_remote_code,
            settings=settings,
        )

    def collate(
        self,
        data: "Records",
        indices: Sequence[int],
        *,
        padding: "Padding",
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
        from samestep.data.collate import collate_records

        return collate_records([data[at] for at in indices], padding=padding, pad_id=pad_id)

    def check_fit(self, model: Any, data: Sequence["Records"]) -> None:
        """Refuse data that the model cannot take.

        Args:
            model: The model.
            data: As for `load`.

        Raises:
            ConfigError: A token or a position has no embedding.
        """
        from samestep.models.load import check_token_range

        check_token_range(model, dict(zip(("data", "eval_data"), data, strict=False)))

    def layout(self, model: Any) -> "Padding":
        """The layout of micro-batches; the model's attention is set to serve it.

        Args:
            model: On its device.

        Raises:
            ConfigError: The layout asked for lets sequences see each other.
        """
        from samestep.models.probes import choose_padding

        return choose_padding(model, self.padding, self.outputs)

    def checkpoint_activations(self, model: Any) -> None:
        """Choose what the model keeps for its backward; under auto everything, to begin with."""
        from samestep.models.activations import checkpoint_activations

        mode = self.gradient_checkpointing
        checkpoint_activations(model, "none" if mode == "auto" else mode)

    def recompute(self, model: Any) -> bool:
        """Under ``gradient_checkpointing`` auto: keep less for the backward from here on.

        Args:
            model: The model, changed in place.

        Returns:
            Whether it was changed.
        """
        from samestep.models.activations import checkpoint_activations

        # What is offloaded cannot be computed again, too: see `samestep.train.checked`.
        fixed = self.gradient_checkpointing != "auto" or self.activation_offload
        done = model.is_gradient_checkpointing or not model.supports_gradient_checkpointing
        if fixed or done:
            return False
        checkpoint_activations(model, "selective")
        return True

    def outputs(self, model: Any, micro: dict[str, Any]) -> "Tensor":
        """What the model makes of a micro-batch: a sequence must not change its neighbour's part.

        Args:
            model: The model.
            micro: At least ``input_ids``.

        Returns:
            [rows, length, ...] by token, or [sequences, width].
        """
        from samestep.models.probes import logits_of

        return logits_of(model, micro)

    def build(self, model: Any, data: Sequence["Records"]) -> "Objective":
        """What to optimise.

        Args:
            model: The model, on its device, with its adapters.
            data: As for `load`.

        Returns:
            The objective.

        Raises:
            ConfigError: A setting does not fit the model or the data.
        """
        raise NotImplementedError

    def problems(self) -> list[str]:
        """Contradictions between the objective's own settings, a line each."""
        return []

    def saved(self) -> dict[str, Any]:
        """The settings that ``config.yaml`` keeps: all but how this call treats ``out``."""
        return self.model_dump(mode="json", exclude={"resume", "overwrite"})


SAME_STEP = frozenset(
    {
        *("micro_batch", "micro_tokens", "memory_limit", "padding", "gradient_checkpointing"),
        *("activation_offload", "device"),
        *("ranks", "parallel", "cpu_offload", "rank_timeout", "not_finite"),
        *("eval_data", "eval_every", "save_every", "keep", "track", "merge", "out"),
    }
)
"""Settings that a resumed run may change, because they cannot change a step."""


def _describe(error: ValidationError, known: Iterable[str]) -> list[str]:
    """Pydantic's problems, a line a field: the value, and the nearest name of one that is not."""
    lines: dict[str, str] = {}
    for problem in error.errors():
        field = str(problem["loc"][0])
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(field, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            lines[field] = f"  - {field}: no such field{hint}"
        elif field in lines:  # another member of a union
            lines[field] += f", or {problem['msg'].lower()}"
        else:
            lines[field] = f"  - {field}: found {problem['input']!r}; {problem['msg'].lower()}"
    return list(lines.values())
