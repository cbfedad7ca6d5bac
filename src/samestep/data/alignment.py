"""What rows say of each of their targets, put at the places of the tokens."""

from collections.abc import Callable, Sequence

from torch import Tensor

from samestep.data.examples import Examples
from samestep.data.rows import Row, RowError, raise_all

Read = Callable[[Row, int, bool], Sequence[Tensor]]
"""Maps a row, the number of its targets, and whether it was cut to values for each target."""


def align_to_targets(
    rows: Sequence[Row],
    examples: Examples,
    read: Read,
    into: Sequence[Tensor],
    *,
    max_length: int | None,
) -> None:
    """Fill tensors [tokens, ...] with the values of targets; the rest of them stays.

    Args:
        rows: Those of the examples, in order.
        examples: What `samestep.data.tokenize.tokenize_rows` made of them.
        read: Gives a value for each target, for each tensor of ``into``; or raises a `RowError`.
        into: What to fill.
        max_length: As for `tokenize_rows`: an example of this length counts as cut.

    Raises:
        DataError: Every row that cannot be read.
    """
    problems = []
    for at, row in enumerate(rows):
        part = slice(int(examples.offsets[at]), int(examples.offsets[at + 1]))
        places = examples.is_target[part].clone()
        places[:1] = False  # nothing comes before it that it could be predicted from
        cut = max_length is not None and len(places) == max_length
        try:
            values = read(row, int(places.sum()), cut)
        except RowError as error:
            problems.append(f"{row.origin}: {error}")
            continue
        for tensor, value in zip(into, values, strict=True):
            tensor[part][places] = value
    raise_all(problems)


def check_number(told: str, found: int, targets: int, *, cut: bool) -> None:
    """Refuse a row that does not say something of each of its targets.

    Args:
        told: What it says, such as "old_log_p has 3 numbers".
        found: How often.
        targets: How many targets are left.
        cut: Whether the row was cut, so that it may say more.

    Raises:
        RowError: It says too little, or too much of a row that was not cut.
    """
    if found < targets or (found > targets and not cut):
        raise RowError(
            f"{told} for {targets} targets: give one for each token of the completion, the "
            "end-of-sequence token too"
        )
