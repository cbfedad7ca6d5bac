"""Names the law behind a difference: predict the gradient that each bug would give, and score it.

No reference is needed. The micro-batches of a cut are run alone, each as if it were the effective
batch; known bugs combine those gradients in known ways. The whole batch run undivided tells what
the loop itself thinks the answer is.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

from samestep.audit.runs import Runs
from samestep.audit.subject import Cut, Gradient
from samestep.audit.vectors import Fit, combine, compare, fit, flatten

LINEAR = 1e-5
"""Residual below which a prediction explains a gradient, or 100 noise floors if that is more."""


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


@dataclass(frozen=True)
class Case:
    """Everything that is known about one difference.

    Attributes:
        split: The gradient of the cut.
        whole: The gradient of the undivided batch.
        alone: The gradient of each micro-batch alone.
        examples: How many examples each micro-batch holds.
        targets: How many targets each holds, or None.
        close: Residual that counts as explained.
    """

    split: Gradient
    whole: Gradient
    alone: Sequence[Gradient]
    examples: Sequence[int]
    targets: Sequence[int] | None
    close: float


def case_of(runs: Runs, cut: Cut, **changes: object) -> Case:
    """Run what a diagnosis needs."""
    facts = runs.subject.facts()
    return Case(
        split=runs.run(cut, **changes).gradient,
        whole=runs.run((tuple(index for micro in cut for index in micro),), **changes).gradient,
        alone=[runs.run((micro,), **changes).gradient for micro in cut],
        examples=[len(micro) for micro in cut],
        targets=None
        if facts is None
        else [sum(facts[index].targets for index in micro) for micro in cut],
        close=max(LINEAR, 100 * runs.floor()),
    )


def diagnose_split(runs: Runs, cut: Cut, **changes: object) -> Diagnosis:
    """Why a cut gives another gradient than the whole batch.

    Args:
        runs: The subject.
        cut: The cut at fault.
        **changes: The setting that it was run under.

    Returns:
        The cause that predicts the gradient best, if it predicts it at all.
    """
    case = case_of(runs, cut, **changes)
    clipped = _by_clipping(case)
    if clipped is not None:
        return clipped
    predictions = [*_linear_laws(case), *_padding_laws(runs, cut, case)]
    chained = runs.subject.chained(cut, replace(runs.plain, **changes))  # type: ignore[arg-type]
    if chained is not None:
        predictions.append(("optimizer-step-per-micro-batch", chained.gradient))
    scored = [
        (compare(prediction, case.split).relative_difference, name)
        for name, prediction in predictions
    ]
    best, _ = min(scored, default=(math.inf, "unexplained"))
    if best <= case.close:
        # The first law in the list wins among equals, as where all micro-batches are of one size.
        first = next(law for residual, law in scored if residual <= max(case.close, 10 * best))
        return Diagnosis(first, best, _evidence(case))
    other = _nonlinear(runs, cut, case, **changes)
    return other or Diagnosis("unexplained", best, _evidence(case))


def _linear_laws(case: Case) -> Iterator[tuple[str, Gradient]]:
    """What each linear bug would give, the commonest first."""
    alone, number = case.alone, len(case.alone)
    yield "mean-of-means", combine(alone, [1 / number] * number)
    yield "unscaled-sum", combine(alone, [1.0] * number)
    yield "example-weighted", combine(alone, _shares(case.examples))
    if _any(case.targets):
        yield "example-weighted", combine(alone, _shares(case.targets))
    yield "unscaled-sum", combine([case.whole], [float(number)])
    yield "divided-twice", combine([case.whole], [1 / number])
    for kept in (number - 1, 0):
        shares = [1.0, 1 / number, case.examples[kept] / sum(case.examples)]
        if _any(case.targets):
            shares.append(case.targets[kept] / sum(case.targets))
        for share in shares:
            yield "last-micro-batch-only", combine([alone[kept]], [share])


def _any(counts: Sequence[int] | None) -> TypeGuard[Sequence[int]]:
    return counts is not None and sum(counts) > 0


def _shares(counts: Sequence[int]) -> list[float]:
    return [one / sum(counts) for one in counts]


def _padding_laws(runs: Runs, cut: Cut, case: Case) -> Iterator[tuple[str, Gradient]]:
    """Division by padded positions, which a cut changes: of all of them, or of the shifted ones."""
    everything = tuple(index for micro in cut for index in micro)
    shapes = [runs.subject.shape(micro) for micro in (*cut, everything)]
    known = [one for one in shapes if one is not None]
    if len(known) < len(shapes):
        return
    for shift in (0, 1):
        *parts, whole = [rows * (length - shift) for rows, length in known]
        if sum(parts) != whole:
            yield "padding-counted", combine([case.whole], [whole / sum(parts)])


def _by_clipping(case: Case) -> Diagnosis | None:
    """Clipping, seen by gradients of different batches that have exactly the same norm.

    Then only directions can be read. A clip at the end leaves the ratio of split to whole
    coefficients of the bug that it hides; a clip of each micro-batch leaves another.
    """
    norms = [_norm(one) for one in (*case.alone, case.whole)]
    if sum(norm >= max(norms) * (1 - 1e-5) for norm in norms) < 2:
        return None
    whole, split = fit(case.whole, case.alone), fit(case.split, case.alone)
    if max(whole.residual, split.residual) > case.close or case.targets is None:
        return None
    ratios = [
        s / w if w else 0.0 for s, w in zip(split.coefficients, whole.coefficients, strict=True)
    ]
    patterns = [("mean-of-means", [1 / max(n, 1) for n in case.targets])]
    if len(set(case.examples)) > 1:
        shares = zip(case.examples, case.targets, strict=True)
        patterns.append(("example-weighted", [b / max(n, 1) for b, n in shares]))
    for name, pattern in patterns:
        if _proportional(ratios, pattern):
            return Diagnosis(name, split.residual, "under a final clip; " + _evidence(case))
    return Diagnosis("clip-per-micro-batch", split.residual, _evidence(case))


def _proportional(one: Sequence[float], other: Sequence[float]) -> bool:
    quotients = [a / b for a, b in zip(one, other, strict=True) if b]
    return max(quotients) - min(quotients) <= 1e-5 * max(map(abs, quotients))


def _norm(gradient: Gradient) -> float:
    return float(flatten(gradient, gradient).norm()) if gradient else 0.0


def _nonlinear(runs: Runs, cut: Cut, case: Case, **changes: object) -> Diagnosis | None:
    """Causes that are no combination of the micro-batches' own gradients."""
    repeat = compare(runs.again(cut, **changes).gradient, case.split).relative_difference
    if repeat > case.close:
        return Diagnosis("rng", repeat, f"the same cut twice differs by {repeat:.1e}")
    whole, split = fit(case.whole, case.alone), fit(case.split, case.alone)
    if whole.residual <= case.close and split.residual <= case.close:
        return _by_coefficients(whole, split, case)
    return _what_couples(runs, cut, max(whole.residual, split.residual), case.close, **changes)


def _by_coefficients(whole: Fit, split: Fit, case: Case) -> Diagnosis | None:
    """Micro-batches that are lost or entered several times."""
    ratios = [
        s / w if abs(w) > 1e-9 else 1.0
        for s, w in zip(split.coefficients, whole.coefficients, strict=True)
    ]
    if any(abs(ratio) < 1e-6 for ratio in ratios):
        return Diagnosis("last-micro-batch-only", split.residual, _evidence(case))
    return None


def _what_couples(
    runs: Runs, cut: Cut, residual: float, close: float, **changes: object
) -> Diagnosis:
    """Whether examples feel each other, or terms in different units are mixed.

    An example and a copy of it with other tokens count the same in every unit. So however many
    terms there are, if each is a sum over examples the pair's gradient is parallel to the sum of
    the two's own.
    """
    evidence = f"{residual:.1e} of the gradient is no sum of the micro-batches' own"
    one, other = cut[0][0], cut[-1][-1]
    coupled = _coupling(runs, one, **changes)
    if coupled is None:
        return Diagnosis("batch-coupled-term", residual, evidence)
    evidence += f"; two examples of equal counts miss the sum of their own by {coupled:.1e}"
    if coupled <= close:
        return Diagnosis("second-term-per-micro-batch", residual, evidence)
    shape = runs.subject.shape((one, other))
    if not changes.get("packed") and (shape is None or shape[0] != 1):
        return Diagnosis("batch-coupled-term", residual, evidence)
    moved = _moved_by_neighbour(runs, neighbour=one, kept=other, **changes)
    cause = "position-leak" if moved is not None and moved <= close else "attention-leak"
    return Diagnosis(cause, residual, evidence)


def coupled(runs: Runs, pair: tuple[int, int], close: float, **changes: object) -> bool:
    """Whether examples feel each other, as far as can be told: yes where it cannot."""
    found = [_coupling(runs, example, **changes) for example in pair]
    known = [one for one in found if one is not None]
    return not known or max(known) > close


def _coupling(runs: Runs, example: int, **changes: object) -> float | None:
    """How far a pair of examples of equal counts is from the sum of the two alone, relative."""
    changes = {key: value for key, value in changes.items() if key != "masked"}
    try:
        pair = runs.run(((example, example),), **changes, twins=True).gradient
        own = runs.run(((example,),), **changes).gradient
        twin = runs.run(((example,),), **changes, altered=(example,)).gradient
    except Exception:  # the subject has no tokens to change
        return None
    if not _norm(combine([own, twin], [1.0, -1.0])):
        return None
    return fit(pair, [combine([own, twin], [1.0, 1.0])]).residual


def _moved_by_neighbour(
    runs: Runs, *, neighbour: int, kept: int, **changes: object
) -> float | None:
    """How much the tokens of a neighbour without targets change the gradient, relative."""
    changes = {**changes, "masked": (neighbour,)}
    cut = ((neighbour, kept),)
    try:
        base = runs.run(cut, **changes).gradient
        changed = runs.run(cut, **{**changes, "altered": (neighbour,)}).gradient
    except Exception:  # the subject has no tokens to change, or no targets to mask
        return None
    return compare(changed, base).relative_difference


def _evidence(case: Case) -> str:
    """The coefficients of both gradients on the micro-batches' own, for the reader."""
    whole, split = fit(case.whole, case.alone), fit(case.split, case.alone)

    def shown(found: Fit) -> str:
        return " ".join(f"{one:.4g}" for one in found.coefficients)

    counts = "" if case.targets is None else f"; targets {' '.join(map(str, case.targets))}"
    return (
        f"on the micro-batches' own gradients: whole = [{shown(whole)}] "
        f"(residual {whole.residual:.0e}), split = [{shown(split)}] "
        f"(residual {split.residual:.0e}); examples {' '.join(map(str, case.examples))}{counts}"
    )


def diagnose_padding(runs: Runs, *, columns: int, side: str) -> Diagnosis:
    """Why padding changes the gradient: it is counted, or it is seen."""
    plain = runs.run(runs.whole)
    padded = runs.run(runs.whole, padding=columns, side=side)
    seen = compare(padded.gradient, plain.gradient)
    evidence = f"{columns} columns on the {side}: x {seen.ratio:.6g}, cosine {seen.cosine:.6f}"
    if 1 - seen.cosine <= max(LINEAR, 100 * runs.floor()):
        return Diagnosis("padding-counted", 1 - seen.cosine, evidence)
    cause = "position-leak" if side == "left" else "padding-attended"
    return Diagnosis(cause, seen.relative_difference, evidence)


def diagnose_pack(runs: Runs, singles: Cut) -> Diagnosis:
    """Why a pack of all examples gives another gradient than a row each."""
    whole = runs.run(runs.whole).gradient
    packed = runs.run(runs.whole, packed=True).gradient
    seen = compare(packed, whole)
    scale = f"x {seen.ratio:.6g}, cosine {seen.cosine:.6f}"
    if 1 - seen.cosine <= max(LINEAR, 100 * runs.floor()):
        return Diagnosis("unshifted-count", 1 - seen.cosine, f"another scale only: {scale}")
    one, other = singles[0][0], singles[-1][0]
    moved = _moved_by_neighbour(runs, neighbour=one, kept=other, packed=True)
    if moved is None:
        return Diagnosis("attention-leak", seen.relative_difference, scale)
    evidence = f"{scale}; a neighbour's tokens move a sequence's gradient by {moved:.1e}"
    if moved <= max(LINEAR, 100 * runs.floor()):
        return Diagnosis("position-leak", seen.relative_difference, evidence)
    return Diagnosis("attention-leak", seen.relative_difference, evidence)


def diagnose_empty(runs: Runs, cut: Cut, masked: tuple[int, ...]) -> Diagnosis:
    """Why a micro-batch without targets changes the step."""
    found = runs.run(cut, masked=masked).gradient
    if not all(bool(tensor.isfinite().all()) for tensor in found.values()):
        return Diagnosis("mean-of-means", 0.0, "the empty micro-batch divides 0 by 0")
    return diagnose_split(runs, cut, masked=masked)
