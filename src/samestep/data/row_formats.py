"""The forms of rows: which columns a row must have, and what they must hold."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from samestep.data.encode import Mask, Weights
from samestep.data.rows import Row, RowError, raise_all
from samestep.engine.targets import IGNORE

RowFormat = Literal[
    "token ids", "messages", "prompt and completion", "prompt and completion turns", "text"
]

COLUMNS: dict[RowFormat, tuple[str, ...]] = {
    "token ids": ("input_ids", "labels", "token_weights"),
    "messages": ("messages", "tools"),
    "prompt and completion": ("prompt", "completion"),
    "prompt and completion turns": ("prompt", "completion", "tools"),
    "text": ("text",),
}
"""The columns that each form reads."""

ACCEPTED = (
    "accepted columns: input_ids (and labels, token_weights); or messages (and tools); or prompt "
    "and completion, both text or both lists of messages; or text. All rows must have the same. "
    "Each form may add weight"
)


def common_format(rows: Sequence[Row]) -> RowFormat:
    """The form that all rows have.

    Args:
        rows: At least one.

    Returns:
        The form.

    Raises:
        DataError: Rows have no form, or not the same; lists every one.
    """
    common: tuple[RowFormat, str] | None = None
    problems = []
    for row in rows:
        try:
            form = format_of(row.values)
        except RowError as error:
            problems.append(f"{row.origin}: {error}")
            continue
        if common is None:
            common = form, row.origin
        elif form != common[0]:
            problems.append(f"{row.origin}: has {form}, but {common[1]} has {common[0]}")
    raise_all(problems, hint=ACCEPTED)
    assert common is not None
    return common[0]


def format_of(values: Mapping[str, Any]) -> RowFormat:
    """The form of a row; of several, the first of the order above.

    Args:
        values: The columns; one that is None counts as absent.

    Returns:
        The form.

    Raises:
        RowError: The columns make no form.
    """
    present = {name: value for name, value in values.items() if value is not None}
    if "input_ids" in present:
        return "token ids"
    if "messages" in present:
        return "messages"
    if "prompt" in present and "completion" in present:
        prompt, completion = present["prompt"], present["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return "prompt and completion"
        if isinstance(prompt, list) and isinstance(completion, list):
            return "prompt and completion turns"
        raise RowError(
            f"prompt is {type(prompt).__name__} and completion is {type(completion).__name__}: "
            "both must be text, or both lists of messages"
        )
    if "text" in present:
        if isinstance(present["text"], str):
            return "text"
        raise RowError(f"text must be text, found {type(present['text']).__name__}")
    absent = sorted(set(values) - set(present))
    found = f"found the columns {', '.join(present) or 'none'}"
    raise RowError(f"{found} ({', '.join(absent)}: null)" if absent else found)


def tokens_of(values: Mapping[str, Any]) -> tuple[NDArray[np.int64], Mask]:
    """The ids and the mask of a row that is tokenised already.

    Args:
        values: ``input_ids`` [length] and optionally ``labels`` [length].

    Returns:
        Ids [length] and mask [length]; without labels every token is a target.

    Raises:
        RowError: They are not integers, differ in length, or a label is not the token itself.
    """
    ids = _integers("input_ids", values["input_ids"])
    wrong = np.flatnonzero((ids < 0) | (ids >= 2**31))
    if len(wrong):
        raise RowError(f"input_ids[{wrong[0]}] is {ids[wrong[0]]}: no token id")
    if values.get("labels") is None:
        return ids, np.ones(len(ids), dtype=np.bool_)
    labels = _integers("labels", values["labels"])
    if len(labels) != len(ids):
        raise RowError(f"{len(ids)} input_ids but {len(labels)} labels")
    mask: Mask = labels != IGNORE
    wrong = np.flatnonzero(mask & (labels != ids))
    if len(wrong):
        at = wrong[0]
        raise RowError(
            f"labels[{at}] is {labels[at]} but input_ids[{at}] is {ids[at]}: a label is the token "
            f"at its own position (not shifted) or {IGNORE}"
        )
    return ids, mask


def token_weights_of(values: Mapping[str, Any], length: int) -> Weights | None:
    """How much each token of a row that is tokenised already counts as a target.

    Args:
        values: The columns; ``token_weights`` [length] may be missing.
        length: Of ``input_ids``.

    Raises:
        RowError: They are not as many finite numbers of at least 0.
    """
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


def message_weight(message: Mapping[str, Any]) -> float:
    """How much the tokens of a message count as targets: its ``weight``, or 1.

    Raises:
        RowError: It is not a finite number of at least 0.
    """
    weight = message.get("weight", 1.0)
    known = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not (known and math.isfinite(weight) and weight >= 0):
        raise RowError(f"the weight of a message must be a number of at least 0, found {weight!r}")
    return float(weight)


def _integers(name: str, value: Any) -> NDArray[np.int64]:
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):  # ragged
        array = np.asarray(None)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise RowError(f"{name} must be a list of integers")
    if array.size and array.dtype == np.uint64:
        raise RowError(f"{name} has integers that are no token ids")
    return array.astype(np.int64)


def messages_of(values: Mapping[str, Any], column: str) -> list[dict[str, Any]]:
    """The messages of a column, without the keys that are None (which Parquet fills in).

    Args:
        values: The columns.
        column: The one to read.

    Returns:
        At least one message; each has a role.

    Raises:
        RowError: They are not messages.
    """
    messages = values[column]
    if not isinstance(messages, list) or not messages:
        raise RowError(f"{column} must be a list of messages, at least one")
    for at, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RowError(f"{column}[{at}] must be an object, found {type(message).__name__}")
        if not isinstance(message.get("role"), str):
            raise RowError(f"{column}[{at}] has no role; its keys: {', '.join(message) or 'none'}")
    return [
        {key: value for key, value in message.items() if value is not None} for message in messages
    ]


def tools_of(values: Mapping[str, Any]) -> list[Any] | None:
    """The tools of a conversation, for the chat template.

    Args:
        values: The columns. ``tools`` may be a list, or a list written as JSON.

    Returns:
        The tools, or None if there are none.

    Raises:
        RowError: It is not a list.
    """
    tools = values.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise RowError(f"tools is text that is not JSON: {error}") from None
    if tools is not None and not isinstance(tools, list):
        raise RowError(f"tools must be a list, found {type(tools).__name__}")
    return tools or None
