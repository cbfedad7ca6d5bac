"""``compile``: whether the layers of a run are compiled, by what it costs and saves."""

import logging
import time
from typing import Any

import torch
from torch import Tensor

from samestep.data.collate import Padding, collate_examples, to_device
from samestep.data.examples import Example
from samestep.engine.collectives import gather_results
from samestep.engine.parallel import is_sharded
from samestep.engine.terms import Objective
from samestep.errors import ConfigError, OutOfMemoryError
from samestep.models.compiled import compilable_layers, compile_layers, run_eagerly
from samestep.models.dropout import key_dropout
from samestep.models.lora import num_embeddings
from samestep.train.micro_tokens import CutFirstStep, measured_costs
from samestep.train.precision import one_step, products
from samestep.train.recipes.base import Recipe

log = logging.getLogger("samestep")

_COMPILING = 60.0
"""Seconds that compiling may take, for a first guess whether a run is long enough."""

_SAVED = 0.2
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
    reason = _why_not(model, recipe)
    before = None
    if not reason and wanted == "auto":
        before, reason = _seconds_per_token(model, objective, recipe=recipe, cut=cut)
        if not reason and before * tokens * _SAVED < _COMPILING:
            reason = (
                f"the run takes about {before * tokens:.0f} s, too short to earn back compiling; "
                "--compile layers compiles anyway"
            )
    started = time.perf_counter()
    if not reason:
        reason = compile_layers(model, lambda: _outputs(model, recipe, padding))
    # All ranks alike: the slowest of them would decide the time of a step.
    reasons = [each for each in gather_results(lambda: reason) if each]
    if not reasons and before is not None:
        reasons, gain = _compared(model, objective, recipe=recipe, cut=cut, before=before)
    else:
        gain = ""
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


def _on_accelerator(model: Any) -> bool:
    return bool(model.device.type != "cpu")


def _why_not(model: Any, recipe: Recipe) -> str:
    """Why the layers cannot be compiled in this run; empty if they can."""
    if is_sharded(model):
        return "layers in shards (fsdp2) are not compiled"
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
    """The measured time of a token, and why there is none; one of the two is empty."""
    try:
        costs = measured_costs(model, objective, settings=recipe.settings, cut=cut)
    except OutOfMemoryError:
        return 0.0, "the micro-batches that are measured do not fit into memory"
    if costs is None:
        return 0.0, "the first step is too small to measure the time of a token"
    return costs.seconds_per_token, ""


def _compared(
    model: Any, objective: Objective, *, recipe: Recipe, cut: CutFirstStep, before: float
) -> tuple[list[str], str]:
    """Why compiled layers are of no use after all, and what they gain, in words."""
    after, reason = _seconds_per_token(model, objective, recipe=recipe, cut=cut)
    if not reason and after >= before:
        reason = f"compiled layers are no faster here ({before / after:.2f} times)"
    reasons = [each for each in gather_results(lambda: reason) if each]
    return reasons, "" if reasons else f", {before / after:.2f} times as fast a token"


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
