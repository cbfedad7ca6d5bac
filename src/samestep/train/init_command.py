"""`samestep init`: five questions, or flags, and a commented run.yaml that runs. No PyTorch."""

import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml

from samestep.errors import ConfigError
from samestep.train.settings.base import TrainSettings, finalize
from samestep.train.settings.objectives import OBJECTIVES, settings_class
from samestep.train.settings.paths import missing_paths
from samestep.utils.files import write_atomically
from samestep.utils.text import printable

_RATES = {False: "2e-5", True: "2e-4"}
"""The default rates, of whole weights and of adapters."""


@dataclass(frozen=True)
class InitArguments:
    """Write a commented run.yaml: asks what no flag says, on a terminal."""

    file: Annotated[str, tyro.conf.Positional] = "run.yaml"
    """The file to write."""
    model: str | None = None
    """Hub name, folder, or .gguf file."""
    data: str | None = None
    """Training rows: a file, a folder, a pattern, or a Hub name."""
    objective: str | None = None
    """What to optimise: causal_lm, dpo, classification, ..."""
    lora: Literal["yes", "no"] | None = None
    """Train adapters in place of all weights."""
    out: str | None = None
    """Folder of the run."""


_QUESTIONS = {
    "model": ("Which model (Hub name, folder, .gguf)?", ""),
    "data": ("Which rows (file, folder, pattern, Hub name)?", ""),
    "objective": ("What to optimise?", "causal_lm"),
    "lora": ("Adapters (LoRA) in place of all weights?", "no"),
    "out": ("Which folder for the run?", "runs/first"),
}
"""What is asked, and what an empty answer means."""


def init(arguments: Sequence[str], *, ask: Callable[[str], str] | None = None) -> int:
    """Write the file.

    Args:
        arguments: ``[FILE] [--model M] ...``.
        ask: Answers a question; by default the terminal, if there is one.

    Returns:
        0.

    Raises:
        ConfigError: The file is there already; an answer cannot be; or nobody can be asked.
    """
    options = tyro.cli(InitArguments, args=list(arguments), prog="samestep init")
    path = Path(options.file).expanduser()
    problems = []
    if path.exists():
        problems.append(f"{options.file} is there already: name another file")
    if path.suffix not in (".yaml", ".yml"):
        problems.append(f"{options.file}: its name must end with .yaml")
    given = {name: getattr(options, name) for name in _QUESTIONS}
    missing = [name for name, value in given.items() if value is None]
    if ask is None and sys.stdin.isatty():
        ask = input
    needed = [name for name in missing if not _QUESTIONS[name][1]]
    if ask is None and needed:
        flags = " ".join(f"--{name} {name.upper()}" for name in needed)
        problems.append(f"there is no terminal to ask on: give {flags}")
    if problems:
        raise ConfigError("\n".join(problems))
    for name in missing:
        question, default = _QUESTIONS[name]
        answer = ask(f"{question}{f' [{default}]' if default else ''} ").strip() if ask else ""
        given[name] = answer or default
    given["lora"] = str(given["lora"]).lower() in ("y", "yes")
    text = run_yaml(given)
    settings = _checked(text, given)
    missing_here = missing_paths(settings)
    if missing_here:
        raise ConfigError("\n".join(missing_here))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
    print(printable(f"wrote {path}; look at what it reads: samestep train {path} --dry-run"))
    print(printable(f"then: samestep train {path}"))
    return 0


def _checked(text: str, given: dict[str, Any]) -> TrainSettings:
    kind = settings_class(str(given["objective"]))
    return finalize(kind(**yaml.safe_load(text)))


def run_yaml(answers: dict[str, Any]) -> str:
    """The file.

    Args:
        answers: "model", "data", "objective", "lora" and "out".

    Returns:
        YAML with comments.

    Raises:
        ConfigError: There is no such objective.
    """
    kind = settings_class(str(answers["objective"]))
    lora = bool(answers["lora"])
    others = ", ".join(name for name in OBJECTIVES if name != answers["objective"])
    values = {name: _quoted(answers[name]) for name in ("objective", "model", "data", "out")}
    lines = [
        "# A run of samestep: samestep train run.yaml; every field: samestep train --help",
        "",
        f"objective: {values['objective']}",
        f"# {kind.__doc__}",
        *_wrapped(f"Others: {others}."),
        "",
        f"model: {values['model']}",
        f"data: {values['data']}",
        "# Columns: messages; prompt and completion; text; and what docs/train.md lists.",
        f"out: {values['out']}",
        "",
        "epochs: 1",
        "batch_size: 32",
        "# Examples a step: what the result depends on. How a step is cut into micro-batches",
        "# is found from memory, and cannot change it.",
        f"lr: {_RATES[lora]}",
        "schedule: linear",
        "warmup: 0.03",
        "# A share of the steps.",
        *(
            ["", "lora_rank: 16", "# Adapters; merge: true folds them into OUT/model."]
            if lora
            else []
        ),
        "",
        "# eval_data: held_out.jsonl",
        "# eval_every: 50",
        "# best: loss",
        "# The checkpoint of the best evaluation becomes OUT/model.",
        "# max_length: 2048",
        "# save_every: 200",
        "# track: [tensorboard]",
        "seed: 0",
    ]
    return "\n".join(lines) + "\n"


def _quoted(value: Any) -> str:
    text: str = yaml.safe_dump(str(value), default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("...\n").strip()


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 88, initial_indent="# ", subsequent_indent="# ")
