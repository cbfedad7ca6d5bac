"""A finished run: the options of the commands that work with one, and where its model is."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from samestep.errors import ConfigError
from samestep.utils.plugins import nearest


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
    push: str | None = None
    """Then upload the folder to the Hub as this model, owner/name."""
    private: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """With push: a model that others do not see."""


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
