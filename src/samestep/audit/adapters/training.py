"""One run of a trainer, made plain: its own loss and loop, our optimizer, data and silence."""

import contextlib
import gc
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel

from samestep.audit.adapters.rows import is_stream
from samestep.audit.subject import Gradient

LEARNING_RATE = 0.1
"""Of plain SGD. With one update a run it does not matter: gradients are seen, not differences."""

NOISE = ("drop", "jitter", "mask_time_prob", "mask_feature_prob")
"""Parts of the names of numbers on modules and configs that make a forward random."""


class Recorder(torch.optim.SGD):
    """Plain SGD that keeps the sum of the gradients that it is given.

    Args:
        model: Its trainable weights are updated.

    Attributes:
        gradient: By the name of the weight, float64, summed over the updates.
        updates: How many there were.
    """

    def __init__(self, model: nn.Module) -> None:
        self.gradient: Gradient = {}
        self.updates = 0
        self._weights = [(n, w) for n, w in model.named_parameters() if w.requires_grad]
        super().__init__([weight for _, weight in self._weights], lr=LEARNING_RATE)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Record, then update; the rate is constant, whatever a schedule wants."""
        del closure
        self.updates += 1
        with torch.no_grad():
            for name, weight in self._weights:
                if weight.grad is None:
                    continue
                seen = weight.grad.detach().to("cpu", torch.float64)
                self.gradient[name] = self.gradient.get(name, 0) + seen  # a new tensor each time
                weight.add_(weight.grad, alpha=-LEARNING_RATE)


class Collator:
    """A trainer's collator with a change to each batch.

    Args:
        collate: The trainer's own.
        change: Called with the batch, the number of examples in it, and how many came before.
    """

    def __init__(self, collate: Callable[..., Any], change: Callable[[Any, int, int], Any]) -> None:
        self.collate = collate
        self.change = change
        self.seen = 0

    def __call__(self, features: Any, *args: Any, **options: Any) -> Any:
        """The changed batch."""
        number = len(features)
        batch = self.change(self.collate(features, *args, **options), number, self.seen)
        self.seen += number
        return batch


def make_plain(trainer: Any, *, stream_steps: int) -> None:
    """Take from a trainer what is not its step: schedules, saving, reporting, shuffling, clipping.

    Clipping by the trainer itself, after the last micro-batch, is left out because it would hide a
    wrong scale; clipping anywhere else stays, and is seen.

    Args:
        trainer: A `transformers.Trainer`, or of a class derived from it; changed in place.
        stream_steps: Updates to make where the data have no length; else one epoch is made.
    """
    args = trainer.args
    plain = {
        "max_steps": stream_steps if is_stream(trainer.train_dataset) else -1,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
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
        "shuffle_dataset": False,
    }
    for name, value in plain.items():
        if name in vars(args):
            setattr(args, name, value)
    trainer.model_init = None  # the model is made already; a second one would have other weights
    trainer.callback_handler.callbacks = [
        callback for callback in trainer.callback_handler.callbacks if _belongs_to_step(callback)
    ]
    trainer._clip_grad_norm = lambda model: nn.utils.get_total_norm(
        [weight.grad for weight in model.parameters() if weight.grad is not None]
    )


def _belongs_to_step(callback: Any) -> bool:
    """The user's own callbacks, which may change the step, and the one that drives the loop."""
    kind = type(callback)
    library = kind.__module__.split(".")[0] in ("transformers", "trl")
    return not library or kind.__name__ == "DefaultFlowCallback"


def use_recorder(trainer: Any) -> Recorder:
    """Give a trainer our optimizer and a constant schedule."""
    recorder = Recorder(trainer.model)

    def create_optimizer(model: Any = None) -> Any:
        del model
        return trainer.optimizer

    def create_scheduler(num_training_steps: int, optimizer: Any = None) -> Any:
        del num_training_steps, optimizer
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(recorder, lambda _: 1.0)
        return trainer.lr_scheduler

    trainer.optimizer, trainer.lr_scheduler = recorder, None
    trainer.create_optimizer, trainer.create_scheduler = create_optimizer, create_scheduler
    return recorder


def sequential(trainer: Any) -> None:
    """Let a trainer take its rows in order."""

    def sampler(dataset: Any = None) -> Any:
        data = trainer.train_dataset if dataset is None else dataset
        return None if is_stream(data) else SequentialSampler(data)

    trainer._get_train_sampler = sampler


def networks(trainer: Any) -> list[nn.Module]:
    """The model of a trainer and every other that it holds: references, teachers, judges."""
    held = [
        one
        for value in vars(trainer).values()
        for one in (value if isinstance(value, list | tuple) else [value])
        if isinstance(one, nn.Module)
    ]
    return list({id(one): one for one in held}.values())


def widen(network: nn.Module) -> None:
    """Float64 weights, and experts multiplied one by one: the grouped kernel has no float64."""
    network.to(torch.float64)
    for module in network.modules():
        if isinstance(module, PreTrainedModel):
            module.set_experts_implementation("eager")


@contextlib.contextmanager
def silenced(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Within the block every noise of a forward is off, in modules and in configs."""
    modules = [module for network in networks for module in network.modules()]
    holders = [vars(module) for module in modules]
    holders += [vars(one["config"]) for one in holders if _has_fields(one.get("config"))]
    noisy = [
        (holder, name, value)
        for holder in holders
        for name, value in holder.items()
        if isinstance(value, float) and any(part in name for part in NOISE)
    ]
    noisy += [(vars(one), "p", one.p) for one in modules if isinstance(one, _DropoutNd)]
    for holder, name, _ in noisy:
        holder[name] = 0.0
    try:
        yield
    finally:
        for holder, name, value in noisy:
            holder[name] = value


def _has_fields(config: Any) -> bool:
    return config is not None and not isinstance(config, dict | str | int)


def tensors(network: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers, by name."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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
