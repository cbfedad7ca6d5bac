"""What a run needs before its first step: model, data, optimizer; nothing is written here."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from samestep.data.collate import Padding
from samestep.data.records import Records
from samestep.data.stream_records import StreamRecords
from samestep.engine.collectives import run_or_fail_together, world_size
from samestep.engine.oom import is_out_of_memory
from samestep.engine.parallel import is_sharded, prepare_for_step
from samestep.engine.terms import Objective
from samestep.engine.two_pass import TwoPass
from samestep.errors import ConfigError, is_no_fault_of_input
from samestep.kernels.gemm import limit_caches, speed_up_linear
from samestep.models.dropout import replace_dropout
from samestep.models.lora import LoraVariant, add_lora
from samestep.models.placement import made_on
from samestep.models.probes import cut_last_layer
from samestep.models.saved_adapter import continue_lora, saved_rows
from samestep.models.vocabulary import grow_embeddings, rows_that_train, size_of
from samestep.train.ahead import Collator
from samestep.train.budget_range import budget_range
from samestep.train.compilation import choose_compilation
from samestep.train.ema import WeightAverage
from samestep.train.evaluator import EvaluationSet, check_choice
from samestep.train.forward import precompute_fields, without_caches
from samestep.train.launch import is_first_on_machine
from samestep.train.metrics import with_metrics
from samestep.train.micro_batches import DEFAULT_MICRO_TOKENS, MicroBatches
from samestep.train.micro_tokens import choose_micro_tokens
from samestep.train.optim import build_optimizer, freeze
from samestep.train.precision import (
    choose_precision,
    describe,
    find_device,
    products,
    raise_trained,
    with_products,
)
from samestep.train.recipes.base import Recipe, model_source
from samestep.train.rollouts import RolloutMaker
from samestep.train.run_data import (
    check_references,
    described,
    load_data,
    step_plans,
    total_steps,
)
from samestep.train.settings.adapters import continued_adapter
from samestep.train.settings.base import TrainSettings
from samestep.train.settings.evaluation import evaluation_sets
from samestep.train.sharding import lay_out
from samestep.utils.adapter_folder import is_adapter, read_adapter
from samestep.utils.files import user_path
from samestep.utils.memory import keep_large_blocks
from samestep.utils.plugins import is_reference
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
        average: Of the weights that train, or None.
        objective: What is optimised, in training and evaluation.
        train: Training records.
        evaluations: What to evaluate on, by name.
        evaluated: What is evaluated: the objective, and metrics beside it.
        collate: Makes a micro-batch of records of either.
        micro_batches: Cuts training records.
        steps: Steps of the whole run.
        rollouts: What generates the examples of each step, or None.
    """

    recipe: Recipe
    model: Any
    tokenizer: Any
    optimizer: Optimizer
    average: WeightAverage | None
    objective: Objective
    train: Records
    evaluations: Mapping[str, EvaluationSet]
    evaluated: Objective
    collate: Collator
    micro_batches: MicroBatches
    steps: int
    rollouts: RolloutMaker | None


def set_up(
    settings: TrainSettings,
    *,
    loaded: tuple[Any, list[Records]] | None = None,
    budget: int | None = None,
) -> TrainingSetup:
    """Load and check everything that a run needs.

    Args:
        settings: Finalized settings.
        loaded: What `samestep.train.run_data.load_data` gave, if it was read before.
        budget: Of micro-batches, in the settings' unit, if that is not to be measured.

    Returns:
        The setup, ready for its first step.

    Raises:
        ConfigError: A setting does not fit the model or the machine.
        DataError: The data cannot be used.
    """
    settings = run_or_fail_together(lambda: choose_precision(settings))
    recipe = run_or_fail_together(lambda: check_references(settings))
    device = run_or_fail_together(lambda: find_device(settings.device))
    if settings.activation_offload and device.type == "cpu":
        raise ConfigError("activation_offload: on a CPU the activations are where they would go")
    if settings.model_adapter == "merge" and is_adapter(settings.model):
        what = "all weights train" if settings.lora_rank is None else "a new adapter trains"
        log.info("model: the adapter in %s is folded into its base; %s", settings.model, what)
    if settings.lora_rank is not None and "lr" not in settings.model_fields_set:
        log.info("lr: %g, ten times that of whole weights, for adapters; --lr sets it", settings.lr)
    if device.type == "cpu":
        keep_large_blocks()
    # First once a machine: the other ranks find converted weights and tokens in the cache.
    read = loaded or run_or_fail_together(
        lambda: load_data(recipe) if is_first_on_machine() else None
    )
    tokenizer, data = run_or_fail_together(lambda: read or load_data(recipe))
    for line in [] if loaded else described(settings, data):
        log.info("%s", line)
    model, padding = _place_model(recipe, data, device=device, tokenizer=tokenizer)
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
            whole_packs=settings.bitwise,
        )

    rollouts = run_or_fail_together(lambda: recipe.rollouts(model, tokenizer, data[0]))
    if isinstance(data[0], StreamRecords):
        data[0].check = lambda records: recipe.check_fit(model, [records])
    built = recipe.build(model, data)
    if is_reference(settings.objective):
        built = without_caches(built)
    objective = with_products(built, model, settings)
    evaluated = with_products(with_metrics(built, settings.metrics), model, settings)
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

    steps = total_steps(data[0], settings)
    if _compiles(settings, rollouts, device):
        choose_compilation(
            model,
            objective,
            recipe=recipe,
            padding=padding,
            cut=cut_first,
            tokens=steps * sum(data[0].lengths[at] for at in first) / world_size(),
        )
    if budget is not None and settings.micro_batch is None:
        micro_tokens = budget
    elif rollouts is None and _measures(recipe, model):
        micro_tokens = choose_micro_tokens(
            model, objective, recipe=recipe, cut=cut_first, longest=max(data[0].lengths)
        )
    train = cut(data[0], micro_tokens)
    train.budget = train.budget if budget is None else budget
    own = train.rank_indices(first) or first[:1]
    if rollouts is None:
        log.info("the first step on this rank: %s", train.describe(own))
    describe(model, settings)
    evaluations = {
        name: EvaluationSet(
            records, cut(records, micro_tokens), recipe.rollouts(model, tokenizer, records)
        )
        for name, records in zip(evaluation_sets(settings), data[1:], strict=True)
    }
    check_choice(model, evaluated, sets=evaluations, settings=settings, tokenizer=tokenizer)
    return TrainingSetup(
        recipe=recipe,
        model=model,
        tokenizer=tokenizer,
        optimizer=build_optimizer(model, settings),
        average=None if settings.ema is None else WeightAverage(model, settings.ema),
        objective=objective,
        train=data[0],
        evaluations=evaluations,
        evaluated=evaluated,
        collate=collate,
        micro_batches=train,
        steps=steps,
        rollouts=rollouts,
    )


def load_trainable(
    recipe: Recipe,
    data: list[Records],
    *,
    device: torch.device,
    tokenizer: Any = None,
    place: torch.device | None = None,
) -> Any:
    """The model, with adapters if the settings have them, and its dropout tied to the examples.

    Args:
        recipe: What loads it.
        data: The training records, then those to evaluate on.
        device: Where it will be.
        tokenizer: Of the run, with tokens that are added.
        place: Where it is made; None: on the CPU. A recipe of the user's own may not look at it.

    Returns:
        The model, in train mode.

    Raises:
        ConfigError: It cannot be loaded, or a setting does not fit it.
    """
    settings = recipe.settings
    with waiting("loading the model"), made_on(place or torch.device("cpu")):
        model = recipe.load_model(model_source(settings), data)
    added = (*settings.add_tokens, *settings.add_special_tokens)
    adapter = continued_adapter(settings, settings.model)
    brought = 0 if adapter is None else saved_rows(user_path(adapter), model)
    grow_embeddings(model, max(brought, size_of(tokenizer) if added else 0), seed=settings.seed)
    recipe.check_fit(model, data)
    if settings.lora_rank is not None:
        text = getattr(tokenizer, "tokenizer", tokenizer)
        model = _with_adapters(model, recipe, [text.convert_tokens_to_ids(each) for each in added])
        raise_trained(model)
    if settings.freeze:
        freeze(model, settings.freeze)
    replace_dropout(model)
    if device.type == "cpu":
        limit_caches()
        if settings.compile != "layers":  # changed layers break their graphs
            speed_up_linear(model)
    return model


def _with_adapters(model: Any, recipe: Recipe, new_tokens: list[int]) -> Any:
    """The model with adapters: those that train on, or new ones, beside which new tokens train."""
    settings = recipe.settings
    adapter = continued_adapter(settings, settings.model)
    if adapter is not None:
        base = read_adapter(adapter)["base_model_name_or_path"]
        log.info("model: the adapter in %s trains on, on its base %s", adapter, base)
        return continue_lora(model, user_path(adapter), dropout=settings.lora_dropout)
    assert settings.lora_rank is not None
    assert settings.lora_alpha is not None
    tokens = settings.trainable_token_indices
    return add_lora(
        model,
        settings.lora_rank,
        alpha=settings.lora_alpha,
        dropout=settings.lora_dropout,
        targets=settings.lora_targets,
        seed=settings.seed,
        task=recipe.peft_task,
        variant=LoraVariant(
            rslora=settings.use_rslora,
            dora=settings.use_dora,
            modules_to_save=settings.modules_to_save,
            tokens=rows_that_train(model, tokens, new_tokens, saved=settings.modules_to_save)
            if new_tokens
            else tokens,
            parameters=settings.target_parameters,
        ),
    )


@contextmanager
def fitting(settings: TrainSettings) -> Iterator[None]:
    """Say of the model what libraries trip over in it: a config may hold values of any type.

    Args:
        settings: ``model``, for the message.

    Raises:
        ConfigError: In the place of whatever was raised, unless it is no fault of the model.
    """
    try:
        yield
    except Exception as error:
        if is_no_fault_of_input(error):
            raise
        reason = (str(error).splitlines() or [""])[0]
        if is_out_of_memory(error):
            raise ConfigError(
                f"model: {settings.model} does not fit into memory ({reason}), or its config.json "
                "or lora_rank asks for weights that are too large"
            ) from error
        raise ConfigError(
            f"model: {settings.model} cannot be used ({type(error).__name__}: {reason}). Does its "
            "config.json hold a value of a wrong type? --debug shows where"
        ) from error


def _place_model(
    recipe: Recipe, data: list[Records], *, device: torch.device, tokenizer: Any
) -> tuple[Any, Padding]:
    """The model on its device, ready for a step, and the layout of its micro-batches."""
    settings = recipe.settings

    def load(place: torch.device) -> Any:
        with fitting(settings):
            return load_trainable(recipe, data, device=device, tokenizer=tokenizer, place=place)

    model = lay_out(load, settings, device=device)
    with products(model, settings, keep_copies=False), fitting(settings):
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


def _compiles(settings: TrainSettings, rollouts: RolloutMaker | None, device: torch.device) -> bool:
    """Whether compiling is asked for, or can be measured: on data that is there before a run."""
    if rollouts is None or settings.compile != "auto":
        return True
    if device.type != "cpu":
        log.info("compile: none, since rollouts to measure are not there yet; layers compiles")
    return False


def _measures(recipe: Recipe, model: Any) -> bool:
    """Whether what micro-batches cost decides how large they are; ranks of one CPU share it."""
    settings = recipe.settings
    automatic = settings.micro_tokens == "auto" and settings.micro_batch is None
    by_itself = world_size() == 1 or (model.device.type != "cpu" and not is_sharded(model))
    return automatic and recipe.measures_costs and by_itself
