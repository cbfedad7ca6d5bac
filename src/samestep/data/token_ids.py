"""Rows that are tokenised already: ids, and optionally labels and weights, checked."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samestep.data.rows import RowError
from samestep.data.target_spans import TokenizedText, TokenMask, TokenWeights
from samestep.engine.targets import IGNORE


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
    except (TypeError, ValueError):
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
