"""The converters of formats that other tools write: ShareGPT, Alpaca, HH, OpenAI's preferences."""

import json
import re
from collections.abc import Mapping
from typing import Any

from samestep.data.rows import RowError

_HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?")

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)


def from_sharegpt(columns: dict[str, Any]) -> dict[str, Any]:
    """ShareGPT's conversations to messages.

    Args:
        columns: ``conversations``, a list of turns with ``from`` and ``value`` (or ``role`` and
            ``content``); ``system``, text, and ``tools``, or none.

    Returns:
        ``messages`` and ``tools``.

    Raises:
        RowError: The turns are no such turns.
    """
    turns = columns["conversations"]
    if not isinstance(turns, list) or not turns:
        raise RowError("conversations must be a list of turns, at least one")
    messages = [_sharegpt_turn(turn, f"conversations[{at}]") for at, turn in enumerate(turns)]
    system = columns.get("system")
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return {"messages": messages, "tools": columns.get("tools")}


def _sharegpt_turn(turn: Any, place: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise RowError(f"{place} must be an object, found {type(turn).__name__}")
    role = turn.get("from") or turn.get("role")
    content = turn.get("value") if turn.get("value") is not None else turn.get("content")
    if not isinstance(role, str):
        raise RowError(f"{place} has no from; its keys: {', '.join(turn) or 'none'}")
    others = {k: v for k, v in turn.items() if k not in ("from", "value", "role", "content")}
    if role == "function_call":
        return {**others, "role": "assistant", "content": "", "tool_calls": _calls(content, place)}
    return {**others, "role": role, "content": content}


def _calls(text: Any, place: str) -> list[dict[str, Any]]:
    """The calls of tools that a turn "function_call" holds as JSON."""
    try:
        value = json.loads(text) if isinstance(text, str) else text
    except ValueError as error:
        raise RowError(f"{place} is a function_call whose value is not JSON: {error}") from None
    calls = value if isinstance(value, list) else [value]
    if not all(isinstance(call, Mapping) and "name" in call for call in calls):
        raise RowError(f"{place} is a function_call without a name")
    return [{"type": "function", "function": dict(call)} for call in calls]


def from_alpaca(columns: dict[str, Any]) -> dict[str, Any]:
    """Alpaca's instruction, input and output to prompt and completion, in Alpaca's own words.

    Args:
        columns: ``instruction`` and ``output``, text; ``input``, text or none.

    Returns:
        ``prompt`` and ``completion``, text.

    Raises:
        RowError: They are no text.
    """
    wrong = [
        f"{name} must be text, found {type(columns[name]).__name__}"
        for name in ("instruction", "input", "output")
        if not isinstance(columns.get(name), str | None)
    ]
    if wrong:
        raise RowError("; ".join(wrong))
    form = _WITH_INPUT if columns.get("input") else _WITHOUT_INPUT
    # One replacement after another would also replace what a text holds.
    values = {name: columns.get(name) for name in ("instruction", "input")}
    return {"prompt": form.format_map(values), "completion": columns["output"]}


def is_hh(columns: Mapping[str, Any]) -> bool:
    """Whether ``chosen`` and ``rejected`` are dialogues of HH: text of Human: and Assistant:.

    Args:
        columns: With both.

    Returns:
        Whether they are.
    """
    sides = (columns["chosen"], columns["rejected"])
    return columns.get("prompt") is None and all(
        isinstance(side, str) and re.match(r"\s*Human: ?", side) and "\n\nAssistant:" in side
        for side in sides
    )


def from_hh(columns: dict[str, Any]) -> dict[str, Any]:
    """HH's dialogues as text to messages.

    Args:
        columns: ``chosen`` and ``rejected``, as `is_hh` recognises them.

    Returns:
        The columns, both as messages.

    Raises:
        RowError: A dialogue does not end with the assistant.
    """
    sides = {name: _hh_messages(columns[name], name) for name in ("chosen", "rejected")}
    return {**columns, **sides}


def _hh_messages(dialogue: str, name: str) -> list[dict[str, str]]:
    _, *pieces = _HH_TURN.split(dialogue.lstrip())
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [
        {"role": roles[who], "content": text.strip()}
        for who, text in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    if turns[-1]["role"] != "assistant":
        raise RowError(f"{name} ends with Human: the last turn must be the assistant's")
    return turns


def from_openai_preference(columns: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's form of preferences to prompt, chosen and rejected.

    Args:
        columns: ``input`` with messages and tools, ``preferred_output`` and
            ``non_preferred_output``, each a list of messages.

    Returns:
        ``prompt``, ``chosen``, ``rejected`` and ``tools``.

    Raises:
        RowError: They are not of this form.
    """
    given = columns["input"]
    if not isinstance(given, Mapping) or not isinstance(given.get("messages"), list):
        raise RowError("input must be an object with a list of messages")
    sides = {
        "chosen": columns["preferred_output"],
        "rejected": columns["non_preferred_output"],
    }
    if not all(isinstance(side, list) for side in sides.values()):
        raise RowError("preferred_output and non_preferred_output must be lists of messages")
    return {"prompt": given["messages"], "tools": given.get("tools"), **sides}
