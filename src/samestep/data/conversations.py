"""Conversations to text, with the assistant's turns marked.

A template with ``{% generation %}`` tags says itself which part the assistant wrote. For all
others the turns are found by rendering the conversation up to each turn, which is exact as long as
the template only ever appends; one that rewrites earlier turns is refused.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from samestep.data.message_forms import with_text_arguments
from samestep.data.messages import Conversation, Messages, message_weights, read_conversation
from samestep.data.rows import Row, RowError, map_valid, result_or_error
from samestep.data.target_spans import (
    TextWithTargets,
    TokenizedText,
    TokenMask,
    mask_from_offsets,
    mask_from_token_spans,
    merge_masks,
    tokenize_texts,
)
from samestep.errors import ConfigError

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

Render = Callable[[Messages, bool], str]
"""Messages to text; the flag asks for the header of an assistant turn at the end."""


def tokenize_conversations(
    rows: Sequence[Row], tokenizer: Any, *, train_on_all: bool
) -> list[TokenizedText | RowError]:
    """Render and tokenise conversations, and mark the assistant's turns.

    Args:
        rows: As for `samestep.data.messages.read_conversation`.
        tokenizer: With a chat template.
        train_on_all: Mark every token instead.

    Returns:
        For each row its tokens, or why it cannot be used.

    Raises:
        ConfigError: The tokenizer has no chat template.
    """
    check_chat_template(tokenizer)
    conversations = [result_or_error(read_conversation, row.values) for row in rows]
    return map_valid(
        conversations, lambda valid: _tokenize_valid(valid, tokenizer, train_on_all=train_on_all)
    )


def check_chat_template(tokenizer: Any) -> None:
    """Refuse rows of messages without a template that renders them.

    Args:
        tokenizer: A tokenizer of transformers.

    Raises:
        ConfigError: It has no chat template.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            "the tokenizer has no chat template, which rows of messages need: set tokenizer to "
            "one that has it (that of an instruct model), or give prompt and completion as text"
        )


def _tokenize_valid(
    conversations: Sequence[Conversation], tokenizer: Any, *, train_on_all: bool
) -> list[TokenizedText | RowError]:
    results: list[TokenizedText | RowError] = []
    for has_tags, run in _runs(conversations, tokenizer):
        if has_tags and not train_on_all:
            results.extend(_tokenize_by_tags(run, tokenizer))
        else:
            results.extend(_tokenize_by_rendering(run, tokenizer, train_on_all=train_on_all))
    return results


def _runs(
    conversations: Sequence[Conversation], tokenizer: Any
) -> Iterator[tuple[bool, list[Conversation]]]:
    """Runs of conversations with the same tools, and whether masks come from their template."""
    by_tools = itertools.groupby(
        conversations, key=lambda conversation: json.dumps(conversation.tools, default=repr)
    )
    for _, run in by_tools:
        same_tools = list(run)
        try:
            template = tokenizer.get_chat_template(None, same_tools[0].tools)
        except ValueError as error:  # several templates, none of them for this use
            raise ConfigError(f"the tokenizer's chat template: {error}") from error
        # Masks from tags need offsets; so a slow tokenizer goes the other way.
        yield tokenizer.is_fast and _GENERATION.search(template) is not None, same_tools


def _tokenize_by_tags(
    conversations: list[Conversation], tokenizer: Any
) -> list[TokenizedText | RowError]:
    try:
        return list(_masked_by_tags(conversations, tokenizer))
    except Exception as error:  # a template is a program: it may raise anything
        if len(conversations) == 1:
            as_text = with_text_arguments(conversations[0].messages)
            if as_text is not None and not isinstance(error, RowError):
                return _tokenize_by_tags([replace(conversations[0], messages=as_text)], tokenizer)
            return [error if isinstance(error, RowError) else _template_failed(error)]
    # Again each by itself, to learn which of them failed.
    return [
        result
        for conversation in conversations
        for result in _tokenize_by_tags([conversation], tokenizer)
    ]


def _masked_by_tags(conversations: list[Conversation], tokenizer: Any) -> Iterator[TokenizedText]:
    encoded = tokenizer.apply_chat_template(
        [conversation.messages for conversation in conversations],
        tools=conversations[0].tools,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True, "verbose": False},
    )
    for at, conversation in enumerate(conversations):
        ids = np.asarray(encoded["input_ids"][at], dtype=np.int64)
        mask = np.asarray(encoded["assistant_masks"][at], dtype=np.bool_)
        prompt = conversation.messages[: conversation.prompt]
        if any(message["role"] == "assistant" for message in prompt):
            render = renderer(tokenizer, conversation.tools)
            text, prefix = render(conversation.messages, False), render(prompt, False)
            _check_prefix(prefix, text, what="the prompt")
            completion = [(len(prefix), len(text))]
            offsets = encoded["offset_mapping"][at]
            mask &= mask_from_offsets(offsets, completion, text_length=len(text))
        masks, weights = _masks_of_turns(mask, conversation)
        yield merge_masks(ids, masks, weights=weights)


def _masks_of_turns(
    mask: TokenMask, conversation: Conversation
) -> tuple[list[TokenMask], list[float] | None]:
    """The mask of each turn that a template's tags mark, and the turns' weights."""
    answers = [
        message
        for message in conversation.messages[conversation.prompt :]
        if message["role"] == "assistant"
    ]
    weights = message_weights(answers)
    if weights is None:
        return [mask], None
    borders = np.flatnonzero(np.diff(mask, prepend=False, append=False)).reshape(-1, 2)
    if len(borders) != len(answers):
        raise RowError(
            f"its messages have weights, but the template marks {len(borders)} stretches for "
            f"{len(answers)} assistant messages, so it cannot be told which is whose"
        )
    return [mask_from_token_spans(len(mask), [(start, end)]) for start, end in borders], weights


def _tokenize_by_rendering(
    conversations: list[Conversation], tokenizer: Any, *, train_on_all: bool
) -> list[TokenizedText | RowError]:
    endings = (*tokenizer.all_special_tokens, tokenizer.eos_token)
    texts = [
        result_or_error(
            render_targets,
            conversation,
            renderer(tokenizer, conversation.tools),
            train_on_all=train_on_all,
            endings=endings,
        )
        for conversation in conversations
    ]
    # The template writes the special tokens itself.
    return map_valid(texts, lambda valid: tokenize_texts(valid, tokenizer, special_tokens=False))


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
            as_text = with_text_arguments(messages)
            if as_text is None:
                raise _template_failed(error) from error
            return render(as_text, header)
        return text

    return render


def render_targets(
    conversation: Conversation,
    render: Render,
    *,
    train_on_all: bool,
    endings: Sequence[str | None] = (),
) -> TextWithTargets:
    """Render a conversation, and mark the assistant's turns, each up to its end-of-turn token.

    Args:
        conversation: The conversation; turns of its prompt are no targets.
        render: Renders messages.
        train_on_all: Mark everything instead.
        endings: Special tokens that may end a turn; white space behind one is the template's, not
            the assistant's, and no target.

    Returns:
        The text; it may have no span. Its weights are those of the messages.

    Raises:
        RowError: The template rewrites earlier turns when later ones follow, or messages have
            weights that would be ignored.
    """
    messages = conversation.messages
    if train_on_all:
        if message_weights(messages) is not None:
            raise RowError("a message has a weight, which train_on: all would ignore")
        return TextWithTargets(render(messages, False), None)
    text = render(messages, False)
    spans, answers = [], []
    for at, message in enumerate(messages):
        if message["role"] != "assistant" or at < conversation.prompt:
            continue
        done = render(messages[: at + 1], False)
        prefix = render(messages[:at], True) if at else _first_header(messages, done, render=render)
        _check_prefix(prefix, done, what=f"what comes before message {at}")
        _check_prefix(done, text, what=f"the conversation up to message {at}")
        bare = done.rstrip()
        ended = any(ending and bare.endswith(ending) for ending in endings)
        spans.append((len(prefix), max(len(prefix), len(bare if ended else done))))
        answers.append(message)
    weights = message_weights(answers)
    return TextWithTargets(text, tuple(spans), None if weights is None else tuple(weights))


def _first_header(messages: Messages, done: str, *, render: Render) -> str:
    """What comes before a turn that opens the conversation (nothing can be rendered before it)."""
    header = render(messages[:1], True).removeprefix(render(messages[:1], False))
    before, separator, _ = done.partition(header) if header else (done, "", "")
    if not separator:
        raise RowError(
            "it opens with an assistant message, whose start this chat template does not show: "
            "put a user or system message first"
        )
    return before + header


def _check_prefix(prefix: str, text: str, *, what: str) -> None:
    if not text.startswith(prefix):
        raise RowError(
            f"the chat template renders {what} differently when more follows, so that targets "
            "cannot be told: add {% generation %} tags to the template around assistant turns"
        )


def _template_failed(error: Exception) -> RowError:
    reason = str(error) or type(error).__name__
    return RowError(f"the chat template cannot take this conversation: {reason.splitlines()[0]}")
