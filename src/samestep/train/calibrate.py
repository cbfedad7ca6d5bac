"""Measures what micro-batches of a run cost, and chooses their budget."""

import hashlib
import json
import logging
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import samestep
from samestep.engine.counts import input_tokens
from samestep.engine.step import backward
from samestep.engine.terms import Objective
from samestep.errors import OutOfMemoryError
from samestep.kernels.gemm import processor_name
from samestep.train.budget import (
    BUDGETS,
    DEFAULT,
    Costs,
    Sample,
    best_budget,
    measured,
    peak_bytes,
    remembered,
)
from samestep.train.config import TrainConfig
from samestep.train.keyed import keyed
from samestep.train.resident import memory_to_have, peak_memory
from samestep.utils.files import cache_folder

log = logging.getLogger("samestep")

SPARE = 0.8
"""Share of what the process could have that is taken if no limit is given."""

STATE = {"adamw": 2, "sgd": 0, "adafactor": 0}
"""Elements of optimizer state for each element of a weight (adafactor's are few)."""

Cut = Callable[[int], Sequence[dict[str, Any]]]
"""Maps a budget to the micro-batches of the first step under it."""


def micro_token_budget(
    model: Any, objective: Objective, config: TrainConfig, *, cut: Cut, longest: int
) -> int:
    """The tokens of a micro-batch for this model on this machine.

    Costs are measured once, on the first step's data, and remembered in the cache folder: by model,
    settings that matter, machine and versions. No weight is changed. Where the setting
    ``gradient_checkpointing`` is auto and the longest record would not fit, the model's layers are
    checkpointed (selectively), and measured as they are then.

    Args:
        model: On its device, in train mode, as it will be trained.
        objective: What is optimised.
        config: ``memory_limit`` in GB; None: 80 % of what the process could have.
        cut: The first step's micro-batches under a budget.
        longest: Tokens of the longest record, which cannot be cut.

    Returns:
        The budget.
    """
    path = cache_folder() / "costs" / f"{_key(model, config)}.json"
    try:
        costs = remembered(path, lambda: _measure(model, objective, config, cut))
    except OutOfMemoryError as error:
        if config.recompute(model):
            return micro_token_budget(model, objective, config, cut=cut, longest=longest)
        log.warning("micro_tokens: %s; starting from %d tokens a micro-batch", error, BUDGETS[0])
        return BUDGETS[0]  # the run itself cuts finer still, or says which sequence is too large
    if costs is None:
        return DEFAULT  # such a step is one or two micro-batches anyway
    could = memory_to_have(model.device)
    limit = None if could is None else SPARE * could
    if config.memory_limit is not None:
        limit = config.memory_limit * 1e9
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    reserved = STATE[config.optimizer] * sum(w.numel() * w.element_size() for w in trained)
    needed = peak_bytes(costs, longest, reserved=reserved)
    too_much = needed is not None and limit is not None and needed > limit
    if too_much and config.recompute(model):
        log.info(
            "gradient_checkpointing: selective, since the longest row (%d tokens) would not fit "
            "into memory otherwise",
            longest,
        )
        return micro_token_budget(model, objective, config, cut=cut, longest=longest)
    budget = best_budget(costs, longest=longest, limit=limit, reserved=reserved)
    peak = peak_bytes(costs, budget, reserved=reserved)
    memory = "" if peak is None else f"; about {peak / 1e9:.1f} GB at the peak"
    log.info("micro_tokens: %d tokens a micro-batch%s", budget, memory)
    if peak is not None and limit is not None and peak > limit:
        log.warning("micro_tokens: even that is above the limit of %.1f GB", limit / 1e9)
    return budget


def _measure(model: Any, objective: Objective, config: TrainConfig, cut: Cut) -> Costs | None:
    loss_fn = keyed(objective.loss_fn, seed=config.seed, step=0)
    on_cpu = model.device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter  # blind to other processes

    def run(budget: int, place: int) -> Sample:
        micro = cut(budget)[place]
        with peak_memory(model.device) as peak:
            started = clock()
            backward(model, [micro], loss_fn, counters=objective.counters)
            if not on_cpu:
                torch.accelerator.synchronize()
            seconds = clock() - started
        return Sample(input_tokens(micro), seconds, peak.bytes)

    log.info("micro_tokens: measuring what a micro-batch costs (once for this model and machine)")
    try:
        return measured(lambda budget: [input_tokens(micro) for micro in cut(budget)], run)
    finally:
        model.zero_grad()
        if objective.after_step is not None:
            objective.after_step(model, False)  # what it saw here was no step


def _key(model: Any, config: TrainConfig) -> str:
    """What the costs depend on, as a file name."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    mode = config.gradient_checkpointing, model.is_gradient_checkpointing
    config_of_model = model.config.to_dict()
    config_of_model.pop("_name_or_path", None)
    facts = {
        "model": config_of_model,
        "trained": [len(trained), sum(weight.numel() for weight in trained)],
        "dtype": str(model.dtype),
        "settings": [config.objective, config.padding, *mode],
        "machine": [str(model.device), platform.node(), processor_name(), torch.get_num_threads()],
        "versions": [samestep.__version__, torch.__version__],
    }
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
