"""The forms in which messages come, made into the one that chat templates take.

Roles of ShareGPT (human, gpt), text in parts, content that is null beside calls of tools, and
arguments of calls that are JSON in a string. Messages that are as templates take them stay as they
are, so that caches and fingerprints of such rows do not depend on what is done here.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from samestep.data.rows import Row, RowError

MESSAGE_COLUMNS = ("messages", "prompt", "completion", "chosen", "rejected")
"""The columns that may hold messages."""

LEARNED_ROLE = "assistant"
"""The role whose turns are targets."""

ROLES = ("system", "developer", "user", LEARNED_ROLE, "tool")
"""The roles that are known to templates."""

_ALIASES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "bard", "bing", "model", "ai"), LEARNED_ROLE),
    **dict.fromkeys(("function", "function_response", "tool_response", "observation"), "tool"),
}
"""What others call the roles, ShareGPT first."""

_TEXT_PARTS = (None, "text", "input_text", "output_text")


def normalize_messages(row: Row) -> Row:
    """The row with its messages as chat templates take them.

    Args:
        row: Any row; columns that hold no list of messages are left alone.

    Returns:
        The same row where there was nothing to do.

    Raises:
        RowError: Messages that cannot be understood: a role one letter off, arguments of a call
            that are no JSON.
    """
    changed: dict[str, Any] = {}
    for column in MESSAGE_COLUMNS:
        messages = row.values.get(column)
        if isinstance(messages, list) and messages and isinstance(messages[0], Mapping):
            plain = [
                _plain_message(message, f"{column}[{at}]", row=row)
                if isinstance(message, Mapping)
                else message
                for at, message in enumerate(messages)
            ]
            if any(new is not old for new, old in zip(plain, messages, strict=True)):
                changed[column] = plain
    prompt, completion = (
        changed.get(name, row.values.get(name)) for name in ("prompt", "completion")
    )
    if (
        isinstance(prompt, list)
        and isinstance(completion, list)
        and begins_with(completion, prompt)
    ):
        changed["completion"] = completion[len(prompt) :]
    return row.with_values(changed) if changed else row


def begins_with(messages: list[Any], prompt: list[Any]) -> bool:
    """Whether messages begin with all of a prompt, and go on.

    Args:
        messages: Messages.
        prompt: Messages; none of them is no prompt.

    Returns:
        Whether they do: the same roles say the same.
    """

    def said(message: Any) -> Any:
        if not isinstance(message, Mapping):
            return message
        return message.get("role"), message.get("content"), message.get("tool_calls") or None

    begin = messages[: len(prompt)]
    return 0 < len(prompt) < len(messages) and [*map(said, begin)] == [*map(said, prompt)]


def _plain_message(message: Mapping[str, Any], place: str, *, row: Row) -> Mapping[str, Any]:
    """The message itself, or a copy with what has to change."""
    calls = message.get("tool_calls") or message.get("function_call")
    if not calls and message.get("role") in ROLES and isinstance(message.get("content"), str):
        return message  # most are so, and there may be millions
    changes: dict[str, Any] = {}
    if isinstance(message.get("role"), str):
        role = _read_role(message["role"], place, row=row)
        if role != message["role"]:
            changes["role"] = role
    content = message.get("content")
    if content is None:
        changes["content"] = ""
    elif isinstance(content, list) and (text := _text_of_parts(content)) is not None:
        changes["content"] = text
    calls = message.get("tool_calls")
    if not calls and isinstance(message.get("function_call"), Mapping):
        calls = [{"type": "function", "function": message["function_call"]}]
        changes["function_call"] = None  # keys that are None count as absent
    if isinstance(calls, list):
        parsed = [_parsed_call(call, f"{place}.tool_calls[{at}]") for at, call in enumerate(calls)]
        if parsed != message.get("tool_calls"):
            changes["tool_calls"] = parsed
    return {**message, **changes} if changes else message


def _read_role(role: str, place: str, *, row: Row) -> str:
    """The role that templates know under another name or in other letters; or the same one."""
    name = role.strip().lower()
    if name in ROLES:
        return name
    if name in _ALIASES:
        return _ALIASES[name]
    near = difflib.get_close_matches(name, ROLES, n=1, cutoff=0.7)
    if near:  # the turn would not be learned, or be learned as somebody else's
        raise RowError(
            f"{place} has the role {role!r}: did you mean {near[0]!r}? (roles of this row: "
            f"{', '.join(count_roles([row]))})"
        )
    return role


def count_roles(rows: Iterable[Row]) -> dict[str, int]:
    """How many turns of each role rows have.

    Args:
        rows: The rows.

    Returns:
        The numbers by role, in the order in which roles appear.
    """
    roles: dict[str, int] = {}
    for row in rows:
        for column in MESSAGE_COLUMNS:
            if column in row.values:
                for turn in turns_of(row, column):
                    role = str(turn.get("role"))
                    roles[role] = roles.get(role, 0) + 1
    return roles


def turns_of(row: Row, column: str) -> list[Mapping[str, Any]]:
    """The messages of a column.

    Args:
        row: Any row.
        column: The name of a column.

    Returns:
        Its messages; empty if it holds none.
    """
    messages = row.values.get(column)
    if not isinstance(messages, list):
        return []
    return [message for message in messages if isinstance(message, Mapping)]


def _text_of_parts(parts: list[Any]) -> str | None:
    """The text of a content in parts, or None if a part is no text."""
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else part
        is_text = not isinstance(part, Mapping) or part.get("type") in _TEXT_PARTS
        if not isinstance(text, str) or not is_text:
            return None
        texts.append(text)
    return "".join(texts)


def _parsed_call(call: Any, place: str) -> Any:
    """A call of a tool whose arguments are an object."""
    if not isinstance(call, Mapping):
        return call
    function = call.get("function")
    if isinstance(function, Mapping):
        return {**call, "function": _with_parsed_arguments(function, f"{place}.function")}
    return _with_parsed_arguments(call, place)


def _with_parsed_arguments(function: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return function
    try:
        parsed = json.loads(arguments) if arguments.strip() else {}
    except ValueError as error:
        raise RowError(f"{place}.arguments is text that is not JSON: {error}") from None
    return {**function, "arguments": parsed} if isinstance(parsed, dict | list) else function


def with_text_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Messages with the arguments of their calls as JSON again, which few templates insist on.

    Args:
        messages: Of one conversation.

    Returns:
        A copy; None where no call has arguments that are an object.
    """
    found = False

    def text(call: Any) -> Any:
        nonlocal found
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), Mapping):
            return call
        found = True
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        return {**call, "function": {**function, "arguments": arguments}}

    copies = [
        {**message, "tool_calls": [text(call) for call in message["tool_calls"]]}
        if isinstance(message.get("tool_calls"), list)
        else message
        for message in messages
    ]
    return copies if found else None


def is_empty_turn(message: Any) -> bool:
    """Whether a message says nothing: no content and no call of a tool.

    Args:
        message: One message.

    Returns:
        Whether it does not.
    """
    if not isinstance(message, Mapping):
        return False
    said = ("content", "tool_calls", "function_call", "reasoning_content", "thinking")
    return not any(message.get(name) for name in said)
