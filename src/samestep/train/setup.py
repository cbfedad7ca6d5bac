"""What a run needs before its first step: model, data, optimizer; nothing is written here."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from samestep.data.batching import StepPlan, num_steps, plan_steps
from samestep.data.records import Records
from samestep.engine.collectives import run_or_fail_together, world_size
from samestep.engine.parallel import prepare_for_step
from samestep.engine.terms import Objective
from samestep.engine.two_pass import TwoPass
from samestep.errors import ConfigError
from samestep.kernels.linear import speed_up_linear
from samestep.models.dropout import replace_dropout
from samestep.models.load import resolve_source
from samestep.models.lora import add_lora
from samestep.models.probes import cut_last_layer
from samestep.train.annotate import annotated
from samestep.train.batches import MicroBatches
from samestep.train.calibrate import micro_token_budget
from samestep.train.config import TrainConfig
from samestep.train.group import first_of_this_machine
from samestep.train.heap import keep_large_blocks
from samestep.train.layout import choose_layout, shard
from samestep.train.optim import build_optimizer

log = logging.getLogger("samestep")


@dataclass(frozen=True)
class Run:
    """Everything that the loop works with.

    Attributes:
        model: On its device, in train mode.
        tokenizer: Saved beside the model at the end.
        optimizer: Over the weights that train.
        objective: What is optimised, in training and evaluation.
        train: Training records.
        evaluation: Records to evaluate on, or None.
        micro_batches: Cuts training records.
        eval_micro_batches: Cuts evaluation records; None without them.
        steps: Steps of the whole run.
    """

    model: Any
    tokenizer: Any
    optimizer: Optimizer
    objective: Objective
    train: Records
    evaluation: Records | None
    micro_batches: MicroBatches
    eval_micro_batches: MicroBatches | None
    steps: int


def set_up(config: TrainConfig) -> Run:
    """Load and check everything that a run needs.

    Args:
        config: The settings.

    Returns:
        The run, ready for its first step.

    Raises:
        ConfigError: A setting does not fit the model or the machine.
        DataError: The data cannot be used.
    """
    device = run_or_fail_together(lambda: _device(config.device))
    if config.activation_offload and device.type == "cpu":
        raise ConfigError("activation_offload: on a CPU the activations are where they would go")
    if device.type == "cpu":
        keep_large_blocks()
    # First once a machine: the other ranks find converted weights and tokens in the cache.
    loaded = run_or_fail_together(lambda: _load_data(config) if first_of_this_machine() else None)
    tokenizer, data = run_or_fail_together(lambda: loaded or _load_data(config))
    model = run_or_fail_together(lambda: _load_model(config, data))
    layout = run_or_fail_together(lambda: choose_layout(model, config, device))
    model = shard(model, config, device) if layout == "fsdp2" else model.to(device)
    padding = config.layout(model)
    if config.task == "CAUSAL_LM":
        cut_last_layer(model, padding)
    prepare_for_step(model)
    config.checkpoint_activations(model)
    if padding == "right" and config.padding == "auto":
        log.warning("this model cannot take packs without padding: padding to the right")
    pad_id = config.pad_id(tokenizer)

    def micro_batches(records: Records, config: TrainConfig = config) -> MicroBatches:
        return MicroBatches(records, config, padding=padding, pad_id=pad_id, device=device)

    objective = config.build(model, data)
    if isinstance(objective.loss_fn, TwoPass):
        log.info(
            "%s couples the examples of a batch: every micro-batch runs forward once more, without "
            "a graph, before its own forward and backward",
            config.objective,
        )
    if objective.annotate is not None:
        data = [annotated(model, one, micro_batches(one), objective.annotate) for one in data]
        prepare_for_step(model)
    first = next(plans_of(data[0], config)).examples
    wanted = config.micro_tokens == "auto" and config.micro_batch is None
    if wanted and config.calibrated and world_size() == 1:
        budget = micro_token_budget(
            model,
            objective,
            config,
            cut=lambda budget: list(micro_batches(data[0], _under(config, budget)).of(first, 0)),
            longest=max(data[0].lengths),
        )
        config = _under(config, budget)
    train = micro_batches(data[0], config)
    log.info("the first step on this rank: %s", train.told(train.hand(first) or first[:1]))
    return Run(
        model=model,
        tokenizer=tokenizer,
        optimizer=build_optimizer(model, config),
        objective=objective,
        train=data[0],
        evaluation=data[1] if data[1:] else None,
        micro_batches=train,
        eval_micro_batches=micro_batches(data[1], config) if data[1:] else None,
        steps=_total_steps(data[0], config),
    )


def _under(config: TrainConfig, budget: int) -> TrainConfig:
    return config.model_copy(update={"micro_tokens": budget})


def plans_of(records: Records, config: TrainConfig, *, start: int = 0) -> Iterator[StepPlan]:
    """The steps of a run without end, from step ``start`` on."""
    return plan_steps(
        records.lengths,
        seed=config.seed,
        batch_size=config.batch_size,
        batch_tokens=config.batch_tokens,
        start=start,
    )


def _load_data(config: TrainConfig) -> tuple[Any, list[Records]]:
    """The tokenizer, and the records to train on, then those to evaluate on if there are any."""
    source = resolve_source(config.model)
    if config.trust_remote_code:
        log.warning("trust_remote_code: Python code that comes with the model will run")
    tokenizer = config.load_tokenizer(resolve_source(config.tokenizer or source))
    data = [_read(config.data, tokenizer, config)]
    if config.eval_data:
        data.append(_read(config.eval_data, tokenizer, config, data[0]))
    return tokenizer, data


def _load_model(config: TrainConfig, data: list[Records]) -> Any:
    """The model, with adapters if asked for, and its dropout tied to the examples."""
    model = config.load(resolve_source(config.model), data)
    config.check_fit(model, data)
    if config.lora_rank is not None:
        assert config.lora_alpha is not None
        model = add_lora(
            model,
            config.lora_rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            targets=config.lora_targets,
            seed=config.seed,
            task=config.task,
        )
    replace_dropout(model)
    speed_up_linear(model)
    return model


def _device(wanted: str) -> torch.device:
    if wanted == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        return torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError) as error:
        first = str(error).split("\n")[0]
        raise ConfigError(f"device: {wanted!r} is not there ({first}); use auto or cpu") from None


def _read(source: str, tokenizer: Any, config: TrainConfig, like: Records | None = None) -> Records:
    records = config.read(source, tokenizer, like)
    for reason, rows in records.dropped.items():
        log.warning("%s: %d rows dropped: %s", source, rows, reason)
    return records


def _total_steps(records: Records, config: TrainConfig) -> int:
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    return num_steps(
        records.lengths,
        seed=config.seed,
        epochs=config.epochs,
        batch_size=config.batch_size,
        batch_tokens=config.batch_tokens,
    )
