"""What a run would take: memory by part, and time, from the model's sizes and a measured step."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from samestep.data.records import Records
from samestep.data.stream_records import StreamRecords
from samestep.engine.counts import input_tokens
from samestep.engine.step import backward, step
from samestep.errors import ConfigError
from samestep.models.weightless import without_weights
from samestep.train.forward import with_keyed_dropout
from samestep.train.memory_parts import memory_parts
from samestep.train.micro_tokens import estimate_peak, measured_costs
from samestep.train.precision import bytes_beside_weights, choose_precision, find_device, one_step
from samestep.train.recipes.base import recipe_for
from samestep.train.reporter import duration
from samestep.train.rollouts import with_rollouts
from samestep.train.run_data import step_plans, total_steps
from samestep.train.settings.base import TrainSettings
from samestep.train.setup import TrainingSetup, fitting, load_trainable, set_up
from samestep.utils.memory import memory_limit, peak_memory

_SECONDS = 10.0
"""How long a step is measured: of one that takes longer, as many micro-batches as fit into it."""

_PLANS = 1000
"""Steps whose tokens are counted to know how large a step is on average."""


@dataclass(frozen=True)
class Measured:
    """What the first step was measured to take.

    Attributes:
        peak: Bytes that the process takes at most; None: unknown.
        activations: Of them, those of the largest micro-batch; None: unknown.
        largest: Its tokens.
        seconds: Of the step.
        tokens: Of the step.
        micro_batches: Of the step.
        run: How many of them were run.
        layout: How well they are filled.
        generating: Seconds that its rollouts took to generate; None where none are.
    """

    peak: float | None
    activations: float | None
    largest: int
    seconds: float
    tokens: int
    micro_batches: int
    run: int
    layout: str
    generating: float | None


def forecast(settings: TrainSettings, loaded: tuple[Any, list[Records]]) -> Iterator[str]:
    """Say what a run would take; nothing of it is written.

    Args:
        settings: Finalized settings; ``measure`` says whether a step is taken.
        loaded: What `samestep.train.run_data.load_data` gave.

    Yields:
        Lines of at most 80 columns.

    Raises:
        ConfigError: The model cannot be loaded, or does not fit the settings or the data.
        StepError: A step cannot be taken, as a run would find too.
    """
    settings = choose_precision(_in_one_process(settings))
    device = find_device(settings.device)
    limit = memory_limit(device, settings.memory_limit)
    parts = _parts_without_weights(settings, loaded, device=device)
    too_large = parts is not None and limit is not None and sum(parts.values()) > limit
    measured = None
    if settings.measure and not too_large:
        setup = set_up(settings, loaded=loaded)
        parts = memory_parts(setup.model, setup.objective, settings)
        measured = _measure(setup, settings)
    assert parts is not None
    how = "counted" if measured is None else "a step was measured"
    yield f"What a run would take on {device} (an estimate; {how}):"
    yield from _memory_lines(parts, measured, limit=limit)
    if measured is not None:
        yield from _time_lines(measured, loaded[1][0], settings)
    elif too_large:
        yield "  time: not measured, since that does not fit into memory"
    else:
        yield "  time: not measured (--no-measure)"


def _in_one_process(settings: TrainSettings) -> TrainSettings:
    """The settings of the one process that measures."""
    return settings.model_copy(update={"parallel": "ddp", "cpu_offload": False, "ranks": None})


def _parts_without_weights(
    settings: TrainSettings, loaded: tuple[Any, list[Records]], *, device: torch.device
) -> dict[str, int] | None:
    """What the run holds, from the model's config; None if it takes the weights to know."""
    recipe, (tokenizer, data) = recipe_for(settings), loaded
    try:
        with without_weights(), fitting(settings):
            model = load_trainable(recipe, data, device=device, tokenizer=tokenizer)
            return memory_parts(model, recipe.build(model, data), settings)
    except ConfigError:
        if settings.measure:  # code of the user's own may look at weights
            return None
        raise


def _measure(setup: TrainingSetup, settings: TrainSettings) -> Measured:
    """Take the first step, or a part of it; the setup is spent then, as its weights change."""
    cut, model, counters = setup.micro_batches, setup.model, setup.objective.counters
    plan, made = with_rollouts(
        next(step_plans(setup.train, settings)),
        setup.rollouts,
        micro_batches=cut,
        beat=lambda _: None,
    )
    first, device = plan.examples, cut.device
    micros = list(cut.batches(first, 0))
    sizes = [input_tokens(micro) for micro in micros]
    loss_fn = with_keyed_dropout(setup.objective.loss_fn, seed=settings.seed, step=0)
    costs = measured_costs(
        model,
        setup.objective,
        settings=settings,
        cut=lambda budget: list(cut.with_budget(budget).batches(first, 0)),
    )
    rest: dict[str, Any] = {"counters": counters, "check_sums": False}

    def run(number: int) -> float:
        started = time.perf_counter()
        with one_step(device):
            backward(model, micros[:number], loss_fn, **rest)
        _wait_for(device)
        return time.perf_counter() - started

    with peak_memory(device) as before:
        pass
    with peak_memory(device) as forward_backward:
        run(1)  # compiles kernels and fills caches, too
    number = max(1, min(len(micros), int(_SECONDS / max(run(1), 1e-9))))
    seconds = run(number)
    started = time.perf_counter()
    with peak_memory(device) as update, one_step(device):
        clip = settings.max_grad_norm
        step(model, setup.optimizer, micros[:1], loss_fn, max_grad_norm=clip, **rest)
    _wait_for(device)
    update_seconds = max(0.0, time.perf_counter() - started - seconds / number)
    largest = max(sizes)
    if costs is None:  # such a step is one or two micro-batches, of which one was just run
        peak, grown = update.bytes, _difference(forward_backward.bytes, before.bytes)
    else:
        peak = estimate_peak(costs, largest, reserved=bytes_beside_weights(model, settings))
        grown = None if costs.bytes is None else costs.bytes_per_token * largest
    return Measured(
        peak=peak,
        activations=grown,
        largest=largest,
        seconds=seconds * sum(sizes) / sum(sizes[:number]) + update_seconds,
        tokens=sum(sizes),
        micro_batches=len(micros),
        run=number,
        layout=cut.describe(first),
        generating=None if made is None else made.seconds,
    )


def _difference(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else max(0.0, after - before)


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def _memory_lines(
    parts: Mapping[str, int], measured: Measured | None, *, limit: float | None
) -> Iterator[str]:
    held = sum(parts.values())
    peak = None if measured is None else measured.peak
    room = "" if limit is None else f"; this process may take {_size(limit)}"
    if measured is None:
        yield f"  memory: {_size(held)}, and activations{room}"
    else:
        yield f"  memory: {_size(held if peak is None else peak)} at the peak{room}"
    rows: dict[str, float] = {name: size for name, size in parts.items() if size}
    if measured is not None and measured.activations is not None:
        rows[f"activations of a micro-batch of {measured.largest:,} tokens"] = measured.activations
    if peak is not None and peak > sum(rows.values()):
        rows["the process itself, its libraries and the data"] = peak - sum(rows.values())
    yield from (f"  {_size(size):>10}  {name}" for name, size in rows.items())
    most = held if peak is None else peak
    if limit is not None and most > limit:
        yield "    that is more than there is: fewer weights that train (lora_rank), an"
        yield "    optimizer with less state, or shards on several ranks (fsdp2) take less"


def _time_lines(measured: Measured, records: Records, settings: TrainSettings) -> Iterator[str]:
    steps = total_steps(records, settings)
    most = 1 if isinstance(records, StreamRecords) else _PLANS  # a stream is read for its steps
    plans = islice(step_plans(records, settings), min(steps, most))
    tokens = [sum(records.lengths[at] for at in plan.examples) for plan in plans]
    first, average = tokens[0], sum(tokens) / len(tokens)
    if measured.generating is not None:
        first = average = measured.tokens  # the others are not known before they are generated
    part = f"{measured.run} of {measured.micro_batches} micro-batches were run"
    yield f"  a step: {measured.layout}"
    yield f"  time: {measured.seconds:.3g} s for the first step ({first:,} tokens; {part})"
    if measured.generating is not None:
        yield f"        {measured.generating:.3g} s to generate and reward its rollouts"
    whole = steps * ((measured.generating or 0.0) + measured.seconds * average / first)
    yield f"        {duration(whole)} for {steps:,} steps of {average:,.0f} tokens on average,"
    yield "        without evaluations and checkpoints"
    if (settings.ranks or 1) > 1:
        yield f"        in one process: {settings.ranks} ranks share the rows of each step"


def _size(size: float) -> str:
    """Bytes in a unit that leaves few digits."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            few = size < 1000 * factor
            return f"{size / factor:.3g} {unit}" if few else f"{size / factor:,.0f} {unit}"
    return f"{size / 1e3:.3g} kB"
