"""The table of the axes, in the order of the report. What is here is run, named and documented."""

from collections.abc import Mapping

from samestep.audit.axes.axis import Axis
from samestep.audit.axes.evaluation_ranks import evaluation_ranks
from samestep.audit.axes.gradient import (
    dropout,
    evaluation_first,
    low_precision,
    micro_batch,
    order,
    packing,
    padding,
    short_window,
    terms,
    zero_target,
)
from samestep.audit.axes.knobs import knobs
from samestep.audit.axes.loader import loader
from samestep.audit.axes.next_step import next_step
from samestep.audit.axes.ranks import ranks
from samestep.audit.axes.reported import evaluation_batch, reported

_TABLE = (
    Axis(
        "micro-batch",
        "the cut: 1 x 8, 2 x 4, 4 x 2 against 8 x 1, and ragged ones for custom loops",
        micro_batch,
    ),
    Axis("order", "the order of examples and of micro-batches", order),
    Axis(
        "padding",
        "more padding, on the side where the collator or the tokenizer pads",
        padding,
        needs=("padding",),
    ),
    Axis("packing", "sequences in one row instead of a row each", packing, needs=("packing",)),
    Axis(
        "short-window",
        "fewer micro-batches than a full window; for trainers, a smaller last one too",
        short_window,
        needs=("window",),
    ),
    Axis(
        "next-step",
        "a step before it: the second of two in a row, whole against split, and with the "
        "gradients that the first one left emptied",
        next_step,
    ),
    Axis(
        "knobs",
        "the sizes of its own that a subject declares: chunks of a loss, recomputation on or off",
        knobs,
        needs=("knobs",),
        cause="knob-dependent",
    ),
    Axis(
        "loader",
        "the loop's own loader, which deals the rows: each enters once, and the step is the same",
        loader,
        needs=("loader",),
    ),
    Axis("zero-target", "a micro-batch without targets", zero_target, needs=("masking",)),
    Axis("terms", "the cut again, of each loss term alone", terms, needs=("terms",)),
    Axis(
        "ranks",
        "two processes (gloo) instead of one; their weights must agree afterwards",
        ranks,
        needs=("ranks",),
    ),
    Axis(
        "reported",
        "the cut again: the loss and the metrics that the loop logs, and whether that loss is the "
        "one whose gradient was applied",
        reported,
    ),
    Axis(
        "evaluation-batch",
        "the evaluation batch size: loss and metrics at the same weights",
        evaluation_batch,
        needs=("evaluation",),
    ),
    Axis(
        "evaluation-ranks",
        "an evaluation on two processes instead of one, over the same batches",
        evaluation_ranks,
        needs=("ranks", "evaluation"),
    ),
    Axis(
        "evaluation-first",
        "an evaluation before the step",
        evaluation_first,
        needs=("evaluation",),
        cause="evaluation-side-effect",
    ),
    Axis(
        "low-precision",
        "bfloat16 weights: the error may not grow with the accumulation",
        low_precision,
        on_request=True,
    ),
    Axis(
        "dropout",
        "the cut again, with dropout on and the same seed",
        dropout,
        on_request=True,
    ),
)

AXES: Mapping[str, Axis] = {axis.name: axis for axis in _TABLE}
"""By name."""

DEFAULT_AXES = tuple(axis.name for axis in _TABLE if not axis.on_request)
"""Those that run unless others are named."""
