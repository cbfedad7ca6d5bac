"""A run from Python: models, tokenizers and rows as objects, and what came of it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from samestep.engine.collectives import on_rank_0
from samestep.errors import ConfigError
from samestep.train.after import load_finished
from samestep.train.callbacks import Callback
from samestep.train.command import check_paths
from samestep.train.launch import process_group, under_torchrun
from samestep.train.settings.base import TrainSettings, finalize
from samestep.train.settings.command_line import unknown_names
from samestep.train.settings.objectives import settings_class
from samestep.train.trainer import train
from samestep.utils.files import remove, write_atomically


@dataclass(frozen=True)
class FitResult:
    """What came of a run.

    Attributes:
        out: The run's folder; its ``model/`` is an ordinary model folder.
        summary: What ``summary.json`` holds: totals, the loss before and after, what was chosen.
        steps: A mapping a step, as in ``log.jsonl``; a data frame takes it as it is.
        evaluations: A mapping an evaluation, as in ``eval.jsonl``.

    Example:
        >>> import samestep
        >>> from pathlib import Path
        >>> result = samestep.FitResult(Path("runs/first"), {"steps": 2}, [{"step": 1}], [])
        >>> result.summary["steps"], result.steps
        (2, [{'step': 1}])
    """

    out: Path
    summary: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]

    @cached_property
    def model(self) -> Any:
        """The trained language model, loaded from the folder; that of ``best`` if it is set."""
        return self._loaded[0]

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self._loaded[1]

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        return load_finished(str(self.out))


def fit(
    model: Any,
    data: Any,
    *,
    out: str | Path,
    tokenizer: Any = None,
    eval_data: Any = None,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> FitResult:
    """Train a model into a folder, as `samestep train` does.

    Objects are written to ``out/inputs`` first, so that the run can be resumed from its folder
    alone, by this function or by the command.

    Args:
        model: A Hub name, a folder, a .gguf file, or a model of transformers, which is not changed.
        data: What ``data`` takes; or rows: a `datasets.Dataset`, or a list of mappings.
        out: The run's folder.
        tokenizer: A Hub name, a folder, or a tokenizer; needed beside a model that is an object.
        eval_data: As data; or several of them by name.
        callbacks: Told of steps, evaluations, checkpoints and the end.
        settings: All other settings of `samestep train`, by name.

    Returns:
        What came of it, on every rank.

    Raises:
        ConfigError: A setting is wrong, or an argument is of no kind that is known.
        DataError: The rows cannot be used.
        StepError: A step was not finite, or did not fit into memory.
        CheckpointError: A checkpoint could not be written or read.

    Example:
        >>> import samestep
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({".": 0, "one": 1, "two": 2}, unk_token="."))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=".")
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1)
        >>> config = LlamaConfig(vocab_size=3, num_attention_heads=1, **sizes)
        >>> result = samestep.fit(
        ...     LlamaForCausalLM(config),
        ...     [{"prompt": "one", "completion": " two"}],
        ...     tokenizer=tokenizer,
        ...     out="runs/first",
        ...     steps=2,
        ...     device="cpu",
        ... )
        >>> [record["step"] for record in result.steps], type(result.model).__name__
        ([1, 2], 'LlamaForCausalLM')
    """
    objective = str(settings.pop("objective", "causal_lm"))
    kind = settings_class(objective)
    unknown = unknown_names(settings, kind, objective, flag=False)
    if unknown:
        raise ConfigError("\n  - ".join(["the settings are wrong:", *unknown]))
    if (settings.get("ranks") or 1) > 1 and not under_torchrun():
        raise ConfigError("ranks: from Python start the ranks by torchrun, and leave ranks out")
    if tokenizer is None and not isinstance(model, str | Path):
        raise ConfigError("tokenizer: a model that is an object needs one beside it")
    inputs = Path(out).expanduser() / "inputs"
    places = {
        "model": _place(model, inputs / "model", "model"),
        "tokenizer": _place(tokenizer, inputs / "tokenizer", "tokenizer"),
        "data": _rows_place(data, inputs / "data", "data"),
        "eval_data": _eval_places(eval_data, inputs),
    }
    given = kind(**{**settings, "objective": objective, "out": str(out), **places})
    chosen: TrainSettings = finalize(given)
    objects = {"model": model, "tokenizer": tokenizer, "data": data, **_eval_objects(eval_data)}
    with process_group():
        if not chosen.resume:
            on_rank_0(lambda: _write_inputs(inputs, objects))
            chosen = finalize(given)  # a model that has adapters says so by its folder
        check_paths(chosen)
        summary = train(chosen, callbacks=callbacks)
    root = Path(chosen.out)
    return FitResult(
        out=root,
        summary=summary,
        steps=_lines(root / "log.jsonl"),
        evaluations=_lines(root / "eval.jsonl"),
    )


def _is_name(value: Any) -> bool:
    """Whether an argument is what a setting may hold: names, and fields of sources."""
    if isinstance(value, list | tuple):
        return bool(value) and all(map(_is_name, value))
    return value is None or isinstance(value, str | Path) or _is_source(value)


def _is_source(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("path"), str)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return str(value) if isinstance(value, Path) else value


def _place(value: Any, folder: Path, what: str) -> Any:
    """What the settings hold for a model or a tokenizer."""
    if value is None or isinstance(value, str | Path):
        return _plain(value)
    if not hasattr(value, "save_pretrained"):
        raise ConfigError(
            f"{what}: a {type(value).__name__} is no name, no path, and nothing of transformers"
        )
    return str(folder)


def _rows_place(value: Any, folder: Path, what: str) -> Any:
    """What the settings hold for rows."""
    if _is_name(value):
        return _plain(value)
    if hasattr(value, "save_to_disk"):
        return str(folder)
    rows = isinstance(value, list | tuple) and all(isinstance(row, Mapping) for row in value)
    if rows and value:
        return f"{folder}.jsonl"
    raise ConfigError(
        f"{what}: a {type(value).__name__}{'' if value else ' that is empty'} is no source of "
        "rows: give a path, a name, a datasets.Dataset, or a list of mappings"
    )


def _eval_objects(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping) and not _is_source(value):
        return {f"eval_data-{name}": each for name, each in value.items()}
    return {"eval_data": value}


def _eval_places(value: Any, inputs: Path) -> Any:
    objects = _eval_objects(value)
    places = {name: _rows_place(each, inputs / name, name) for name, each in objects.items()}
    if "eval_data" in places:
        return places["eval_data"]
    return {name.removeprefix("eval_data-"): place for name, place in places.items()}


def _write_inputs(inputs: Path, objects: Mapping[str, Any]) -> None:
    """Write those that are objects; a run that is there keeps its own until it is overwritten."""
    for name, value in objects.items():
        if _is_name(value):
            continue
        target = inputs / name
        inputs.mkdir(parents=True, exist_ok=True)
        remove(target)
        if hasattr(value, "save_pretrained"):
            value.save_pretrained(target)
        elif hasattr(value, "save_to_disk"):
            value.save_to_disk(str(target))
        else:
            text = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in value)
            write_atomically(Path(f"{target}.jsonl"), text)


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
