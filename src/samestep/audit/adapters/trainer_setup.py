"""A trainer of the user's, made and reduced to its step: its own loss and loop, our optimizer."""

import contextlib
import gc
import inspect
import logging
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, Trainer

from samestep.audit.adapters.instrument import perturb_weights
from samestep.audit.adapters.processes import forget_states
from samestep.audit.adapters.trainer_data import is_stream
from samestep.audit.subject import RunSettings, Side
from samestep.engine.targets import IGNORE
from samestep.errors import CheckError

SIZES = ("per_device_train_batch_size", "gradient_accumulation_steps")
"""What a factory is called with."""


def check_signature(factory: Callable[..., Any], *, name: str) -> None:
    """Refuse a factory that does not take the sizes.

    Raises:
        CheckError: Names the keywords that are missing.
    """
    parameters = inspect.signature(factory).parameters
    open_ended = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    missing = [size for size in SIZES if size not in parameters and not open_ended]
    if missing:
        raise CheckError(f"{name}: make_trainer must take the keyword {' and '.join(missing)}")


def make_trainer(factory: Callable[..., Any], batch_size: int, *, accumulation: int) -> Any:
    """A new trainer of the user's.

    Raises:
        CheckError: The factory raises, returns something else, or ignores the sizes.
    """
    forget_states()
    sizes = dict(zip(SIZES, (batch_size, accumulation), strict=True))
    try:
        # Who watches the types of a run is not to see those of the untouched model.
        with _disable_current_modes():
            trainer = factory(**sizes)
    except Exception as error:
        raise CheckError(f"make_trainer failed: {describe_error(error)}") from error
    if not isinstance(trainer, Trainer):
        raise CheckError(
            f"make_trainer returned a {type(trainer).__name__}, not a transformers.Trainer or "
            "a trainer derived from it; audit other loops by model, examples, collate and step"
        )
    ignored = [name for name, size in sizes.items() if getattr(trainer.args, name) != size]
    if ignored:
        raise CheckError(
            f"make_trainer must pass its arguments on to the trainer: {', '.join(ignored)} was not"
        )
    _check_world(trainer)
    return trainer


def _check_world(trainer: Any) -> None:
    """Refuse a trainer that does not see the ranks: it would train on its own on each of them."""
    world = distributed.get_world_size() if distributed.is_initialized() else 1
    if trainer.args.world_size != world:
        raise CheckError(
            f"the trainer takes itself for one of {trainer.args.world_size} processes, of which "
            f"there are {world}: let TrainingArguments find out by itself"
        )


def describe_error(error: BaseException) -> str:
    """An error with its type, its text, and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def padding_side(trainer: Any) -> Side:
    """The side that the trainer's own tokenizer pads."""
    side = getattr(_reader(trainer), "padding_side", "right")
    return "left" if side == "left" else "right"


def _reader(trainer: Any) -> Any:
    """What turns the trainer's rows into tokens, by the name that its release gives it."""
    names = ("processing_class", "tokenizer")
    return next((vars(trainer)[name] for name in names if name in vars(trainer)), None)


def shifts_labels(trainer: Any, batch: Any) -> bool:
    """Whether a trainer's loss predicts each label from the tokens before it.

    Where the trainer does not say so, it is asked: such a loss does not read a row's first label.

    Args:
        trainer: Its loss is computed twice, unless it says.
        batch: One of its own micro-batches.
    """
    said = getattr(trainer, "_loss_shifts_labels", None)
    if said is not None:
        return bool(said)
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() != 2:
        return False
    losses = []
    trainer.model.eval()
    for first in (IGNORE, int(labels.max())):
        changed = labels.clone()
        changed[:, 0] = first
        inputs = trainer._prepare_inputs({**batch, "labels": changed})
        with torch.no_grad():
            losses.append(float(trainer.compute_loss(trainer.model, inputs).mean()))
    return losses[0] == losses[1]


def padding_token(trainer: Any) -> int:
    """The token that the trainer's own batches are padded with, as far as it says."""
    config = getattr(trainer.model, "config", None)
    for owner in (_reader(trainer), config):
        token = getattr(owner, "pad_token_id", None)
        if isinstance(token, int):
            return token
    return 0


def strip_trainer(trainer: Any, *, stream_steps: int, in_order: bool = True) -> None:
    """Take from a trainer what is not its step: schedules, saving, reporting, shuffling, clipping.

    Clipping by the trainer itself, after the last micro-batch, is left out because it would hide a
    wrong scale; clipping anywhere else stays, and is seen.

    Args:
        trainer: A `transformers.Trainer`, or of a class derived from it; changed in place.
        in_order: Take its sampling too.
        stream_steps: Updates to make where the data have no length; else one epoch is made.
    """
    args = trainer.args
    plain = {
        "max_steps": stream_steps if is_stream(trainer.train_dataset) else -1,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "eval_on_start": False,
        "load_best_model_at_end": False,
        "push_to_hub": False,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "dataloader_num_workers": 0,
        "dataloader_persistent_workers": False,
        "dataloader_prefetch_factor": None,
        "torch_compile": False,
        "auto_find_batch_size": False,
        "disable_tqdm": True,
    }
    if in_order:
        plain |= {"train_sampling_strategy": "sequential", "shuffle_dataset": False}
    for name, value in plain.items():
        if name in vars(args):
            setattr(args, name, value)
    trainer.model_init = None  # the model is made already; a second one would have other weights
    trainer.callback_handler.callbacks = [
        callback for callback in trainer.callback_handler.callbacks if _belongs_to_step(callback)
    ]
    if hasattr(trainer, "_clip_grad_norm"):
        trainer._clip_grad_norm = lambda model: nn.utils.get_total_norm(
            [weight.grad for weight in model.parameters() if weight.grad is not None]
        )
    else:  # clipped inside of the loop, unless the largest norm is 0
        args.max_grad_norm = 0.0


def _belongs_to_step(callback: Any) -> bool:
    """The user's own callbacks, which may change the step, and the one that drives the loop."""
    kind = type(callback)
    library = kind.__module__.split(".")[0] in ("transformers", "trl")
    return not library or kind.__name__ == "DefaultFlowCallback"


def take_rows_in_order(trainer: Any) -> None:
    """Let a trainer take its rows in order."""

    def sampler(dataset: Any = None) -> Any:
        data = trainer.train_dataset if dataset is None else dataset
        return None if is_stream(data) else SequentialSampler(data)

    trainer._get_train_sampler = sampler


def networks_of(trainer: Any) -> list[nn.Module]:
    """The model of a trainer and every other that it holds: references, teachers, judges."""
    held = [
        network
        for value in vars(trainer).values()
        for network in (value if isinstance(value, list | tuple) else [value])
        if isinstance(network, nn.Module)
    ]
    return list({id(network): network for network in held}.values())


def to_float64(network: nn.Module) -> None:
    """Float64 weights, and experts multiplied in turn: the grouped kernel has no float64."""
    network.to(torch.float64)
    for module in network.modules():
        if isinstance(module, PreTrainedModel) and hasattr(module, "set_experts_implementation"):
            module.set_experts_implementation("eager")


def restore(trainer: Any, settings: RunSettings, *, initial: Mapping[str, Tensor]) -> None:
    """The initial weights, in a type; other networks keep theirs, in the type too.

    Args:
        trainer: Changed in place.
        settings: Of the run.
        initial: Weights and buffers of its model, by name.
    """
    dtype = settings.dtype
    if dtype is not None:
        trainer.accelerator.native_amp = False
        for network in networks_of(trainer):
            to_float64(network) if dtype == torch.float64 else network.to(dtype)
    # Of a model that all trainers share: a mark by which it would not be wrapped for ranks.
    vars(trainer.model).pop("_is_accelerate_prepared", None)
    with torch.no_grad():
        for name, tensor in named_tensors(trainer.model).items():
            first = initial[name]
            floating = dtype is not None and first.is_floating_point()
            tensor.data = first.to(tensor.device, dtype if floating else first.dtype).clone()
            tensor.grad = None
    if settings.perturbation is not None:
        perturb_weights(trainer.model, settings.perturbation.displacement)


def named_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers, by name."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def copied_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Copies of weights and buffers, by name."""
    return {name: tensor.detach().clone() for name, tensor in named_tensors(network).items()}


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """A block for a trainer that says nothing, and leaves nothing to what comes after it."""
    try:
        with suppress_output():
            yield
    finally:
        forget_states()


@contextlib.contextmanager
def suppress_output() -> Iterator[None]:
    """Keep bars, logs and warnings of a trainer to itself, and its garbage collections short.

    A trainer collects garbage several times a run. With its libraries imported each takes a fifth
    of a second, unless what exists already is left out.
    """
    disabled = logging.root.manager.disable
    with (
        open(os.devnull, "w", encoding="utf-8") as sink,
        contextlib.redirect_stdout(sink),
        contextlib.redirect_stderr(sink),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        gc.freeze()
        try:
            yield
        finally:
            gc.unfreeze()
            logging.disable(disabled)
