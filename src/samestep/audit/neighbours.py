"""Whether examples that share a micro-batch feel each other, and through what."""

from samestep.audit.laws import closeness
from samestep.audit.runs import Runs
from samestep.audit.subject import Cut
from samestep.audit.vectors import combine, compare, fit, norm


def coupled(runs: Runs, cut: Cut, **changes: object) -> float | None:
    """How far two examples of equal counts are from the sum of the two alone, relative.

    An example and a copy of it with other inputs count the same in every unit. So however many
    terms there are, if each is a sum over examples the pair's gradient is parallel to the sum of
    the two's own.

    Returns:
        The largest of the pairs tried, or None if the subject's inputs cannot be changed.
    """
    changes = {key: value for key, value in changes.items() if key != "masked"}
    found = []
    for example in {cut[0][0], cut[-1][-1]}:
        try:
            pair = runs.gradient(((example, example),), **changes, twins=True)
            own = runs.gradient(((example,),), **changes)
            twin = runs.gradient(((example,),), **changes, altered=(example,))
        except Exception:  # the subject is the user's code: it may refuse changed inputs
            continue
        if norm(combine([own, twin], [1.0, -1.0])) > 1e-6 * norm(own):
            found.append(fit(pair, [combine([own, twin], [1.0, 1.0])]).residual)
    return max(found, default=None)


def leak(runs: Runs, cut: Cut, **changes: object) -> str | None:
    """The leak between sequences that lie in one row, or None if each has a row of its own."""
    one, other = cut[0][0], cut[-1][-1]
    shape = runs.subject.shape((one, other))
    if not changes.get("packed") and (shape is None or shape[0] != 1):
        return None
    moved = moved_by_neighbour(runs, neighbour=one, kept=other, **changes)
    close = closeness(runs)
    return "position-leak" if moved is not None and moved <= close else "attention-leak"


def moved_by_neighbour(runs: Runs, *, neighbour: int, kept: int, **changes: object) -> float | None:
    """How much the tokens of a neighbour without targets change the gradient, relative."""
    changes = {**changes, "masked": (neighbour,)}
    cut = ((neighbour, kept),)
    try:
        base = runs.gradient(cut, **changes)
        changed = runs.gradient(cut, **{**changes, "altered": (neighbour,)})
    except Exception:  # the subject has no tokens to change, or no targets to mask
        return None
    return compare(changed, base).relative_difference
