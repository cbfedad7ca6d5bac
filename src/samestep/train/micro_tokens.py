"""``micro_tokens: auto``: the budget of a micro-batch, from what two micro-batches cost.

A micro-batch of n tokens costs a fixed time (gradients of all weights are written and added up once
a micro-batch) and a time a token; and memory a token on top of what is there anyway. Both lines
follow from two measurements on the first step's own data. Larger micro-batches spread the fixed
time further, with ever less to gain.
"""

import hashlib
import json
import logging
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch

from samestep.engine.collectives import alone, gather_results
from samestep.engine.counts import input_tokens
from samestep.engine.step import backward
from samestep.engine.terms import Objective
from samestep.errors import OutOfMemoryError
from samestep.kernels.gemm import processor_name
from samestep.models.compiled import compiled_layers
from samestep.train.budget_range import ON_CPU, BudgetRange, budget_range
from samestep.train.fitting import first_that_fits
from samestep.train.forward import with_keyed_dropout
from samestep.train.precision import bytes_beside_weights, one_step
from samestep.train.recipes.base import Recipe
from samestep.train.settings.base import TrainSettings
from samestep.utils.files import cache_folder, open_regular, write_atomically
from samestep.utils.memory import describe_device, memory_limit, peak_memory, release_memory
from samestep.utils.version import package_version
from samestep.utils.waiting import waiting

log = logging.getLogger("samestep")


CutFirstStep: TypeAlias = Callable[[int], Sequence[dict[str, Any]]]
"""Maps a budget to the micro-batches of the first step under it."""


@dataclass(frozen=True)
class Sample:
    """One measured micro-batch.

    Attributes:
        tokens: Its tokens.
        seconds: Its time; on a CPU, that of all cores together.
        peak: The most memory taken, in bytes; None: unknown.
    """

    tokens: int
    seconds: float
    peak: float | None


@dataclass(frozen=True)
class Costs:
    """What micro-batches cost on one machine.

    Attributes:
        seconds: Of a micro-batch, however small.
        seconds_per_token: On top.
        bytes: Memory of the process while a micro-batch runs, however small; None: unknown.
        bytes_per_token: On top.
        too_large: Tokens of a micro-batch that ran out of memory; None: none did.
    """

    seconds: float
    seconds_per_token: float
    bytes: float | None
    bytes_per_token: float
    too_large: int | None = None


def fit_costs(small: Sample, large: Sample) -> Costs:
    """The lines through two measurements; the larger one has more tokens."""
    tokens = large.tokens - small.tokens
    slope = max(large.seconds - small.seconds, 1e-9) / tokens
    fixed = max(0.0, small.seconds - slope * small.tokens)
    if small.peak is None or large.peak is None:
        return Costs(fixed, slope, None, 0.0)
    growth = max(0.0, large.peak - small.peak) / tokens
    return Costs(fixed, slope, small.peak - growth * small.tokens, growth)


def choose_budget(
    costs: Costs,
    *,
    longest: int = 0,
    limit: float | None = None,
    reserved: float = 0.0,
    choice: BudgetRange = ON_CPU,
) -> int:
    """The budget that is nearly the fastest, if memory allows.

    Args:
        costs: What micro-batches cost.
        longest: Tokens of the longest record, which cannot be cut.
        limit: Bytes that the process may take; None: unknown.
        reserved: Bytes that will be taken beside what was measured (the optimizer's state).
        choice: What can be chosen.

    Returns:
        The smallest budget from ``least_for_speed`` on whose fixed costs are at most
        ``fixed_share`` of its time, or the largest below it that fits; the smallest of all if none
        does. At least the longest record, up to the largest of them: less would take as much
        memory in the end.
    """
    budgets = choice.budgets
    least = min(longest, budgets[-1])
    if least > choice.least_for_speed and _fits(costs, least, limit=limit, reserved=reserved):
        return max(least, choose_budget(costs, limit=limit, reserved=reserved, choice=choice))
    fitting = [budget for budget in budgets if _fits(costs, budget, limit=limit, reserved=reserved)]
    for budget in (budget for budget in fitting if budget >= choice.least_for_speed):
        seconds = costs.seconds + costs.seconds_per_token * budget
        if costs.seconds <= choice.fixed_share * seconds:
            return budget
    return fitting[-1] if fitting else budgets[0]


def estimate_peak(costs: Costs, budget: int, *, reserved: float) -> float | None:
    """The memory that the process will take at its peak, in bytes; None if it is unknown."""
    if costs.bytes is None:
        return None
    return costs.bytes + reserved + costs.bytes_per_token * budget


def _fits(costs: Costs, budget: int, *, limit: float | None, reserved: float) -> bool:
    if costs.too_large is not None and budget >= costs.too_large:
        return False
    peak = estimate_peak(costs, budget, reserved=reserved)
    return peak is None or limit is None or peak <= limit


def measure_costs(
    tokens: Callable[[int], Sequence[int]],
    run: Callable[[int, int], Sample],
    *,
    measured: tuple[int, int] = ON_CPU.measured[0],
) -> Costs | None:
    """Measure two micro-batches.

    Args:
        tokens: The tokens of each micro-batch that the first step is cut into under a budget.
        run: Runs one of them, (budget, its place), forward and backward.
        measured: The two budgets.

    Returns:
        The costs; None if the step is too small to hold micro-batches of two sizes.
    """
    few, many = (tokens(budget) for budget in measured)
    smallest, largest = min(few), max(many)
    if largest < 2 * smallest:
        return None
    small = (measured[0], few.index(smallest))
    large = (measured[1], many.index(largest))
    run(*small)  # the first one also compiles kernels and fills caches
    # In turn, so that a disturbance hits both.
    pairs = [(run(*small), run(*large)) for _ in range(2)]
    return fit_costs(*(_quickest(samples) for samples in zip(*pairs, strict=True)))


def _quickest(samples: Sequence[Sample]) -> Sample:
    """The least disturbed time, and the memory of the first run."""
    seconds = min(sample.seconds for sample in samples)
    return Sample(samples[0].tokens, seconds, samples[0].peak)


def cached_costs(path: Path, measure: Callable[[], Costs | None]) -> Costs | None:
    """The costs that a file holds; measured and written if there is none.

    Costs with a size that did not fit are not written: how much memory is free may change.

    Args:
        path: The file; its name stands for the model, the settings and the machine.
        measure: Gives the costs.

    Returns:
        The costs; None if they cannot be measured, which is not written.
    """
    try:
        with open_regular(path) as file:
            return _checked(Costs(**json.loads(file.read())))
    except (OSError, ValueError, TypeError, RecursionError):  # not there, or damaged: measure again
        costs = measure()
    if costs is not None and costs.too_large is None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(asdict(costs)) + "\n")
        except OSError as error:
            log.warning("micro_tokens: what was measured is not kept (%s)", error)
    return costs


def _checked(costs: Costs) -> Costs:
    """The costs, if they can be such; refuses what damage makes of a file with TypeError."""
    numbers = [number for number in asdict(costs).values() if number is not None]
    kinds = all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
    known = None not in (costs.seconds, costs.seconds_per_token, costs.bytes_per_token)
    if kinds and known and costs.seconds >= 0 < costs.seconds_per_token:
        return costs
    raise TypeError("no costs")


def choose_micro_tokens(
    model: Any, objective: Objective, *, recipe: Recipe, cut: CutFirstStep, longest: int
) -> int:
    """The tokens of a micro-batch for this model on this machine.

    Costs are measured once, on the first step's data, and remembered in the cache folder: by model,
    settings that matter, machine and versions. No weight is changed. Where the setting
    ``gradient_checkpointing`` is auto and the longest record would not fit, the model's layers are
    checkpointed (selectively), and measured as they are then.

    Args:
        model: On its device, in train mode, as it will be trained.
        objective: What is optimised.
        recipe: Its settings say ``memory_limit`` in GB; None: 80 % of what the process could have.
        cut: The first step's micro-batches under a budget.
        longest: Tokens of the longest record, which cannot be cut.

    Returns:
        The budget.
    """
    settings = recipe.settings
    choice = budget_range(model.device, precision=settings.precision)
    problem = ""
    try:
        costs = measured_costs(model, objective, settings=settings, cut=cut)
    except OutOfMemoryError as error:
        problem = str(error)
    if problem:  # outside of the handler, in which the error keeps what it came by
        release_memory()
        if recipe.recompute_activations(model):
            return choose_micro_tokens(model, objective, recipe=recipe, cut=cut, longest=longest)
        least = choice.budgets[0]
        log.warning("micro_tokens: %s; starting from %d tokens a micro-batch", problem, least)
        return least  # the run itself cuts finer still, or says which sequence is too large
    if costs is None:
        return choice.unmeasured  # such a step is one or two micro-batches anyway
    limits = gather_results(lambda: memory_limit(model.device, settings.memory_limit))
    limit = min((one for one in limits if one is not None), default=None)
    reserved = bytes_beside_weights(model, settings)
    too_much = not _fits(costs, longest, limit=limit, reserved=reserved)
    if too_much and recipe.recompute_activations(model):
        log.info(
            "gradient_checkpointing: selective, since the longest row (%d tokens) would not fit "
            "into memory otherwise",
            longest,
        )
        return choose_micro_tokens(model, objective, recipe=recipe, cut=cut, longest=longest)
    budget = choose_budget(costs, longest=longest, limit=limit, reserved=reserved, choice=choice)
    peak = estimate_peak(costs, budget, reserved=reserved)
    memory = "" if peak is None else f"; about {peak / 1e9:.1f} GB at the peak"
    log.info("micro_tokens: %d tokens a micro-batch%s", budget, memory)
    if peak is not None and limit is not None and peak > limit:
        log.warning("micro_tokens: even that is above the limit of %.1f GB", limit / 1e9)
    return budget


def measured_costs(
    model: Any, objective: Objective, *, settings: TrainSettings, cut: CutFirstStep
) -> Costs | None:
    """What micro-batches cost, from the cache folder or measured now.

    Args:
        model: As for `choose_micro_tokens`, as are ``objective`` and ``cut``.
        objective: What is optimised.
        settings: Of the run.
        cut: The first step's micro-batches under a budget.

    Returns:
        The costs, of several ranks the worst; None if one cannot measure them.

    Raises:
        OutOfMemoryError: What is measured does not fit into memory.
    """
    path = cache_folder() / "costs" / f"{_key(model, settings)}.json"

    measure = partial(_measure, model, objective, seed=settings.seed, cut=cut)

    def own() -> dict[str, Any] | None:
        with alone():  # one may find the costs in its cache, and another measure them
            costs = cached_costs(path, measure)
        return asdict(costs) if costs else None

    found = gather_results(own)
    every = [one for one in found if one is not None]
    if len(every) < len(found):
        return None
    too_large = [one.pop("too_large") for one in every]
    return Costs(
        **{name: _worst([one[name] for one in every]) for name in every[0]},
        too_large=min((tokens for tokens in too_large if tokens is not None), default=None),
    )


def _worst(values: Sequence[float | None]) -> Any:
    return None if None in values else max(value for value in values if value is not None)


def _measure(model: Any, objective: Objective, *, seed: int, cut: CutFirstStep) -> Costs | None:
    loss_fn = with_keyed_dropout(objective.loss_fn, seed=seed, step=0)
    on_cpu = model.device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter  # blind to other processes

    def run(budget: int, place: int) -> Sample:
        micro = cut(budget)[place]
        with peak_memory(model.device) as peak:
            started = clock()
            with one_step(model.device):
                backward(model, [micro], loss_fn, counters=objective.counters, check_sums=False)
            if not on_cpu:
                torch.accelerator.synchronize()
            seconds = clock() - started
        return Sample(input_tokens(micro), seconds, peak.bytes)

    def tokens(budget: int) -> list[int]:
        return [input_tokens(micro) for micro in cut(budget)]

    log.info("micro_tokens: measuring what a micro-batch costs (once for this model and machine)")
    try:
        with waiting("micro_tokens"):
            costs, too_large = first_that_fits(
                budget_range(model.device).measured,
                lambda pair: measure_costs(tokens, run, measured=pair),
            )
    finally:
        model.zero_grad()
        if objective.after_step is not None:
            objective.after_step(model, False)  # what it saw here was no step
    if not too_large:
        return costs
    largest = max(tokens(too_large[-1][1]))
    if costs is None:
        raise OutOfMemoryError(f"out of memory on {largest} tokens, and all smaller ones are alike")
    log.info("micro_tokens: %d tokens do not fit into memory; fewer were measured", largest)
    return replace(costs, too_large=largest)


def _key(model: Any, settings: TrainSettings) -> str:
    """What the costs depend on, as a file name."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    mode = settings.gradient_checkpointing, model.is_activation_checkpointing
    model_config = model.config.to_dict()
    model_config.pop("_name_or_path", None)
    facts = {
        "model": model_config,
        "trained": [len(trained), sum(weight.numel() for weight in trained)],
        "dtype": [str(model.dtype), settings.precision],
        "settings": [settings.objective, settings.padding, *mode],
        "compiled": len(compiled_layers(model)),
        "device": describe_device(model.device),
        "machine": [platform.node(), processor_name(), torch.get_num_threads()],
        "versions": [package_version(), torch.__version__],
    }
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
