"""The causes that the auditor can name: what each means, and what to change."""

from collections.abc import Iterable, Mapping

from samestep.audit.cause import Cause, Diagnosis
from samestep.errors import CheckError

__all__ = ["CAUSES", "UNEXPLAINED", "Cause", "Diagnosis", "advice_for", "with_causes"]


_TABLE = (
    Cause(
        "mean-of-means",
        meaning=(
            "Each micro-batch is divided by its own number of targets, or of each group that it "
            "holds, then the results are averaged, so micro-batches with few targets weigh too "
            "much."
        ),
        advice=(
            "Count the targets of the whole accumulated batch first, sum the losses, and divide "
            "once. In a transformers.Trainer, take num_items_in_batch in compute_loss and divide "
            "the summed loss by it."
        ),
    ),
    Cause(
        "unscaled-sum",
        meaning=(
            "The losses of the micro-batches are added up without division by anything that grows "
            "with their number: the gradient is multiplied by the accumulation."
        ),
        advice=(
            "Divide each micro-batch's summed loss by the count of the whole batch, or its mean "
            "loss by the accumulation."
        ),
    ),
    Cause(
        "divided-twice",
        meaning=(
            "The loss is already normalised over the whole batch and is divided by the "
            "accumulation once more."
        ),
        advice="Remove one of the two divisions.",
    ),
    Cause(
        "example-weighted",
        meaning=(
            "Micro-batches are weighted in one unit and averaged in another, such as means over "
            "tokens weighted by examples, or pairs weighted by tokens."
        ),
        advice="Sum in one unit, count in the same unit over the whole batch, and divide once.",
    ),
    Cause(
        "weighted-by-place",
        "What a micro-batch weighs depends on when it comes within its window.",
        "Look for what happens to .grad inside the accumulation loop: what is divided, decayed or "
        "averaged there holds the earlier micro-batches, once more each time. Scale each loss "
        "before its backward, by one constant, or all gradients once after the loop.",
    ),
    Cause(
        "weighted-by-size",
        meaning=(
            "What a micro-batch weighs depends on its size by a law that no count of the whole "
            "batch is, as where a loop of two passes takes the mean over a chunk for its sum, or "
            "multiplies a loss by a size that is already in it."
        ),
        advice=(
            "Look at the second pass, where cached gradients meet the outputs again, and at every "
            "mean() and len() between the loss and backward: let each chunk add up its own sum, "
            "and divide once by a count of the whole batch."
        ),
    ),
    Cause(
        "last-micro-batch-only",
        meaning=(
            "Only one micro-batch reaches the update: gradients are cleared between micro-batches, "
            "or only the last loss is propagated."
        ),
        advice="Clear gradients once, before the first micro-batch.",
    ),
    Cause(
        "padding-counted",
        meaning=(
            "The denominator, or the weight of a micro-batch, counts positions that are no "
            "targets: padding, so that the step depends on how long the rows were padded, or "
            "masked tokens such as the prompt's; or padding is itself a target."
        ),
        advice="Give padding the label -100, and count labels that are not -100.",
    ),
    Cause(
        "unshifted-count",
        meaning=(
            "The denominator, or the weight of a micro-batch, counts labels before the shift: one "
            "too many for every sequence whose first token has a label."
        ),
        advice="Count labels[:, 1:].",
    ),
    Cause(
        "clip-per-micro-batch",
        meaning=(
            "Gradients are clipped after each micro-batch, so large ones are shortened before they "
            "are added."
        ),
        advice="Clip once, after the last micro-batch.",
    ),
    Cause(
        "partial-norm",
        meaning=(
            "Gradients are clipped after they are added up, but by the norm of a part of them: of "
            "one rank's shard, of one group of weights, of the last micro-batch."
        ),
        advice=(
            "Look at what the call that clips is given: it needs all weights and their whole "
            "gradients. Of sharded weights, add the squared norms up over the ranks before the "
            "root (with FSDP, the wrapper's own clip_grad_norm_), and clip by that."
        ),
    ),
    Cause(
        "optimizer-step-per-micro-batch",
        meaning="The optimizer steps after each micro-batch, so later ones see other weights.",
        advice="Step once, after the last one.",
    ),
    Cause(
        "state-per-micro-batch",
        meaning=(
            "Something that is no gradient moves once a micro-batch instead of once a step: "
            "weights (decay by hand, a projection), an average of the weights, a running "
            "statistic, or the learning rate."
        ),
        advice=(
            "Look for what else the loop over micro-batches calls beside backward (scheduler.step, "
            "an update of averaged weights, a decay by hand), and call it once, after "
            "optimizer.step."
        ),
    ),
    Cause(
        "gradients-left-over",
        meaning=(
            "Gradients of one step are still there when the next one begins, and are added to "
            "its own."
        ),
        advice=(
            "Call optimizer.zero_grad() once in every step: after optimizer.step(), or before the "
            "first micro-batch. Look for a window that ends without it, as an unfinished one."
        ),
    ),
    Cause(
        "weights-left-out",
        meaning=(
            "Some weights get no gradient as soon as the batch is split, the others are exact: "
            "their gradient is thrown away, or written over, between micro-batches."
        ),
        advice=(
            "Look where the loop or a hook touches these weights' .grad, or freezes and unfreezes "
            "them, and do it once a step."
        ),
    ),
    Cause(
        "misaligned-values",
        meaning=(
            "Examples meet values that belong to others (advantages, weights, a teacher's scores): "
            "what was computed for the whole batch is not cut as the batch is."
        ),
        advice=(
            "Cut such values by the same places as the examples, or carry them in the batch beside "
            "the examples that they belong to."
        ),
    ),
    Cause(
        "short-window",
        meaning=(
            "The last accumulation window holds fewer micro-batches, but is divided as if it were "
            "full."
        ),
        advice="Divide by what the window holds.",
    ),
    Cause(
        "duplicated-examples",
        meaning=(
            "Some examples enter the step more than once, as when a sampler repeats rows to fill "
            "the last batch or to even out ranks."
        ),
        advice="Let the last batch be short, or give repeats no weight.",
    ),
    Cause(
        "dropped-examples",
        meaning=(
            "Some examples, or parts of them, never reach the step, as when a loop or a sampler "
            "drops what does not fill a batch or a window, or rows are cut to the length of their "
            "neighbours."
        ),
        advice=(
            "Let the last batch be short, step the optimizer for an unfinished window too, and cut "
            "every row by a rule of its own."
        ),
    ),
    Cause(
        "knob-dependent",
        meaning=(
            "A size of the loop's own (chunk of a loss, mini-batch, recomputation) changes the "
            "gradient of the same batch."
        ),
        advice=(
            "Sum over the parts that the size makes, and divide once, by the count of the whole "
            "batch; keep every part, and give each the weight of what it holds. What the parts "
            "share, such as a statistic, is computed once for all."
        ),
    ),
    Cause(
        "world-scaled",
        meaning=(
            "The gradient is multiplied by the number of ranks: it is summed over ranks but "
            "normalised on each, or scaled up for an averaging that does not happen."
        ),
        advice=(
            "Normalise by the count of all ranks, and multiply by their number only where the "
            "reduction averages."
        ),
    ),
    Cause(
        "world-divided",
        meaning=(
            "The gradient is divided by the number of ranks: losses normalised over all ranks are "
            "averaged once more by the all-reduce."
        ),
        advice="Multiply by the number of ranks, or sum.",
    ),
    Cause(
        "rank-local-count",
        meaning=(
            "Each rank divides by its own count and the results are averaged, so ranks with few "
            "targets weigh too much."
        ),
        advice="Add the counts up over the ranks before dividing.",
    ),
    Cause(
        "ranks-not-synchronised",
        meaning="The ranks end the step with different weights: some gradients are not reduced.",
        advice="Run the last backward of the step with gradient synchronisation on.",
    ),
    Cause(
        "batch-coupled-term",
        meaning=(
            "Part of the loss is not a sum over examples: it compares or averages over the whole "
            "micro-batch (router load balance, in-batch negatives, sorting, batch statistics), so "
            "it changes with what shares the micro-batch."
        ),
        advice=(
            "Gather its statistic over the whole effective batch first, or use a form that is a "
            "sum over sequences."
        ),
    ),
    Cause(
        "second-term-per-micro-batch",
        meaning=(
            "One term is normalised over the whole batch, another is added once for each "
            "micro-batch, so its weight grows with the accumulation."
        ),
        advice="Normalise every term over the whole batch.",
    ),
    Cause(
        "rng",
        meaning=(
            "The step draws random numbers in the order of computation, so the same examples get "
            "others under another split, or under a repeat."
        ),
        advice="Key them to (seed, step, example).",
    ),
    Cause(
        "recomputed-differently",
        meaning=(
            "What is computed again for the backward draws other random numbers than the forward "
            "did, so the gradient is not that of the loss: the dropout masks of a checkpointed "
            "layer, or of the second pass of a cached loss."
        ),
        advice=(
            "Keep the state of the random number generators with the checkpoint: "
            "preserve_rng_state=True in torch.utils.checkpoint, or, in a checkpoint or a second "
            "pass of your own, save the state before the first forward and set it again before "
            "the second."
        ),
    ),
    Cause(
        "accumulation-dtype",
        meaning=(
            "Gradients add up in the low precision of the weights: each addition rounds, and the "
            "error grows with the number of micro-batches."
        ),
        advice="Add them up in float32.",
    ),
    Cause(
        "attention-leak",
        meaning="Sequences that share a micro-batch attend to each other.",
        advice=(
            "Keep attention inside each sequence: block-diagonal masks, or variable-length "
            "attention with the borders."
        ),
    ),
    Cause(
        "position-leak",
        meaning=(
            "Positions depend on what else is in the micro-batch: they run on across sequences, or "
            "count padding."
        ),
        advice="Let position ids start at 0 at the first real token of every sequence.",
    ),
    Cause(
        "boundary-target",
        meaning=(
            "The first token of a packed sequence is predicted from the last token of its "
            "neighbour."
        ),
        advice="Mask the label of the first token of every sequence.",
    ),
    Cause(
        "padding-attended",
        meaning=(
            "Padding changes the forward of real tokens: it is attended to, or shifts positions."
        ),
        advice="Pass an attention mask, and positions that skip padding.",
    ),
    Cause(
        "evaluation-side-effect",
        meaning=(
            "An evaluation before the step changes the step: it leaves the model in eval mode, or "
            "gradients, or buffers behind."
        ),
        advice="Restore the mode and run it without gradients.",
    ),
    Cause(
        "reported-not-optimised",
        meaning="The loss that is reported is not the one whose gradient was applied.",
        advice="Report the normalised objective itself.",
    ),
    Cause(
        "eval-mean-of-means",
        meaning=(
            "The evaluation loss is an average of batch averages: short or sparse batches weigh "
            "too much."
        ),
        advice="Add up sums and counts over all batches, and divide once.",
    ),
    Cause(
        "padding-scored",
        meaning=(
            "A number that is reported scores or counts padding, so it depends on how long the "
            "rows were padded, and so on what shared their batch."
        ),
        advice=(
            "Look at what the metric compares and divides by: leave out the places whose label is "
            "-100 or whose attention mask is 0, in the hits as in the count (not numel())."
        ),
    ),
    Cause(
        "metric-mean-of-means",
        meaning="The metric is an average of micro-batch averages.",
        advice="Add up its sum and its count over the whole batch, and divide once.",
    ),
)

CAUSES: Mapping[str, Cause] = {cause.name: cause for cause in _TABLE}
"""By name, in the order of the documentation."""

UNEXPLAINED = "unexplained"
"""What stands in place of a cause where nothing predicts what was seen."""

_UNEXPLAINED_ADVICE = (
    "No known cause predicts what was seen; the residual is that of the best of them."
)


def with_causes(extra: Iterable[Cause]) -> dict[str, Cause]:
    """The table with causes of the user's.

    Raises:
        CheckError: A name is taken.
    """
    causes = dict(CAUSES)
    for cause in extra:
        if cause.name in causes or cause.name == UNEXPLAINED:
            raise CheckError(f"causes: {cause.name!r} is taken; choose another name")
        causes[cause.name] = cause
    return causes


def advice_for(name: str | None, causes: Mapping[str, Cause] = CAUSES) -> str:
    """The paragraph of a cause; empty without one.

    Raises:
        CheckError: There is no such cause.
    """
    if name is None:
        return ""
    if name == UNEXPLAINED:
        return _UNEXPLAINED_ADVICE
    if name not in causes:
        raise CheckError(
            f"there is no cause {name!r}: declare it by causes=[samestep.Cause({name!r}, ...)]"
        )
    return causes[name].paragraph
