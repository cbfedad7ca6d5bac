"""``compile``: whether the layers of a run are compiled, by what it costs and saves."""

import logging
import time
from typing import Any

import torch
from torch import Tensor

from samestep.data.collate import Padding, collate_examples, to_device
from samestep.data.examples import Example
from samestep.engine.collectives import gather_results
from samestep.engine.counts import input_tokens
from samestep.engine.parallel import is_sharded
from samestep.engine.step import backward
from samestep.engine.terms import Objective
from samestep.errors import ConfigError, OutOfMemoryError
from samestep.kernels.varlen import has_kernels
from samestep.models.compiled import compilable_layers, compile_layers, run_eagerly
from samestep.models.dropout import key_dropout
from samestep.models.lora import num_embeddings
from samestep.train.budget_range import budget_range
from samestep.train.forward import with_keyed_dropout
from samestep.train.micro_tokens import CutFirstStep, measured_costs
from samestep.train.precision import one_step, products
from samestep.train.recipes.base import Recipe

log = logging.getLogger("samestep")

_COMPILING = 15.0
"""Seconds that a graph with its backward may take to compile, for a first guess whether a run is
long enough. Layers share their graphs, so the depth of a model does not count."""

_SAVED = 0.15
"""Share of a step that compiled layers may save, for the same guess."""

_LENGTHS = 7, 4, 3, 2, 5, 2, 3, 2, 4, 2, 3
"""Of the sequences of the probe. Neither their number, nor the longest, nor the sum is a width or a
number of heads: the compiler takes sizes that are equal at first for equal forever."""


def choose_compilation(
    model: Any,
    objective: Objective,
    *,
    recipe: Recipe,
    padding: Padding,
    cut: CutFirstStep,
    tokens: float,
) -> None:
    """Compile the layers of a model if the settings say so, or if it pays for this run.

    Under auto that is asked on accelerators alone: the time of a token is measured before, and
    after; what is no faster is undone. The log says what was chosen, and why.

    Args:
        model: On its device, in train mode, as it will be trained.
        objective: What is optimised.
        recipe: Its settings say ``compile``.
        padding: The layout of micro-batches.
        cut: The first step's micro-batches under a budget.
        tokens: Of the whole run, on this rank.

    Raises:
        ConfigError: Compiled layers were asked for, and cannot be had.
    """
    wanted = recipe.settings.compile
    if wanted == "none" or (wanted == "auto" and not _on_accelerator(model)):
        return
    reason = _why_not(model, recipe, padding)
    before = None
    if not reason and wanted == "auto":
        before, reason = _seconds_per_token(model, objective, recipe=recipe, cut=cut)
        reason = reason or _too_short(model, before * tokens)
    started = time.perf_counter()
    if not reason:
        reason = compile_layers(model, lambda: _outputs(model, recipe, padding))
    # All ranks alike: the slowest of them would decide the time of a step.
    reasons = [each for each in gather_results(lambda: reason) if each]
    gain = ""
    if not reasons and before is not None:
        after, reason = _seconds_per_token(model, objective, recipe=recipe, cut=cut)
        if not reason and after >= before:
            reason = f"compiled layers are no faster here ({before / after:.2f} times)"
        reasons = [each for each in gather_results(lambda: reason) if each]
        if not reasons:
            saved = (before - after) * tokens
            gain = f", {before / after:.2f} times as fast a token, about {saved:.0f} s less in all"
    if reasons:
        run_eagerly(model)
        if wanted == "layers":
            raise ConfigError(f"compile: {reasons[0]}; use auto or none")
        log.info("compile: none, since %s", reasons[0])
        return
    log.info(
        "compile: layers, %d of them%s; compiling took %.0f s so far",
        len(compilable_layers(model)),
        gain,
        time.perf_counter() - started,
    )


def _too_short(model: Any, seconds: float) -> str:
    """Why a run of so many seconds, uncompiled, does not earn back compiling; empty if it does.

    Under adapters the input of the first layer has no gradient, which makes a graph of its own.
    """
    trains_all = all(weight.requires_grad for weight in model.parameters())
    compiling = _COMPILING * (1 if trains_all else 2)
    saved = _SAVED * seconds
    if saved >= compiling:
        return ""
    return (
        f"compiling takes about {compiling:.0f} s, and would save about {saved:.0f} s of the "
        f"{seconds:.0f} s that the steps take; --compile layers compiles anyway"
    )


def _on_accelerator(model: Any) -> bool:
    return bool(model.device.type != "cpu")


def _why_not(model: Any, recipe: Recipe, padding: Padding) -> str:
    """Why the layers cannot be compiled in this run; empty if they can."""
    if is_sharded(model):
        return "layers in shards (fsdp2) are not compiled"
    if padding == "none" and not has_kernels(next(model.parameters())):
        return (
            f"on {model.device.type} attention takes the sequences of a pack one by one, which "
            "does not compile whole; with padding right layers compile"
        )
    if recipe.settings.quantization is not None:
        return "quantised layers run uncompiled"
    if recipe.settings.activation_offload:
        return "activations that are offloaded are taken from uncompiled layers"
    if getattr(model, "is_activation_checkpointing", False):
        return "gradient_checkpointing recomputes uncompiled layers"
    return ""


def _seconds_per_token(
    model: Any, objective: Objective, *, recipe: Recipe, cut: CutFirstStep
) -> tuple[float, str]:
    """The measured time of a token, and why there is none; one of the two is empty.

    Of a token in a micro-batch as large as a run has them: its fixed time is what launches take, of
    which compiled layers have fewer. A step that is too small for two sizes is timed whole.
    """
    try:
        costs = measured_costs(model, objective, settings=recipe.settings, cut=cut)
        if costs is None:
            return _timed_step(model, objective, recipe=recipe, cut=cut), ""
    except OutOfMemoryError:
        return 0.0, "the micro-batches that are measured do not fit into memory"
    wanted = recipe.settings.micro_tokens
    size = budget_range(model.device).least_for_speed if wanted == "auto" else wanted
    return costs.seconds_per_token + costs.seconds / size, ""


def _timed_step(model: Any, objective: Objective, *, recipe: Recipe, cut: CutFirstStep) -> float:
    """Seconds of a token of the first step: the least of two, after one that sets things up."""
    loss_fn = with_keyed_dropout(objective.loss_fn, seed=recipe.settings.seed, step=0)
    times = []
    try:
        for _ in range(3):
            micros = cut(budget_range(model.device).unmeasured)
            started = time.perf_counter()
            with one_step(model.device):
                backward(model, micros, loss_fn, counters=objective.counters, check_sums=False)
            if model.device.type != "cpu":
                torch.accelerator.synchronize()
            times.append(time.perf_counter() - started)
    finally:
        model.zero_grad()
        if objective.after_step is not None:
            objective.after_step(model, False)  # what it saw here was no step
    return min(times[1:]) / sum(map(input_tokens, micros))


def _outputs(model: Any, recipe: Recipe, padding: Padding) -> Tensor:
    """What the model gives for short sequences, in a step's own contexts.

    Graphs that are made in others would not be those of a step.
    """
    with one_step(model.device), products(model, recipe.settings):
        return recipe.outputs(model, _probe(model, padding=padding))


def _probe(model: Any, *, padding: Padding) -> dict[str, Any]:
    """Short sequences, as a micro-batch whose dropout is keyed."""
    vocabulary = num_embeddings(model)
    sequences = [(torch.arange(length) * 7 + 3) % vocabulary for length in _LENGTHS]
    examples = [Example(ids, ids) for ids in sequences]
    micro = to_device(collate_examples(examples, padding=padding), model.device)
    key_dropout(model, micro, seed=0, step=0)
    return micro
