"""Conversations to text, with the assistant's turns marked.

A template with ``{% generation %}`` tags says itself which part the assistant wrote. For all
others the turns are found by rendering the conversation up to each turn, which is exact as long as
the template only ever appends; one that rewrites earlier turns is refused.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from samestep.data.encode import (
    Mask,
    TextWithTargets,
    TokenizedText,
    encode,
    mask_from_borders,
    mask_from_offsets,
    masked,
)
from samestep.data.row_formats import message_weight, messages_of, tools_of
from samestep.data.rows import Row, RowError
from samestep.errors import ConfigError

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

Messages = list[dict[str, Any]]

Render = Callable[[Messages, bool], str]
"""Messages to text; the flag asks for the header of an assistant turn at the end."""


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


def encode_conversations(
    rows: Sequence[Row], tokenizer: Any, *, everything: bool
) -> list[TokenizedText | RowError]:
    """Render and tokenise conversations, and mark the assistant's turns.

    Args:
        rows: Rows with ``messages``, or with ``prompt`` and ``completion`` as messages; of the
            latter only turns of the completion are targets.
        tokenizer: With a chat template.
        everything: Mark every token instead.

    Returns:
        For each row its tokens, or why it cannot be used.

    Raises:
        ConfigError: The tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            "the tokenizer has no chat template, which rows of messages need: set tokenizer to "
            "one that has it (that of an instruct model), or give prompt and completion as text"
        )
    read = [_conversation(row) for row in rows]
    usable = [one for one in read if isinstance(one, Conversation)]
    found = iter(_encode(usable, tokenizer, everything))
    return [next(found) if isinstance(one, Conversation) else one for one in read]


def _conversation(row: Row) -> Conversation | RowError:
    try:
        tools = tools_of(row.values)
        if row.values.get("messages") is not None:
            return Conversation(messages_of(row.values, "messages"), 0, tools)
        prompt = messages_of(row.values, "prompt")
        completion = messages_of(row.values, "completion")
    except RowError as error:
        return error
    return Conversation(prompt + completion, len(prompt), tools)


def _encode(
    conversations: Sequence[Conversation], tokenizer: Any, everything: bool
) -> list[TokenizedText | RowError]:
    results: list[TokenizedText | RowError] = []
    for tagged, group in _groups(conversations, tokenizer, everything):
        if tagged:
            results.extend(_encode_tagged(group, tokenizer))
        else:
            results.extend(_encode_marked(group, tokenizer, everything))
    return results


def _groups(
    conversations: Sequence[Conversation], tokenizer: Any, everything: bool
) -> Iterator[tuple[bool, list[Conversation]]]:
    """Runs of conversations with the same tools, and whether their template has tags."""
    by_tools = itertools.groupby(conversations, key=lambda one: json.dumps(one.tools, default=repr))
    for _, run in by_tools:
        group = list(run)
        try:
            template = tokenizer.get_chat_template(None, group[0].tools)
        except ValueError as error:  # several templates, none of them for this use
            raise ConfigError(f"the tokenizer's chat template: {error}") from error
        # Masks from tags need offsets; so a slow tokenizer goes the other way.
        tags = tokenizer.is_fast and _GENERATION.search(template) is not None
        yield tags and not everything, group


def _encode_tagged(group: list[Conversation], tokenizer: Any) -> list[TokenizedText | RowError]:
    try:
        return list(_masked_by_template(group, tokenizer))
    except Exception as error:  # a template is a program: it may raise anything
        if len(group) == 1:
            return [error if isinstance(error, RowError) else _template_failed(error)]
    # Once more one by one, to learn which of them failed.
    return [result for one in group for result in _encode_tagged([one], tokenizer)]


def _masked_by_template(group: list[Conversation], tokenizer: Any) -> Iterator[TokenizedText]:
    encoded = tokenizer.apply_chat_template(
        [one.messages for one in group],
        tools=group[0].tools,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True, "verbose": False},
    )
    for at, one in enumerate(group):
        ids = np.asarray(encoded["input_ids"][at], dtype=np.int64)
        mask = np.asarray(encoded["assistant_masks"][at], dtype=np.bool_)
        if any(message["role"] == "assistant" for message in one.messages[: one.prompt]):
            render = renderer(tokenizer, one.tools)
            whole, prompt = render(one.messages, False), render(one.messages[: one.prompt], False)
            _check_prefix(prompt, whole, "the prompt")
            completion = [(len(prompt), len(whole))]
            offsets = encoded["offset_mapping"][at]
            mask &= mask_from_offsets(offsets, completion, text_length=len(whole))
        yield masked(ids, *_turns_of_tags(mask, one))


def _turns_of_tags(mask: Mask, one: Conversation) -> tuple[list[Mask], list[float] | None]:
    """The mask of each turn that a template's tags mark, and the turns' weights."""
    turns = [message for message in one.messages[one.prompt :] if message["role"] == "assistant"]
    weights = _weights(turns)
    if weights is None:
        return [mask], None
    borders = np.flatnonzero(np.diff(mask, prepend=False, append=False)).reshape(-1, 2)
    if len(borders) != len(turns):
        raise RowError(
            f"its messages have weights, but the template marks {len(borders)} stretches for "
            f"{len(turns)} assistant messages, so it cannot be told which is whose"
        )
    return [mask_from_borders(len(mask), [(start, end)]) for start, end in borders], weights


def _weights(turns: Sequence[dict[str, Any]]) -> list[float] | None:
    """The weight of each message, or None if no message has one."""
    return [message_weight(turn) for turn in turns] if any("weight" in t for t in turns) else None


def _encode_marked(
    group: list[Conversation], tokenizer: Any, everything: bool
) -> list[TokenizedText | RowError]:
    marked: list[TextWithTargets | RowError] = []
    for one in group:
        render = renderer(tokenizer, one.tools)
        try:
            if everything:
                if _weights(one.messages) is not None:
                    raise RowError("a message has a weight, which train_on: all would ignore")
                marked.append(TextWithTargets(render(one.messages, False), None))
            else:
                endings = (*tokenizer.all_special_tokens, tokenizer.eos_token)
                marked.append(mark_turns(one.messages, render, first=one.prompt, endings=endings))
        except RowError as error:
            marked.append(error)
    texts = [one for one in marked if isinstance(one, TextWithTargets)]
    # The template writes the special tokens itself.
    found = iter(encode(texts, tokenizer, special_tokens=False))
    return [next(found) if isinstance(one, TextWithTargets) else one for one in marked]


def renderer(tokenizer: Any, tools: list[Any] | None) -> Render:
    """How a chat template renders messages.

    Args:
        tokenizer: A tokenizer or a processor with a chat template.
        tools: For the template, or None.

    Returns:
        A function of messages; it raises a `RowError` if the template fails.
    """

    def render(messages: Messages, header: bool) -> str:
        try:
            text: str = tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=header
            )
        except Exception as error:  # a template is a program: it may raise anything
            raise _template_failed(error) from error
        return text

    return render


def mark_turns(
    messages: Messages, render: Render, *, first: int = 0, endings: Sequence[str | None] = ()
) -> TextWithTargets:
    """Mark the assistant's turns, each up to its end-of-turn token, by rendering up to them.

    Args:
        messages: The conversation.
        render: Renders messages.
        first: The message from which on turns are targets.
        endings: Special tokens that may end a turn; white space behind one is the template's, not
            the assistant's, and no target.

    Returns:
        The whole rendering; it may have no span. Its weights are those of the messages.

    Raises:
        RowError: The template rewrites earlier turns when later ones follow.
    """
    whole = render(messages, False)
    spans, turns = [], []
    for at, message in enumerate(messages):
        if message["role"] != "assistant" or at < first:
            continue
        done = render(messages[: at + 1], False)
        prefix = render(messages[:at], True) if at else _first_header(messages, done, render)
        _check_prefix(prefix, done, f"what comes before message {at}")
        _check_prefix(done, whole, f"the conversation up to message {at}")
        bare = done.rstrip()
        ended = any(ending and bare.endswith(ending) for ending in endings)
        spans.append((len(prefix), max(len(prefix), len(bare if ended else done))))
        turns.append(message)
    weights = _weights(turns)
    return TextWithTargets(whole, tuple(spans), None if weights is None else tuple(weights))


def _first_header(messages: Messages, done: str, render: Render) -> str:
    """What comes before a turn that opens the conversation (nothing can be rendered before it)."""
    header = render(messages[:1], True).removeprefix(render(messages[:1], False))
    before, found, _ = done.partition(header)
    if not header or not found:
        raise RowError(
            "it opens with an assistant message, whose start this chat template does not show: "
            "put a user or system message first"
        )
    return before + header


def _check_prefix(part: str, whole: str, what: str) -> None:
    if not whole.startswith(part):
        raise RowError(
            f"the chat template renders {what} differently when more follows, so that targets "
            "cannot be told: add {% generation %} tags to the template around assistant turns"
        )


def _template_failed(error: Exception) -> RowError:
    reason = str(error) or type(error).__name__
    return RowError(f"the chat template cannot take this conversation: {reason.splitlines()[0]}")
