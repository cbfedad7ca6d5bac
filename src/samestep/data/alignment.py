"""Values that rows give for each of their targets, put where the targets' tokens stand."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import Tensor

from samestep.data.examples import Examples
from samestep.data.rows import Row, RowError, iter_rows

ReadTargets: TypeAlias = Callable[[Row, int, bool], Sequence[Tensor]]
"""Maps a row, the number of its targets, and whether it was truncated to values for each target."""


def align_to_targets(
    rows: Sequence[Row],
    examples: Examples,
    *,
    read: ReadTargets,
    into: Sequence[Tensor],
    max_length: int | None,
) -> None:
    """Fill tensors [tokens, ...] with the values of targets; the rest of them stays.

    Args:
        rows: Those of the examples, in order.
        examples: What `samestep.data.tokenize.tokenize_rows` made of them.
        read: Gives for each tensor of ``into`` a value for each target [targets, ...]; or raises
            a `RowError`.
        into: What to fill.
        max_length: As for `tokenize_rows`: an example of this length counts as truncated.

    Raises:
        DataError: Rows that cannot be read; lists every one.
    """

    def read_one(at: int, row: Row) -> tuple[slice, Tensor, Sequence[Tensor]]:
        tokens = slice(int(examples.offsets[at]), int(examples.offsets[at + 1]))
        is_target = examples.is_target[tokens].clone()
        is_target[:1] = False  # nothing comes before it that it could be predicted from
        truncated = max_length is not None and len(is_target) == max_length
        return tokens, is_target, read(row, int(is_target.sum()), truncated)

    for _, (tokens, is_target, values) in iter_rows(rows, read_one):
        for tensor, value in zip(into, values, strict=True):
            tensor[tokens][is_target] = value


def check_target_count(description: str, count: int, *, targets: int, truncated: bool) -> None:
    """Refuse a row that does not give one value for each of its targets.

    Args:
        description: What it gives, such as "old_log_p has 3 numbers".
        count: How many values it gives.
        targets: How many targets are left.
        truncated: Whether the row was truncated, so that it may give more.

    Raises:
        RowError: It gives too few, or too many for a row that was not truncated.
    """
    if count < targets or (count > targets and not truncated):
        raise RowError(
            f"{description} for {targets} targets: give one for each token of the completion, the "
            "end-of-sequence token too"
        )
