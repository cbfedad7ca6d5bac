"""What a run needs before its first step: model, data, optimizer; nothing is written here."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from samestep.causal_lm import CausalLMLoss
from samestep.data.examples import Examples
from samestep.data.load import load_rows
from samestep.data.plan import cut_epoch, order
from samestep.data.tokenize import tokenize_rows
from samestep.errors import ConfigError
from samestep.files import cache_folder
from samestep.models.dropout import replace_dropout
from samestep.models.linear import speed_up_linear
from samestep.models.load import load_model, load_tokenizer, resolve
from samestep.models.lora import add_lora
from samestep.models.packing import choose_padding
from samestep.terms import constant
from samestep.train.batches import MakeMicroBatches, micro_batch_maker
from samestep.train.config import TrainConfig
from samestep.train.optim import build_optimizer

log = logging.getLogger("samestep")


@dataclass(frozen=True)
class Run:
    """Everything that the loop works with.

    Attributes:
        model: On its device, in train mode.
        tokenizer: Saved beside the model at the end.
        optimizer: Over the weights that train.
        loss_fn: The loss, for training and evaluation.
        train: Training examples.
        evaluation: Examples to evaluate on, or None.
        micro_batches: Cuts training examples.
        eval_micro_batches: Cuts evaluation examples; None without them.
        steps: Steps of the whole run.
    """

    model: Any
    tokenizer: Any
    optimizer: Optimizer
    loss_fn: CausalLMLoss
    train: Examples
    evaluation: Examples | None
    micro_batches: MakeMicroBatches
    eval_micro_batches: MakeMicroBatches | None
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
    device = _device(config.device)
    source = resolve(config.model)
    trust = config.trust_remote_code
    if trust:
        log.warning("trust_remote_code: Python code that comes with the model will run")
    tokenizer = load_tokenizer(resolve(config.tokenizer or source), trust_remote_code=trust)
    # Data first: they fail sooner than a model loads.
    train = _examples(config.data, tokenizer, config)
    evaluation = _examples(config.eval_data, tokenizer, config) if config.eval_data else None
    model = load_model(
        source,
        init=config.init,
        dtype=getattr(torch, config.dtype),
        seed=config.seed,
        trust_remote_code=trust,
    )
    _check_fit(model, train, evaluation)
    if config.lora_rank is not None:
        assert config.lora_alpha is not None
        model = add_lora(
            model,
            config.lora_rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            targets=config.lora_targets,
            seed=config.seed,
        )
    replace_dropout(model)
    speed_up_linear(model)
    model = model.to(device)
    padding = choose_padding(model, config.padding)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if padding == "right" and config.padding == "auto":
        log.warning("this model cannot take packs without padding: padding to the right")
    pad_id = tokenizer.pad_token_id or 0
    layout: dict[str, Any] = {"padding": padding, "pad_id": pad_id, "device": device}
    return Run(
        model=model,
        tokenizer=tokenizer,
        optimizer=build_optimizer(model, config),
        loss_fn=CausalLMLoss(
            normalize=constant(config.normalize)
            if isinstance(config.normalize, float)
            else config.normalize,
            label_smoothing=config.label_smoothing,
            z_loss=config.z_loss,
        ),
        train=train,
        evaluation=evaluation,
        micro_batches=micro_batch_maker(train, config, **layout),
        eval_micro_batches=None
        if evaluation is None
        else micro_batch_maker(evaluation, config, **layout),
        steps=_total_steps(train, config),
    )


def _device(wanted: str) -> torch.device:
    if wanted == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        return torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError) as error:
        first = str(error).split("\n")[0]
        raise ConfigError(f"device: {wanted!r} is not there ({first}); use auto or cpu") from None


def _examples(source: str, tokenizer: Any, config: TrainConfig) -> Examples:
    examples = tokenize_rows(
        load_rows(source),
        tokenizer,
        max_length=config.max_length,
        append_eos=config.append_eos,
        train_on=config.train_on,
        cache=cache_folder() / "tokens",
    )
    for reason, rows in examples.dropped.items():
        log.warning("%s: %d rows dropped: %s", source, rows, reason)
    return examples


def _check_fit(model: Any, train: Examples, evaluation: Examples | None) -> None:
    """Refuse tokens or positions that the model has no embedding for."""
    config = model.config.get_text_config()
    positions = config.to_dict().get("max_position_embeddings")
    vocabulary = model.get_input_embeddings().num_embeddings
    problems = []
    for name, examples in (("data", train), ("eval_data", evaluation)):
        if examples is None:
            continue
        longest, highest = max(examples.lengths), examples.highest_id()
        if positions and longest > positions:
            problems.append(
                f"{name}: the longest row has {longest} tokens, but the model has {positions} "
                f"positions: set max_length to {positions} or less"
            )
        if highest >= vocabulary:
            problems.append(
                f"{name}: the tokenizer gives id {highest}, but the model has {vocabulary} "
                "embeddings: this tokenizer belongs to another model"
            )
    if problems:
        raise ConfigError("\n".join(problems))


def _total_steps(examples: Examples, config: TrainConfig) -> int:
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    return sum(
        len(
            cut_epoch(
                order(len(examples), seed=config.seed, epoch=epoch),
                examples.lengths,
                batch_size=config.batch_size,
                batch_tokens=config.batch_tokens,
            )
        )
        for epoch in range(config.epochs)
    )
