"""What a run needs before its first step: model, data, optimizer; nothing is written here."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from samestep.data.batching import StepPlan, num_steps, plan_steps
from samestep.data.collate import Padding
from samestep.data.describe import with_report
from samestep.data.records import Records
from samestep.engine.collectives import run_or_fail_together, world_size
from samestep.engine.parallel import is_sharded, prepare_for_step
from samestep.engine.terms import Objective
from samestep.engine.two_pass import TwoPass
from samestep.errors import ConfigError
from samestep.kernels.gemm import speed_up_linear
from samestep.models.dropout import replace_dropout
from samestep.models.load import resolve_source
from samestep.models.lora import add_lora
from samestep.models.probes import cut_last_layer
from samestep.train.compilation import choose_compilation
from samestep.train.forward import precompute_fields
from samestep.train.launch import is_first_on_machine
from samestep.train.micro_batches import DEFAULT_MICRO_TOKENS, Collator, MicroBatches
from samestep.train.micro_tokens import budget_range, choose_micro_tokens
from samestep.train.optim import build_optimizer, load_optimizer, load_schedule
from samestep.train.precision import (
    choose_precision,
    describe,
    find_device,
    products,
    raise_trained,
    with_products,
)
from samestep.train.recipes.base import Recipe, recipe_for
from samestep.train.settings.base import TrainSettings
from samestep.train.sharding import choose_parallelism, shard
from samestep.utils.memory import keep_large_blocks
from samestep.utils.waiting import waiting

log = logging.getLogger("samestep")


@dataclass(frozen=True)
class TrainingSetup:
    """Everything that the loop works with.

    Attributes:
        recipe: What the objective does with the settings.
        model: On its device, in train mode.
        tokenizer: Saved beside the model at the end.
        optimizer: Over the weights that train.
        objective: What is optimised, in training and evaluation.
        train: Training records.
        evaluation: Records to evaluate on, or None.
        collate: Makes a micro-batch of records of either.
        micro_batches: Cuts training records.
        eval_micro_batches: Cuts evaluation records; None without them.
        steps: Steps of the whole run.
    """

    recipe: Recipe
    model: Any
    tokenizer: Any
    optimizer: Optimizer
    objective: Objective
    train: Records
    evaluation: Records | None
    collate: Collator
    micro_batches: MicroBatches
    eval_micro_batches: MicroBatches | None
    steps: int


def set_up(settings: TrainSettings) -> TrainingSetup:
    """Load and check everything that a run needs.

    Args:
        settings: Finalized settings.

    Returns:
        The setup, ready for its first step.

    Raises:
        ConfigError: A setting does not fit the model or the machine.
        DataError: The data cannot be used.
    """
    settings = run_or_fail_together(lambda: choose_precision(settings))
    recipe = run_or_fail_together(lambda: _check_references(settings))
    device = run_or_fail_together(lambda: find_device(settings.device))
    if settings.activation_offload and device.type == "cpu":
        raise ConfigError("activation_offload: on a CPU the activations are where they would go")
    if settings.lora_rank is not None and "lr" not in settings.model_fields_set:
        log.info("lr: %g, ten times that of whole weights, for adapters; --lr sets it", settings.lr)
    if device.type == "cpu":
        keep_large_blocks()
    # First once a machine: the other ranks find converted weights and tokens in the cache.
    loaded = run_or_fail_together(lambda: load_data(recipe) if is_first_on_machine() else None)
    tokenizer, data = run_or_fail_together(lambda: loaded or load_data(recipe))
    for line in described(settings, data):
        log.info("%s", line)
    model, padding = _place_model(recipe, data, device=device)
    pad_id = recipe.pad_id(tokenizer)

    def collate(records: Records, indices: Sequence[int], step: int) -> dict[str, Any]:
        key = (settings.seed, step)
        return recipe.collate(records, indices, padding=padding, pad_id=pad_id, key=key)

    def cut(records: Records, micro_tokens: int) -> MicroBatches:
        return MicroBatches(
            records,
            collate,
            micro_batch=settings.micro_batch,
            micro_tokens=micro_tokens,
            padded=padding != "none",
            device=device,
        )

    objective = with_products(recipe.build(model, data), model, settings)
    if isinstance(objective.loss_fn, TwoPass):
        log.info(
            "%s couples the examples of a batch: every micro-batch runs forward once more, without "
            "a graph, before its own forward and backward",
            settings.objective,
        )
    if objective.annotate is not None:
        data = _precompute(model, data, objective=objective, settings=settings, cut=cut)
    first = next(step_plans(data[0], settings)).examples
    micro_tokens = _micro_tokens(model, settings)

    def cut_first(budget: int) -> list[dict[str, Any]]:
        return list(cut(data[0], budget).batches(first, 0))

    steps = _total_steps(data[0], settings)
    choose_compilation(
        model,
        objective,
        recipe=recipe,
        padding=padding,
        cut=cut_first,
        tokens=steps * sum(data[0].lengths[at] for at in first) / world_size(),
    )
    if _measures(recipe, model):
        micro_tokens = choose_micro_tokens(
            model, objective, recipe=recipe, cut=cut_first, longest=max(data[0].lengths)
        )
    train = cut(data[0], micro_tokens)
    own = train.rank_indices(first) or first[:1]
    log.info("the first step on this rank: %s", train.describe(own))
    describe(model, settings)
    return TrainingSetup(
        recipe=recipe,
        model=model,
        tokenizer=tokenizer,
        optimizer=build_optimizer(model, settings),
        objective=objective,
        train=data[0],
        evaluation=data[1] if data[1:] else None,
        collate=collate,
        micro_batches=train,
        eval_micro_batches=cut(data[1], micro_tokens) if data[1:] else None,
        steps=steps,
    )


def step_plans(records: Records, settings: TrainSettings, *, start: int = 0) -> Iterator[StepPlan]:
    """The steps of a run without end.

    Args:
        records: Training records.
        settings: ``seed``, ``batch_size``, ``batch_tokens``.
        start: The number of the first step.

    Yields:
        The plan of each step.
    """
    return plan_steps(
        records.lengths,
        seed=settings.seed,
        batch_size=settings.batch_size,
        batch_tokens=settings.batch_tokens,
        start=start,
    )


def _check_references(settings: TrainSettings) -> Recipe:
    """The recipe; fails early if what a setting names (an optimizer, say) does not exist."""
    load_optimizer(settings.optimizer)
    load_schedule(settings.schedule)
    return recipe_for(settings)


def load_data(recipe: Recipe) -> tuple[Any, list[Records]]:
    """The tokenizer, and the records to train on, then those to evaluate on if there are any.

    Args:
        recipe: What reads them.

    Returns:
        Both.

    Raises:
        ConfigError: There is no tokenizer, or it does not fit the rows.
        DataError: The rows cannot be used.
    """
    settings = recipe.settings
    source = resolve_source(settings.model)
    if settings.trust_remote_code:
        log.warning("trust_remote_code: Python code that comes with the model will run")
    tokenizer = recipe.load_tokenizer(resolve_source(settings.tokenizer or source))
    with waiting(f"reading {settings.data}"):
        data = [recipe.read(settings.data, tokenizer, None)]
    if settings.eval_data:
        with waiting(f"reading {settings.eval_data}"):
            data.append(recipe.read(settings.eval_data, tokenizer, data[0]))
    for records in data:
        if records.report is None:  # read by a recipe of the user's own
            with_report(records, (), tokenizer, format="records")
    return tokenizer, data


def described(settings: TrainSettings, data: Sequence[Records]) -> list[str]:
    """What was read of each source, for people.

    Args:
        settings: ``data``, ``eval_data``.
        data: What `load_data` gave.

    Returns:
        Some lines for each.
    """
    sources = (settings.data, settings.eval_data)
    return [
        records.report.render(source if isinstance(source, str) else ", ".join(source or ()))
        for source, records in zip(sources, data, strict=False)
        if records.report is not None
    ]


def read_only(settings: TrainSettings) -> list[str]:
    """Read the data as a run would, and say what it would learn; nothing else is loaded.

    Args:
        settings: Finalized settings.

    Returns:
        Some lines for each source, and one for the steps.

    Raises:
        ConfigError: As for `load_data`.
        DataError: As for `load_data`.
    """
    recipe = _check_references(settings)
    _, data = load_data(recipe)
    size = (
        f"{settings.batch_size} examples"
        if settings.batch_size
        else (f"{settings.batch_tokens} tokens")
    )
    steps = _total_steps(data[0], settings)
    return [*described(settings, data), f"{steps} steps of {size}; nothing was trained or written"]


def _load_model(recipe: Recipe, data: list[Records], *, device: torch.device) -> Any:
    """The model, with adapters if the settings have them, and its dropout tied to the examples."""
    settings = recipe.settings
    with waiting("loading the model"):
        model = recipe.load_model(resolve_source(settings.model), data)
    recipe.check_fit(model, data)
    if settings.lora_rank is not None:
        assert settings.lora_alpha is not None
        model = add_lora(
            model,
            settings.lora_rank,
            alpha=settings.lora_alpha,
            dropout=settings.lora_dropout,
            targets=settings.lora_targets,
            seed=settings.seed,
            task=recipe.peft_task,
        )
        raise_trained(model)
    replace_dropout(model)
    if device.type == "cpu" and settings.compile != "layers":  # changed layers break their graphs
        speed_up_linear(model)
    return model


def _place_model(
    recipe: Recipe, data: list[Records], *, device: torch.device
) -> tuple[Any, Padding]:
    """The model on its device, ready for a step, and the layout of its micro-batches."""
    settings = recipe.settings
    model = run_or_fail_together(lambda: _load_model(recipe, data, device=device))
    parallelism = run_or_fail_together(lambda: choose_parallelism(model, settings, device=device))
    sharded = parallelism == "fsdp2"
    model = shard(model, settings, device=device) if sharded else model.to(device)
    with products(model, settings, keep_copies=False):
        padding = recipe.choose_padding(model)
        if recipe.peft_task == "CAUSAL_LM":
            cut_last_layer(model, padding)
    prepare_for_step(model)
    recipe.checkpoint_activations(model)
    return model, padding


def _precompute(
    model: Any,
    data: Sequence[Records],
    *,
    objective: Objective,
    settings: TrainSettings,
    cut: Callable[[Records, int], MicroBatches],
) -> list[Records]:
    """The records with the fields that the objective computes once."""
    assert objective.annotate is not None
    tokens = _micro_tokens(model, settings)
    with waiting("running the reference over the data"):
        annotated = [
            precompute_fields(
                model, records, micro_batches=cut(records, tokens), annotate=objective.annotate
            )
            for records in data
        ]
    prepare_for_step(model)
    return annotated


def _micro_tokens(model: Any, settings: TrainSettings) -> int:
    """The tokens of a micro-batch before anything was measured."""
    if settings.micro_tokens != "auto":
        return settings.micro_tokens
    # Under FSDP2 what does not fit cannot be cut finer in the middle of a step.
    device = next(model.parameters()).device
    return DEFAULT_MICRO_TOKENS if is_sharded(model) else budget_range(device).unmeasured


def _measures(recipe: Recipe, model: Any) -> bool:
    """Whether what micro-batches cost decides how large they are; ranks of one CPU share it."""
    settings = recipe.settings
    automatic = settings.micro_tokens == "auto" and settings.micro_batch is None
    by_itself = world_size() == 1 or (model.device.type != "cpu" and not is_sharded(model))
    return automatic and recipe.measures_costs and by_itself


def _total_steps(records: Records, settings: TrainSettings) -> int:
    if settings.steps is not None:
        return settings.steps
    assert settings.epochs is not None
    return num_steps(
        records.lengths,
        seed=settings.seed,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        batch_tokens=settings.batch_tokens,
    )
