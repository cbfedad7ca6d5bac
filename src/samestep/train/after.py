"""The model of a finished run: loaded with its adapters, asked, evaluated, written elsewhere."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from samestep.engine.evaluate import EvalReport
from samestep.errors import ConfigError
from samestep.models.load import load_model, load_tokenizer, resolve_source
from samestep.models.lora import load_peft
from samestep.models.placement import made_on
from samestep.models.saved_adapter import saved_rows
from samestep.models.vocabulary import grow_embeddings
from samestep.train.answers import generate, ready_to_generate
from samestep.train.evaluator import Evaluator
from samestep.train.finished import (
    EvalArguments,
    ExportArguments,
    GenerateArguments,
    model_of,
)
from samestep.train.launch import process_group
from samestep.train.micro_batches import MicroBatches
from samestep.train.model_card import model_card
from samestep.train.model_folder import save_model
from samestep.train.precision import find_device
from samestep.train.settings.adapters import ADAPTERS
from samestep.train.settings.base import TrainSettings, finalize, with_current_names
from samestep.train.settings.objectives import settings_class
from samestep.train.setup import set_up
from samestep.utils.files import write_atomically
from samestep.utils.messages import read_yaml

log = logging.getLogger("samestep")

_ADAPTER = "adapter_model.safetensors"

_OF_TRAINING = (
    *("best", "best_is", "patience", "min_improvement", "samples", "ema", "freeze"),
    *("lr_by_name", "weight_decay_by_name", "steps", "epochs", "track", "ranks", "parallel"),
    *("cpu_offload", "activation_offload", "gradient_checkpointing", "micro_batch", "micro_tokens"),
)
"""Settings that say nothing of how a model is evaluated."""


def load_finished(run: str, *, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """The model of a run, its adapters on their base, and its tokenizer.

    Args:
        run: Folder of a run or of a model, or a name of the Hub.
        dtype: Of the weights; None: as they are stored.

    Returns:
        Model, where `samestep.models.placement.made_on` says, and tokenizer.

    Raises:
        ConfigError: It cannot be loaded.
    """
    folder = model_of(run)
    if folder is None or not (folder / "adapter_config.json").is_file():
        source = resolve_source(run if folder is None else str(folder))
        return load_model(source, dtype=dtype or _stored(source)), load_tokenizer(source)
    if not (folder / _ADAPTER).is_file():
        raise ConfigError(f"{folder} has adapters, but no {_ADAPTER}")
    adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    source = resolve_source(adapter["base_model_name_or_path"])
    base = load_model(
        source, dtype=dtype or _stored(source), quantization=_quantization(Path(run).expanduser())
    )
    grow_embeddings(base, saved_rows(folder, base))
    return load_peft().PeftModel.from_pretrained(base, str(folder)), load_tokenizer(str(folder))


def _quantization(root: Path) -> Any:
    """How the run stored the weights under its adapters."""
    config = root / "config.yaml"
    return read_yaml(config).get("quantization") if config.is_file() else None


def _stored(source: str) -> torch.dtype:
    """The type that a model's weights have in its files."""
    dtype: torch.dtype | None = AutoConfig.from_pretrained(source).dtype
    return dtype or torch.float32


def answers_to(options: GenerateArguments) -> Iterator[str]:
    """What a run's model writes after each prompt.

    Args:
        options: Of the command.

    Yields:
        The texts, in order.

    Raises:
        ConfigError: The model cannot be loaded, or has no chat template where one is asked for.
    """
    device = find_device(options.device)
    with made_on(device):
        model, tokenizer = load_finished(options.run)
    if options.chat and not tokenizer.chat_template:
        raise ConfigError(f"chat: the tokenizer of {options.run} has no chat template")
    model.to(device)
    drawn = {"do_sample": True, "temperature": options.temperature, "top_k": 0, "top_p": 1.0}
    with ready_to_generate(model):
        for at, prompt in enumerate(options.prompt):
            text = prompt
            if options.chat:
                turns = [{"role": "user", "content": prompt}]
                text = tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=True
                )
            ids = tokenizer(text, add_special_tokens=not options.chat, return_tensors="pt")
            torch.manual_seed(options.seed + at)
            written = generate(
                model,
                tokenizer,
                ids.input_ids[0],
                tokens=options.tokens,
                **(drawn if options.temperature else {}),
            )
            yield tokenizer.decode(written, skip_special_tokens=True)


def settings_to_evaluate(options: EvalArguments) -> TrainSettings:
    """The settings of a run, its finished model in the place of the one that it began with.

    Args:
        options: Of the command.

    Returns:
        Finalized settings.

    Raises:
        ConfigError: There are none, or they do not fit.
    """
    root = Path(options.run).expanduser()
    folder = model_of(options.run)
    config = root / "config.yaml"
    if folder is None or not config.is_file():
        raise ConfigError(f"eval: {options.run} is no run of samestep train (no {config})")
    saved = with_current_names(read_yaml(config))
    kind = settings_class(str(saved["objective"]))
    fields = {name: value for name, value in saved.items() if name not in _OF_TRAINING}
    if not (folder / "adapter_config.json").is_file():
        fields = {name: fields[name] for name in fields if name not in {*ADAPTERS, "init"}}
        if "reference_model" in fields and fields["reference_model"] is None:
            fields["reference_model"] = saved["model"]
        fields |= {"model": str(folder), "tokenizer": None}
    metrics = options.metrics or tuple(fields.get("metrics", ()))
    pattern = options.answer_pattern or fields.get("answer_pattern")
    fields |= {
        "eval_data": options.data,
        "metrics": metrics,
        "steps": 1,
        "out": options.run,
        "answer_pattern": pattern if "exact_match" in metrics else None,
        "micro_batch": options.micro_batch,
        "device": options.device,
    }
    if fields.get("classes", None) != ():  # whose names may be those of the training rows
        fields["data"] = options.data
    return finalize(kind(**fields))


def evaluate_run(options: EvalArguments) -> EvalReport:
    """Evaluate a run's model on other rows.

    Args:
        options: Of the command.

    Returns:
        The report.

    Raises:
        ConfigError: As for `settings_to_evaluate`.
        DataError: The rows cannot be used.
    """
    settings = settings_to_evaluate(options)
    with process_group():
        setup = set_up(settings)
        if settings.lora_rank is not None:
            folder = model_of(options.run)
            assert folder is not None
            load_peft().set_peft_model_state_dict(setup.model, load_file(folder / _ADAPTER))
        evaluator = Evaluator(
            model=setup.model,
            objective=setup.evaluated,
            sets=setup.evaluations,
            settings=settings,
            steps=setup.steps,
            watched=lambda loss_fn, number: loss_fn,
            retry=_once,
            tokenizer=setup.tokenizer,
        )
        return evaluator.evaluate()[0][""]


def _once(
    work: Callable[[], EvalReport], micro_batches: MicroBatches, *, indices: Sequence[int]
) -> EvalReport:
    return work()


def export_model(options: ExportArguments, out: Path) -> None:
    """Write a run's model with its tokenizer and a card.

    Args:
        options: Of the command.
        out: A folder that is not there, or is empty.

    Raises:
        ConfigError: The run's model cannot be loaded, or has no adapters to merge.
        CheckpointError: The folder cannot be written.
    """
    dtype = None if options.dtype == "stored" else getattr(torch, options.dtype)
    model, tokenizer = load_finished(options.run, dtype=dtype)
    has_adapters = isinstance(model, load_peft().PeftModel)
    if options.merge and not has_adapters:
        raise ConfigError(f"merge: the model of {options.run} has no adapters")
    inner = model.get_base_model() if has_adapters else model
    inner.stored_dtype = dtype  # what was asked for, not what the weights came in
    if out.is_dir():
        out.rmdir()
    save_model(model, tokenizer, folder=out, merge=options.merge)
    adapters = has_adapters and not options.merge
    if adapters and options.push is not None:
        _warn_of_a_base_of_this_machine(model)
    write_atomically(out / "README.md", model_card(options.run, adapters=adapters))


def _warn_of_a_base_of_this_machine(model: Any) -> None:
    base = str(model.peft_config["default"].base_model_name_or_path)
    if Path(base).exists():
        log.warning(
            "push: others do not have the model under these adapters, the folder %s: --merge "
            "uploads whole weights",
            base,
        )
