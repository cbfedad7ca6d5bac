"""The command line of `samestep train`: its flags, its file, its help. No PyTorch."""

import textwrap
from collections.abc import Iterable

from samestep.train.settings.adapters import ADAPTERS
from samestep.train.settings.base import RENAMED_FIELDS, TrainSettings
from samestep.train.settings.objectives import OBJECTIVES
from samestep.train.settings.peers import PEER_FIELDS, peer_notes
from samestep.utils.flags import Arity, arity_of, describe_fields
from samestep.utils.plugins import nearest

GROUPS = {
    "what to train": ("objective", "model", "data", "out", "tokenizer", "init"),
    "tokens": ("add_tokens", "add_special_tokens"),
    "evaluating, and choosing by it": (
        *("eval_data", "eval_every", "metrics", "answer_pattern", "samples", "sample_tokens"),
        *("best", "best_is", "patience", "min_improvement"),
    ),
    "rows": (
        *("stream", "shuffle_buffer", "columns", "row_format", "max_length", "append_eos"),
        "trust_remote_code",
    ),
    "the step, and how long": (
        *("batch_size", "batch_tokens", "steps", "epochs", "optimizer", "lr", "schedule"),
        *("warmup", "weight_decay", "max_grad_norm", "seed", "not_finite", "bitwise"),
    ),
    "the update in detail": (
        *("betas", "eps", "momentum", "cooldown", "min_lr_ratio", "lr_by_name"),
        *("weight_decay_by_name", "freeze", "ema"),
    ),
    "adapters": ADAPTERS,
    "memory and speed; none of these changes the step": (
        *("micro_batch", "micro_tokens", "memory_limit", "padding", "gradient_checkpointing"),
        *("compile", "deterministic", "activation_offload", "device", "threads"),
    ),
    "precision": ("dtype", "mixed_precision"),
    "several processes": ("ranks", "parallel", "cpu_offload", "rank_timeout"),
    "saving, going on": (
        *("save_every", "save_minutes", "keep", "track", "resume", "overwrite", "dry_run"),
        "measure",
    ),
}
"""Fields by what they are for, as help shows them; those of an objective alone stand first."""

_HEAD = """\
usage: samestep train [RUN.YAML] [--FIELD VALUE ...]

Fine-tune a model. Fields come from the file and from flags; flags win.

examples:
  samestep train --model ./llama --data rows.jsonl --out runs/first
  samestep train run.yaml --lr 1e-4 --lora-rank 16
  samestep train --resume --out runs/first        continue a run
  samestep train --objective dpo --help           the fields of an objective

objectives:
"""

_TAIL = """

Whatever cuts a step into micro-batches changes memory and speed, never its
result: docs/train.md. Other options: -h, --help; --debug (tracebacks).
"""


def train_help(kind: type[TrainSettings], objective: str) -> str:
    """The help of an objective, at 80 columns.

    Args:
        kind: Its settings.
        objective: Its name.

    Returns:
        The text.
    """
    names = ", ".join(OBJECTIVES)
    fields = describe_fields(kind.model_fields, GROUPS, rest=f"objective {objective}")
    names = textwrap.fill(names, 80, initial_indent="  ", subsequent_indent="  ")
    return f"{_HEAD}{names}\n{fields}{_TAIL}"


def arities() -> dict[str, Arity]:
    """How many values the flags of all objectives take."""
    return {
        name: arity_of(field.annotation)
        for row in OBJECTIVES.values()
        for name, field in row.settings.model_fields.items()
    }


def unknown_names(
    names: Iterable[str], kind: type[TrainSettings], objective: str, *, flag: bool
) -> list[str]:
    """A line for each name that is no field of an objective: what it is here, or the nearest.

    Args:
        names: Of fields, with underscores.
        kind: The settings of the objective.
        objective: Its name.
        flag: They were flags, not fields of a file.

    Returns:
        The lines.
    """
    fields = kind.model_fields
    notes = peer_notes(fields, flag=flag)
    kind_of_name = "flag" if flag else "field"
    return [
        f"{_written(name, flag)}: no such {kind_of_name}"
        + (
            f"; {notes[name]}"
            if name in notes
            else _hint(name, fields, objective=objective, flag=flag)
        )
        for name in names
        if name not in fields
    ]


def _hint(name: str, fields: Iterable[str], *, objective: str, flag: bool) -> str:
    """The new name of a field, the objectives that have it, or the most similar name."""
    if name in RENAMED_FIELDS:
        new = RENAMED_FIELDS[name]
        return f"; it is called {_written(new, flag) if flag else repr(new)} now"
    meaning = PEER_FIELDS.get(name)
    field = meaning.field if meaning and meaning.field else name
    owners = [each for each, row in OBJECTIVES.items() if field in row.settings.model_fields]
    if owners:
        return (
            f"; {_written(field, flag)} belongs to objective {', '.join(owners)}, "
            f"and this is {objective}"
        )
    if flag:
        return nearest(_written(name, flag), [_written(each, flag) for each in fields])
    return nearest(name, fields, cutoff=0.4)


def _written(name: str, flag: bool) -> str:
    return f"--{name.replace('_', '-')}" if flag else name
