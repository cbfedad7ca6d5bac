"""The causes that the auditor can name: what each is, and what to change."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Diagnosis:
    """A cause and how well it predicts what was seen.

    Attributes:
        cause: A name in `samestep.audit.causes.CAUSES`, or "unexplained".
        residual: Norm of observed minus predicted gradient, over the observed one's.
        evidence: One line of numbers for the reader.
    """

    cause: str
    residual: float
    evidence: str


CAUSES: dict[str, str] = {
    "mean-of-means": (
        "Each micro-batch is divided by its own number of targets, then the results are averaged, "
        "so micro-batches with few targets weigh too much. Count the targets of the whole "
        "accumulated batch first, sum the losses, and divide once."
    ),
    "unscaled-sum": (
        "The losses of the micro-batches are added up without division by anything that grows with "
        "their number: the gradient is multiplied by the accumulation. Divide each micro-batch's "
        "summed loss by the count of the whole batch, or its mean loss by the accumulation."
    ),
    "divided-twice": (
        "The loss is already normalised over the whole batch and is divided by the accumulation "
        "once more. Remove one of the two divisions."
    ),
    "example-weighted": (
        "Micro-batches are weighted in one unit and averaged in another, such as means over tokens "
        "weighted by examples, or pairs weighted by tokens. Sum in one unit, count in the same "
        "unit over the whole batch, and divide once."
    ),
    "last-micro-batch-only": (
        "Only one micro-batch reaches the update: gradients are cleared between micro-batches, or "
        "only the last loss is propagated. Clear gradients once, before the first micro-batch."
    ),
    "padding-counted": (
        "The denominator, or the weight of a micro-batch, counts positions that are no targets: "
        "padding, so that the step depends on how long the rows were padded, or masked tokens such "
        "as the prompt's; or padding is itself a target. Give padding the label -100, and count "
        "labels that are not -100."
    ),
    "unshifted-count": (
        "The denominator, or the weight of a micro-batch, counts labels before the shift: one too "
        "many for every sequence whose first token has a label. Count labels[:, 1:]."
    ),
    "clip-per-micro-batch": (
        "Gradients are clipped after each micro-batch, so large ones are shortened before they are "
        "added. Clip once, after the last micro-batch."
    ),
    "optimizer-step-per-micro-batch": (
        "The optimizer steps after each micro-batch, so later ones see other weights. Step once, "
        "after the last one."
    ),
    "short-window": (
        "The last accumulation window holds fewer micro-batches, but is divided as if it were "
        "full. Divide by what the window holds."
    ),
    "duplicated-examples": (
        "Some examples enter the step more than once, as when a sampler repeats rows to fill the "
        "last batch or to even out ranks. Let the last batch be short, or give repeats no weight."
    ),
    "dropped-examples": (
        "Some examples, or parts of them, never reach the step, as when a loop or a sampler drops "
        "what does not fill a batch, or a collator cuts rows to the length of their neighbours. "
        "Let the last batch be short, and cut every row by a rule of its own."
    ),
    "world-scaled": (
        "The gradient is multiplied by the number of ranks: it is summed over ranks but normalised "
        "on each, or scaled up for an averaging that does not happen."
    ),
    "world-divided": (
        "The gradient is divided by the number of ranks: losses normalised over all ranks are "
        "averaged once more by the all-reduce. Multiply by the number of ranks, or sum."
    ),
    "rank-local-count": (
        "Each rank divides by its own count and the results are averaged, so ranks with few "
        "targets weigh too much. Add the counts up over the ranks before dividing."
    ),
    "ranks-not-synchronised": (
        "The ranks end the step with different weights: some gradients are not reduced. Run the "
        "last backward of the step with gradient synchronisation on."
    ),
    "batch-coupled-term": (
        "Part of the loss is not a sum over examples: it compares or averages over the whole "
        "micro-batch (router load balance, in-batch negatives, sorting, batch statistics), so it "
        "changes with what shares the micro-batch. Gather its statistic over the whole effective "
        "batch first, or use a form that is a sum over sequences."
    ),
    "second-term-per-micro-batch": (
        "One term is normalised over the whole batch, another is added once for each micro-batch, "
        "so its weight grows with the accumulation. Normalise every term over the whole batch."
    ),
    "rng": (
        "The step draws random numbers in the order of computation, so the same examples get "
        "others under another split, or under a repeat. Key them to (seed, step, example)."
    ),
    "accumulation-dtype": (
        "Gradients add up in the low precision of the weights: each addition rounds, and the "
        "error grows with the number of micro-batches. Add them up in float32."
    ),
    "attention-leak": (
        "Sequences that share a micro-batch attend to each other. Keep attention inside each "
        "sequence: block-diagonal masks, or variable-length attention with the borders."
    ),
    "position-leak": (
        "Positions depend on what else is in the micro-batch: they run on across sequences, or "
        "count padding. Let position ids start at 0 at the first real token of every sequence."
    ),
    "boundary-target": (
        "The first token of a packed sequence is predicted from the last token of its neighbour. "
        "Mask the label of the first token of every sequence."
    ),
    "padding-attended": (
        "Padding changes the forward of real tokens: it is attended to, or shifts positions. Pass "
        "an attention mask, and positions that skip padding."
    ),
    "evaluation-side-effect": (
        "An evaluation before the step changes the step: it leaves the model in eval mode, or "
        "gradients, or buffers behind. Restore the mode and run it without gradients."
    ),
    "reported-not-optimised": (
        "The loss that is reported is not the one whose gradient was applied. Report the "
        "normalised objective itself."
    ),
    "eval-mean-of-means": (
        "The evaluation loss is an average of batch averages: short or sparse batches weigh too "
        "much. Add up sums and counts over all batches, and divide once."
    ),
    "metric-mean-of-means": (
        "The metric is an average of micro-batch averages. Add up its sum and its count over the "
        "whole batch, and divide once."
    ),
}
"""By name: one paragraph, what it is and what to change."""

UNEXPLAINED = (
    "None of the known laws predicts what was seen; the residual is that of the best of them."
)


def advice(cause: str | None) -> str:
    """The paragraph of a cause; empty without one."""
    return "" if cause is None else CAUSES.get(cause, UNEXPLAINED)
