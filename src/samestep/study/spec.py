"""The fields of ``study.yaml``, checked: one model, one data set, a grid of arms."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from samestep.errors import ConfigError
from samestep.train.settings.peers import peer_notes
from samestep.utils.messages import describe_validation_errors

Normalisation = Literal["exact", "mean-of-means", "sum"]
"""What an arm divides its loss by. Only "exact" is right; the others exist to be measured."""

PaddingChoice = Literal["auto", "none", "right", "left"]

GRID_FIELDS = ("batch", "split", "normalisation", "padding", "lr", "cut", "seeds")
"""The fields that a block of arms may set for itself."""

_SPLIT = re.compile(r"\s*(\d+)\s*[x\u00d7]\s*(\d+)\s*")


def split_sizes(split: str) -> tuple[int, int]:
    """The numbers of a split.

    Args:
        split: As in "8 x 4".

    Returns:
        Examples a micro-batch, and micro-batches a step.
    """
    micro_batch, num_micro_batches = split.split(" x ")
    return int(micro_batch), int(num_micro_batches)


def _as_list(value: Any) -> Any:
    """A single value stands for a list of one."""
    return value if isinstance(value, list | tuple) else [value]


def _canonical_split(value: Any) -> str:
    match = _SPLIT.fullmatch(value) if isinstance(value, str) else None
    if match is None or "0" in match.groups():
        raise ValueError("write micro-batch x accumulation, as in '8 x 4'")
    return f"{int(match[1])} x {int(match[2])}"


_Split = Annotated[str, BeforeValidator(_canonical_split)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Fraction = Annotated[float, Field(ge=0, le=1)]
_Seed = Annotated[int, Field(ge=0)]


class Grid(BaseModel):
    """Values for the fields in which arms differ; every combination is an arm."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    batch: int = Field(default=32, ge=1)
    """Effective batch: examples a step."""
    split: Annotated[tuple[_Split, ...], BeforeValidator(_as_list)] = ()
    """Micro-batch x accumulation, as "8 x 4"; the product is the batch. Default: batch x 1, and
    1 x batch."""
    normalisation: Annotated[tuple[Normalisation, ...], BeforeValidator(_as_list)] = ("exact",)
    """exact; or, to see what they do: mean-of-means (wrong), sum (wrong)."""
    padding: Annotated[tuple[PaddingChoice, ...], BeforeValidator(_as_list)] = ("auto",)
    """Layout of the micro-batches: auto, none (packed), right, left."""
    lr: Annotated[tuple[_Positive, ...], BeforeValidator(_as_list)] = (2e-5,)
    """Peak learning rate."""
    cut: Annotated[tuple[_Fraction, ...], BeforeValidator(_as_list)] = (0.0,)
    """Share of the rows whose completion is cut to --cut-targets tokens: spreads the lengths."""
    seeds: Annotated[tuple[_Seed, ...], BeforeValidator(_as_list)] = (0,)
    """Of the order of the data and of random weights; each arm runs once a seed."""

    @model_validator(mode="after")
    def _fill_and_check_splits(self) -> "Grid":
        if not self.split:
            extremes = dict.fromkeys((f"{self.batch} x 1", f"1 x {self.batch}"))
            object.__setattr__(self, "split", tuple(extremes))
        problems = [
            f"split {split!r} makes {micro_batch * number} examples a step, but batch is "
            f"{self.batch}"
            for split in self.split
            for micro_batch, number in [split_sizes(split)]
            if micro_batch * number != self.batch
        ]
        empty = [name for name in GRID_FIELDS if getattr(self, name) == ()]
        problems += [f"{name} is empty, so the grid is" for name in empty]
        if problems:
            raise ValueError("; ".join(problems))
        return self


class Block(Grid):
    """Some arms of a study: a grid of its own over what it sets, the study's values elsewhere."""

    name: str | None = Field(default=None, min_length=1, max_length=200)
    """What to call the arm; only for a block of one arm."""

    @model_validator(mode="after")
    def _check_name(self) -> "Block":
        lists = (self.split, self.normalisation, self.padding, self.lr, self.cut)
        if self.name is not None and any(len(values) != 1 for values in lists):
            raise ValueError(f"name {self.name!r} is for one arm, but this block makes several")
        if self.name is not None and not self.name.isprintable():
            raise ValueError(f"name {self.name!r} holds characters that cannot be shown")
        return self


class StudySpec(Grid):
    """A study: one model, one data set, a grid of arms."""

    model: str
    """Hub name, folder, or .gguf file."""
    data: str
    """Training rows, as for `samestep train`."""
    eval_data: str
    """Rows to evaluate on."""
    name: str = Field(default="study", min_length=1, max_length=200)
    """Title of the report."""
    arms: tuple[Block, ...] | None = None
    """Blocks of arms, instead of one grid over the study's own fields (in YAML only)."""
    tokenizer: str | None = None
    """Hub name or folder, if it is not beside the model."""
    init: Literal["pretrained", "random"] = "pretrained"
    """Start from the model's weights or, anew for each seed, from random ones."""
    rows: int | None = Field(default=None, ge=1)
    """Use the first so many training rows."""
    eval_rows: int | None = Field(default=None, ge=1)
    """Use the first so many evaluation rows."""
    max_length: int | None = Field(default=None, ge=2)
    """Cut rows after this many tokens."""
    cut_targets: int = Field(default=4, ge=1)
    """How many target tokens a cut completion keeps."""

    steps: int = Field(default=100, ge=1)
    """Steps of every run."""
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations; default: ten in a run. The first and the last are always made."""
    gradient_steps: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_as_list)
    ] = ()
    """After how many updates to compare the gradient with the reference's; default: 0, half, all
    but one."""
    optimizer: Literal["adamw", "sgd", "adafactor"] = "adamw"
    """Update rule."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after warm-up."""
    warmup: float = Field(default=0.0, ge=0)
    """Warm-up: a share of the steps if below 1, else a number of steps."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay, on matrices only."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Clip the gradient's global norm; None: do not."""
    precision: Literal["mixed", "float32", "bfloat16", "float64"] = "float32"
    """Types of weights and products, as of `samestep train`."""
    device: str = "auto"
    """cpu, cuda, mps; auto takes what there is."""

    @model_validator(mode="after")
    def _check_and_fill_steps(self) -> "StudySpec":
        if self.arms == ():
            raise ValueError("arms is empty: leave it out for a grid over the axes, or list some")
        names = [block.name for block in self.arms or () if block.name is not None]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two arms are called {repeated[0]!r}: a figure needs two names")
        if late := [step for step in self.gradient_steps if step >= self.steps]:
            raise ValueError(f"gradient_steps {late}: below steps ({self.steps})")
        defaults = {
            "eval_every": self.eval_every or max(1, self.steps // 10),
            "gradient_steps": tuple(sorted(set(self.gradient_steps)))
            or tuple(sorted({0, self.steps // 2, self.steps - 1})),
        }
        for field, value in defaults.items():
            object.__setattr__(self, field, value)
        return self


def parse_spec(fields: Mapping[str, Any], *, source: str) -> StudySpec:
    """A spec from plain values.

    Args:
        fields: Values by field; hyphens and underscores are the same.
        source: Where they are from, for the message.

    Returns:
        The spec, with its defaults filled in.

    Raises:
        ConfigError: Every problem, with the nearest valid name.
    """
    fields = _with_underscores(fields)
    problems: list[str] = []
    if isinstance(fields.get("arms"), list | tuple):
        problems = _overridden_everywhere(fields)
        inherited = {name: fields[name] for name in GRID_FIELDS if _is_valid(name, fields)}
        fields["arms"] = [
            {**inherited, **_with_underscores(block)} if isinstance(block, Mapping) else block
            for block in fields["arms"]
        ]
        # The study's own split need not fit its batch when the blocks bring theirs.
        fields.pop("split", None)
    try:
        spec = StudySpec.model_validate(fields)
    except ValidationError as error:
        problems += describe_validation_errors(
            error,
            StudySpec.model_fields,
            nested_fields={"arms": Block.model_fields},
            elsewhere=peer_notes(StudySpec.model_fields),
            renamed={"dtype": "precision"},
        )
    if problems:
        raise ConfigError("\n  - ".join([f"{source}:", *problems]))
    return spec


def _with_underscores(fields: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for name, value in fields.items():
        field = str(name).replace("-", "_")
        if field in plain:
            raise ConfigError(f"{field} is given twice, with a hyphen and without: keep one")
        plain[field] = value
    return plain


def _overridden_everywhere(fields: Mapping[str, Any]) -> list[str]:
    """A problem for each of the study's own grid fields that every block sets anew."""
    blocks = [_with_underscores(block) for block in fields["arms"] if isinstance(block, Mapping)]
    return [
        f"{name}: every block of arms sets its own, so this one has no effect"
        for name in GRID_FIELDS
        if name in fields and blocks and all(name in block for block in blocks)
    ]


def _is_valid(name: str, fields: Mapping[str, Any]) -> bool:
    """Whether blocks can inherit a field; a wrong one is reported once, not in each of them."""
    if name not in fields or name == "split":
        return name in fields
    try:
        Grid.model_validate({name: fields[name]})
    except ValidationError:
        return False
    return True
