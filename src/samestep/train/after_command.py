"""`samestep generate`, `samestep eval` and `samestep export`: what is done with a finished run."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from samestep.errors import ConfigError
from samestep.utils.plugins import nearest
from samestep.utils.text import printable

_Arguments = TypeVar("_Arguments")


@dataclass(frozen=True)
class GenerateArguments:
    """Write what a model answers to prompts."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of a run, or of a model, or a name of the Hub."""
    prompt: tuple[str, ...]
    """What to answer, one or several."""
    tokens: int = 128
    """Tokens an answer has at most."""
    temperature: float = 0.0
    """0: the likeliest token each time; above: drawn, by --seed."""
    seed: int = 0
    """Of what is drawn."""
    chat: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Put the prompt into the tokenizer's chat template, as a turn of the user."""
    device: str = "auto"
    """cpu, cuda, mps; auto takes what there is."""


@dataclass(frozen=True)
class EvalArguments:
    """Evaluate the model of a run on other rows, as the run itself would have."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of a run."""
    data: tuple[str, ...]
    """Rows to evaluate on: one source, or several that are read in order."""
    metrics: tuple[str, ...] = field(default=())
    """What to report beside the loss; by default what the run reported."""
    answer_pattern: str | None = None
    """exact_match: what is compared; by default what the run compared."""
    micro_batch: int | None = None
    """Sequences a micro-batch; it cannot change the numbers."""
    device: str = "auto"
    """cpu, cuda, mps; auto takes what there is."""


@dataclass(frozen=True)
class ExportArguments:
    """Write the model of a run to a folder of its own, with a card that says how it was made."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of a run."""
    out: str
    """The new folder."""
    merge: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Fold adapters into the model, so that it loads without PEFT."""
    dtype: Literal["stored", "float32", "bfloat16", "float16"] = "stored"
    """Type of the weights; stored: as they are in the run."""


def _parse(kind: type[_Arguments], arguments: Sequence[str], *, name: str) -> _Arguments:
    return tyro.cli(kind, args=list(arguments), prog=f"samestep {name}")


def model_of(run: str) -> Path | None:
    """The folder of the model that a command is to work with.

    Args:
        run: What it was given.

    Returns:
        The folder; None for a name of the Hub.

    Raises:
        ConfigError: There is a folder, but no model in it; or no folder where a path was given.
    """
    root = Path(run).expanduser()
    for folder in (root / "model", root):
        if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            return folder
    if root.is_dir():
        unfinished = (root / "config.yaml").exists()
        why = "the run has not ended: samestep train --resume --out" if unfinished else "no run"
        raise ConfigError(f"{run} holds no model ({why}{f' {run}' if unfinished else ''})")
    if run.startswith((".", "/", "~")) or run.count("/") > 1:
        there = root.parent.is_dir()
        near = nearest(root.name, (each.name for each in root.parent.iterdir())) if there else ""
        raise ConfigError(f"there is no folder {run}{near}")
    return None


def generate(arguments: Sequence[str]) -> int:
    """Print answers.

    Args:
        arguments: ``RUN --prompt TEXT ...``.

    Returns:
        0.

    Raises:
        ConfigError: There is no model, or an argument cannot be.
    """
    options = _parse(GenerateArguments, arguments, name="generate")
    problems = []
    if options.tokens < 1:
        problems.append(f"tokens: at least 1, not {options.tokens}")
    if options.temperature < 0:
        problems.append(f"temperature: at least 0, not {options.temperature}")
    if not options.prompt or not all(options.prompt):
        problems.append("prompt: give a text that is not empty")
    if problems:
        raise ConfigError("\n".join(problems))
    model_of(options.run)
    from samestep.train.after import answers_to  # loads PyTorch

    for text in answers_to(options):
        print(printable(text))
    return 0


def evaluate(arguments: Sequence[str]) -> int:
    """Print the loss and the metrics of a run's model on other rows.

    Args:
        arguments: ``RUN --data SOURCE ...``.

    Returns:
        0.

    Raises:
        ConfigError: There is no run, or its settings do not fit.
        DataError: The rows cannot be used.
    """
    options = _parse(EvalArguments, arguments, name="eval")
    model_of(options.run)
    from samestep.train.after import evaluate_run  # loads PyTorch

    report = evaluate_run(options)
    values = {"loss": report.loss, **report.terms}
    for name, value in values.items():
        print(printable(f"{name} {value:.6g}"))
    counts = ", ".join(f"{value:,.0f} {unit}" for unit, value in report.counts.items())
    print(printable(f"over {counts}"))
    return 0


def export(arguments: Sequence[str]) -> int:
    """Write a run's model to a folder.

    Args:
        arguments: ``RUN --out FOLDER``.

    Returns:
        0.

    Raises:
        ConfigError: There is no run, or the folder cannot be written.
    """
    options = _parse(ExportArguments, arguments, name="export")
    out = Path(options.out).expanduser()
    model_of(options.run)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out: {options.out} is there already: name a folder that is not")
    from samestep.train.after import export_model  # loads PyTorch

    export_model(options, out)
    print(printable(f"model in {out}"))
    return 0


COMMANDS: dict[str, Any] = {"generate": generate, "eval": evaluate, "export": export}
"""Commands by name."""
