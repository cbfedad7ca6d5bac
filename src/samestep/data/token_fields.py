"""What rows give for each token: ids and labels ready made, and values for each target."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from samestep.data.examples import Examples
from samestep.data.rows import Row, RowError, iter_rows
from samestep.data.target_spans import TokenizedText, TokenMask, TokenWeights
from samestep.engine.targets import IGNORE

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


def read_token_ids(values: Mapping[str, Any], *, train_on_all: bool) -> TokenizedText:
    """The tokens of a row that is tokenised already.

    Args:
        values: The columns ``input_ids`` [length], and optionally ``labels`` and ``token_weights``
            [length].
        train_on_all: Every token is a target, whatever the labels say, unless its weight is 0.

    Returns:
        The tokens; without labels every one is a target.

    Raises:
        RowError: They are not integers, differ in length, a label is not the token itself, or a
            weight is not a finite number of at least 0.
    """
    ids = _integers(values["input_ids"], "input_ids")
    wrong = np.flatnonzero((ids < 0) | (ids >= 2**31))
    if len(wrong):
        raise RowError(f"input_ids[{wrong[0]}] is {ids[wrong[0]]}: no token id")
    mask = _labelled(values, ids) | train_on_all
    weights = _weights(values, len(ids))
    return TokenizedText(ids, mask if weights is None else mask & (weights > 0), weights)


def _labelled(values: Mapping[str, Any], ids: NDArray[np.int64]) -> TokenMask:
    if values.get("labels") is None:
        return np.ones(len(ids), dtype=np.bool_)
    labels = _integers(values["labels"], "labels")
    if len(labels) != len(ids):
        raise RowError(f"{len(ids)} input_ids but {len(labels)} labels")
    mask: TokenMask = labels != IGNORE
    wrong = np.flatnonzero(mask & (labels != ids))
    if len(wrong):
        at = wrong[0]
        raise RowError(
            f"labels[{at}] is {labels[at]} but input_ids[{at}] is {ids[at]}: a label is the token "
            f"at its own position (not shifted) or {IGNORE}"
        )
    return mask


def _weights(values: Mapping[str, Any], length: int) -> TokenWeights | None:
    if values.get("token_weights") is None:
        return None
    try:
        weights = np.asarray(values["token_weights"], dtype=np.float32)
    except (TypeError, ValueError, OverflowError):
        weights = np.asarray(np.nan, dtype=np.float32)
    if weights.shape != (length,):
        raise RowError(f"token_weights must be a list of {length} numbers, as input_ids has")
    wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(wrong):
        at = wrong[0]
        raise RowError(f"token_weights[{at}] is {weights[at]}: a finite number of at least 0")
    return weights


def _integers(value: Any, column: str) -> NDArray[np.int64]:
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):  # ragged
        array = np.asarray(None)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise RowError(f"{column} must be a list of integers")
    if array.size and array.dtype == np.uint64:
        raise RowError(f"{column} has integers that are no token ids")
    return array.astype(np.int64)
