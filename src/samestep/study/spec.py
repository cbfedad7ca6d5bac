"""What a study compares: axes, blocks of arms, and the settings that all arms share."""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Normalisation = Literal["exact", "mean-of-means", "sum"]
"""How an arm divides. Only "exact" is right; the others exist to be measured."""

PaddingChoice = Literal["auto", "none", "right", "left"]

AXES = ("batch", "split", "normalisation", "padding", "lr", "cut", "seeds")
"""The fields that a block of arms may set for itself."""

_SPLIT = re.compile(r"\s*(\d+)\s*[x\u00d7]\s*(\d+)\s*")


def _listed(value: Any) -> Any:
    """One value stands for a list of one."""
    return value if isinstance(value, list | tuple) else [value]


def _split(value: Any) -> Any:
    match = _SPLIT.fullmatch(value) if isinstance(value, str) else None
    if match is None or "0" in match.groups():
        raise ValueError("write micro-batch x accumulation, as in '8 x 4'")
    return f"{int(match[1])} x {int(match[2])}"


Split = Annotated[str, BeforeValidator(_split)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0)]


class Axes(BaseModel):
    """The axes of a grid; every combination of the listed values is an arm."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    batch: int = Field(default=32, ge=1)
    """Effective batch: examples a step."""
    split: Annotated[tuple[Split, ...], BeforeValidator(_listed)] = ()
    """Micro-batch x accumulation, as "8 x 4"; the product is the batch. Default: batch x 1, and
    1 x batch."""
    normalisation: Annotated[tuple[Normalisation, ...], BeforeValidator(_listed)] = ("exact",)
    """exact; or, to see what they do: mean-of-means (wrong), sum (wrong)."""
    padding: Annotated[tuple[PaddingChoice, ...], BeforeValidator(_listed)] = ("auto",)
    """Layout of the micro-batches: auto, none (packed), right, left."""
    lr: Annotated[tuple[Positive, ...], BeforeValidator(_listed)] = (2e-5,)
    """Peak learning rate."""
    cut: Annotated[tuple[Share, ...], BeforeValidator(_listed)] = (0.0,)
    """Share of the rows whose completion is cut to --cut-targets tokens: spreads the lengths."""
    seeds: Annotated[tuple[Seed, ...], BeforeValidator(_listed)] = (0,)
    """Of the order of the data and of random weights; each arm runs once a seed."""

    @model_validator(mode="after")
    def _complete(self) -> "Axes":
        if not self.split:
            ends = dict.fromkeys((f"{self.batch} x 1", f"1 x {self.batch}"))
            object.__setattr__(self, "split", tuple(ends))
        problems = [
            f"split {split!r} makes {micro * times} examples a step, but batch is {self.batch}"
            for split in self.split
            for micro, times in [parts(split)]
            if micro * times != self.batch
        ]
        empty = [name for name in AXES if getattr(self, name) == ()]
        problems += [f"{name} is empty, so the grid is" for name in empty]
        if problems:
            raise ValueError("; ".join(problems))
        return self


class Block(Axes):
    """Some arms of a study: a grid of its own over what it sets, the study's values elsewhere."""

    name: str | None = Field(default=None, min_length=1, max_length=200)
    """What to call the arm; only for a block of one arm."""

    @model_validator(mode="after")
    def _one_name(self) -> "Block":
        lists = (self.split, self.normalisation, self.padding, self.lr, self.cut)
        if self.name is not None and any(len(values) != 1 for values in lists):
            raise ValueError(f"name {self.name!r} is for one arm, but this block makes several")
        return self


class StudySpec(Axes):
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
    """Blocks of arms, instead of one grid over the axes (in YAML only)."""
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
        tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_listed)
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
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the weights and of the computation."""
    device: str = "auto"
    """cpu, cuda, mps; auto takes what there is."""

    @model_validator(mode="after")
    def _filled(self) -> "StudySpec":
        if self.arms == ():
            raise ValueError("arms is empty: leave it out for a grid over the axes, or list some")
        names = [block.name for block in self.arms or () if block.name is not None]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two arms are called {twice[0]!r}: a figure needs two names")
        if late := [step for step in self.gradient_steps if step >= self.steps]:
            raise ValueError(f"gradient_steps {late}: below steps ({self.steps})")
        filled = {
            "eval_every": self.eval_every or max(1, self.steps // 10),
            "gradient_steps": tuple(sorted(set(self.gradient_steps)))
            or tuple(sorted({0, self.steps // 2, self.steps - 1})),
        }
        for field, value in filled.items():
            object.__setattr__(self, field, value)
        return self

    def grid(self) -> list["Arm"]:
        """The arms in the order of the spec, each once."""
        blocks = self.arms or (Block(**{axis: getattr(self, axis) for axis in AXES}),)
        return list({arm.identity(): arm for block in blocks for arm in _arms(block)}.values())


@dataclass(frozen=True)
class Arm:
    """One configuration; it runs once for each seed.

    Attributes:
        batch: Examples a step.
        split: Micro-batch x accumulation.
        normalisation: How it divides.
        padding: Layout asked for.
        lr: Peak learning rate.
        cut: Share of the rows whose completion is cut.
        seeds: The seeds.
        name: A name given in the spec, or None.
    """

    batch: int
    split: str
    normalisation: Normalisation
    padding: PaddingChoice
    lr: float
    cut: float
    seeds: tuple[int, ...]
    name: str | None = None

    @property
    def micro_batch(self) -> int:
        """Examples a micro-batch."""
        return parts(self.split)[0]

    def identity(self) -> tuple[Any, ...]:
        """All that makes it another arm."""
        return (self.batch, self.split, self.normalisation, self.padding, self.lr, self.cut)

    def group(self) -> tuple[Any, ...]:
        """Arms of a group differ only in what must not matter."""
        return (self.batch, self.lr, self.cut)


def parts(split: str) -> tuple[int, int]:
    """Micro-batch and accumulation of a split "8 x 4"."""
    micro, times = split.split(" x ")
    return int(micro), int(times)


def _arms(block: Block) -> Iterator[Arm]:
    axes: tuple[Sequence[Any], ...] = (
        block.cut,
        block.lr,
        block.normalisation,
        block.split,
        block.padding,
    )
    for cut, lr, normalisation, split, padding in itertools.product(*axes):
        yield Arm(
            batch=block.batch,
            split=split,
            normalisation=normalisation,
            padding=padding,
            lr=lr,
            cut=cut,
            seeds=block.seeds,
            name=block.name,
        )
