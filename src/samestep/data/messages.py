"""The messages of a conversation, its tools and its weights, as columns of rows hold them."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from samestep.data.rows import RowError

Messages = list[dict[str, Any]]
"""Each with a role, as chat templates take them."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a chat template renders.

    Attributes:
        messages: At least one.
        prompt: How many of them come first and hold no target.
        tools: For the template, or None.
    """

    messages: Messages
    prompt: int
    tools: list[Any] | None


def read_conversation(values: Mapping[str, Any]) -> Conversation:
    """The conversation of a row.

    Args:
        values: The columns: ``messages``, or ``prompt`` and ``completion`` as messages; of the
            latter only turns of the completion are targets. And ``tools``, or none.

    Returns:
        The conversation.

    Raises:
        RowError: The columns hold no messages or no tools, or a content that is no text.
    """
    tools = read_tools(values)
    if values.get("messages") is not None:
        return Conversation(read_message_texts(values, "messages"), 0, tools)
    prompt = read_message_texts(values, "prompt")
    return Conversation(prompt + read_message_texts(values, "completion"), len(prompt), tools)


def read_message_texts(values: Mapping[str, Any], column: str) -> Messages:
    """The messages of a column, with contents that are text (parts of text were joined before).

    Args:
        values: The columns.
        column: The one to read.

    Returns:
        At least one message.

    Raises:
        RowError: They are not messages, or a content is no text.
    """
    messages = read_messages(values, column)
    for at, message in enumerate(messages):
        content = message.get("content", "")
        if not isinstance(content, str):
            raise RowError(f"{column}[{at}].content must be text, found {_kind(content)}")
    return messages


def _kind(content: Any) -> str:
    if not isinstance(content, list):
        return type(content).__name__
    kinds = {str(part.get("type")) for part in content if isinstance(part, Mapping)} - {"text"}
    return f"parts of {', '.join(sorted(kinds))} (vision_language reads images)"


def read_messages(values: Mapping[str, Any], column: str) -> Messages:
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
            raise RowError(
                f"{column}[{at}] has no role; its keys: {', '.join(map(str, message)) or 'none'}"
            )
    return [
        {key: value for key, value in message.items() if value is not None} for message in messages
    ]


def read_tools(values: Mapping[str, Any]) -> list[Any] | None:
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


def message_weights(messages: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """How much the tokens of each message count as targets.

    Args:
        messages: Each may have a ``weight``; without it counts as 1.

    Returns:
        Finite numbers of at least 0, one for each message; None if no message has a weight.

    Raises:
        RowError: A weight is not such a number.
    """
    if not any("weight" in message for message in messages):
        return None
    return [_message_weight(message.get("weight", 1.0)) for message in messages]


def _message_weight(weight: Any) -> float:
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    try:
        number = float(weight) if is_number else math.nan
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and number >= 0):
        raise RowError(f"the weight of a message must be a number of at least 0, found {weight!r}")
    return number
