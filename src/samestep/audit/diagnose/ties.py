"""Laws that fit alike: further runs tell them apart, and where none does, neither is named."""

from collections.abc import Iterator, Mapping, Sequence

from samestep.audit.causes import UNEXPLAINED, Diagnosis
from samestep.audit.experiments import Experiments
from samestep.audit.gradients import relative_difference
from samestep.audit.hypotheses import (
    Hypothesis,
    SplitEvidence,
    collect_evidence,
    hypotheses,
    only_weights,
)
from samestep.audit.splits import uneven_split
from samestep.audit.subject import Split

Scored = tuple[float, Hypothesis]
"""A hypothesis after the residual of its prediction."""


def fit_alike(scored: Sequence[Scored], *, bound: float) -> list[Scored]:
    """The hypotheses that fit as well as the best, as far as rounding can tell.

    Where the whole times a factor is the split, what its micro-batches weigh says nothing more: a
    loop that divides by a constant weighs them all alike too.

    Args:
        scored: All hypotheses.
        bound: The residual that counts as explained.
    """
    best = min(residual for residual, _ in scored)
    allowed = max(10 * best, 1e-3 * bound)
    fits = [pair for pair in scored if pair[0] <= allowed]
    return [pair for pair in fits if pair[1].scales_whole] or fits


def tell_apart(
    experiments: Experiments,
    split: Split,
    fits: Sequence[Scored],
    *,
    names: Sequence[str] | None,
    **changes: object,
) -> list[Scored]:
    """Those of several hypotheses that hold where their predictions part.

    Args:
        experiments: The subject's.
        split: The split that all of them explain.
        fits: From `fit_alike`.
        names: Of the weights that they are about; None: all.
        **changes: The settings that the split was run under.

    Returns:
        At least one; of several causes only if nothing that was tried parts them.
    """
    left = _without_synonyms(experiments, fits)
    for other, more in _elsewhere(experiments, split, changes):
        if not is_tied(left):
            break
        try:
            evidence = collect_evidence(experiments, other, **{**changes, **more})
        except Exception:  # the subject is the user's code: it may refuse another cut
            continue
        held = _holding(left, evidence if names is None else only_weights(evidence, names))
        left = held or left
    if is_tied(left) and len({len(micro_batch) for micro_batch in split}) == 1:
        # By examples is all alike where the subject takes no micro-batches of other sizes.
        left = [pair for pair in left if pair[1].weighting != "by examples"] or left
    return left


def is_tied(fits: Sequence[Scored]) -> bool:
    """Whether hypotheses have several causes."""
    return len({hypothesis.cause for _, hypothesis in fits}) > 1


def undecided(fits: Sequence[Scored]) -> Diagnosis:
    """What is said of several causes that fit alike."""
    words = {each.cause: f"{each.cause} (weighted {each.weighting})" for _, each in fits}
    text = " and ".join(words.values())
    return Diagnosis(UNEXPLAINED, fits[0][0], f"{text} fit alike in all that was tried")


def _without_synonyms(experiments: Experiments, fits: Sequence[Scored]) -> list[Scored]:
    """Without counts of elements that count no padding, but examples, or what fills them.

    So it is where they are the same for every example, or where those of the whole batch are those
    of the examples added up.
    """
    *singles, whole = [
        experiments.denominators(members)
        for members in (*experiments.single_examples, experiments.whole_batch[0])
    ]
    synonyms = set()
    for name, (_, of_whole) in whole.items():
        values = [each[name].value for each in singles if name in each]
        adds_up = name.startswith("elements of ") and sum(values) == of_whole
        if len(values) == len(singles) and (adds_up or len(set(values)) == 1):
            synonyms.add(f"by {name}")
    return [pair for pair in fits if pair[1].weighting not in synonyms] or list(fits)


def _elsewhere(
    experiments: Experiments, split: Split, changes: Mapping[str, object]
) -> Iterator[tuple[Split, Mapping[str, object]]]:
    """Where counts part that are alike here: an example without targets, and other cuts."""
    if len({len(micro_batch) for micro_batch in split}) == 1:
        yield uneven_split(experiments.subject.size), {}
    if "masking" not in experiments.subject.missing() and not changes.get("masked_examples"):
        shared = [micro_batch for micro_batch in split if len(micro_batch) > 1]
        for micro_batch in shared[:1]:
            yield split, {"masked_examples": micro_batch[:1]}
    if experiments.single_examples != split:
        yield experiments.single_examples, {}
    counts = experiments.subject.example_counts()
    if counts is not None:
        members = (at for micro_batch in split for at in micro_batch)
        order = iter(sorted(members, key=lambda at: counts[at].length))
        yield tuple(tuple(next(order) for _ in micro_batch) for micro_batch in split), {}


def _holding(fits: Sequence[Scored], evidence: SplitEvidence) -> list[Scored]:
    """Those that explain this evidence too."""
    bound, split = evidence.residual_tolerance, evidence.split
    explaining = [
        each for each in hypotheses(evidence) if relative_difference(each.gradient, split) <= bound
    ]
    return [pair for pair in fits if any(_is_same_law(pair[1], each) for each in explaining)]


def _is_same_law(one: Hypothesis, other: Hypothesis) -> bool:
    alone = one.weighting.endswith("alone")  # which one it is differs with the cut
    return one.cause == other.cause and (alone or one.weighting == other.weighting)
