"""Texts whose targets are spans of characters: to tokens, and which of them are targets.

Pure functions, but for the calls of the tokenizer; no pad id is ever looked at.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samestep.data.rows import RowError, map_valid, result_or_error

Span = tuple[int, int]
"""Start and end (exclusive), in characters or in tokens."""

TokenMask = NDArray[np.bool_]
"""Whether each token is a target [length]."""

TokenWeights = NDArray[np.float32]
"""How much each token counts as a target [length]; 0 where it is none."""


@dataclass(frozen=True, slots=True)
class TextWithTargets:
    """A text and which of its characters are targets.

    Attributes:
        text: All of the text.
        spans: The target characters; None: everything, with whatever the tokenizer adds.
        weights: The weight of each span's tokens; None: 1.
    """

    text: str
    spans: tuple[Span, ...] | None
    weights: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedText:
    """Tokens and which of them are targets, before truncation.

    Attributes:
        ids: [length], int64.
        mask: [length], bool.
        weights: The weight of each token as a target [length], float32; None: 1.
    """

    ids: NDArray[np.int64]
    mask: TokenMask
    weights: TokenWeights | None = None

    def with_eos(self, eos_id: int | None) -> "TokenizedText":
        """The tokens closed by an end-of-sequence token, as a target, if they are not yet.

        Args:
            eos_id: The token; None: leave the tokens as they are.

        Returns:
            The tokens.
        """
        if eos_id is None or (len(self.ids) and self.ids[-1] == eos_id):
            return self
        weights = None if self.weights is None else np.append(self.weights, np.float32(1))
        return TokenizedText(np.append(self.ids, eos_id), np.append(self.mask, True), weights)


def tokenize_texts(
    texts: Sequence[TextWithTargets], tokenizer: Any, *, special_tokens: bool
) -> list[TokenizedText | RowError]:
    """Tokenise texts in one call and mark their targets.

    Args:
        texts: The texts.
        tokenizer: A tokenizer of transformers, fast or not.
        special_tokens: Whether the tokenizer adds those that it adds to a text (such as BOS).

    Returns:
        For each text its tokens, or why it cannot be used.
    """
    valid = [result_or_error(_check_characters, text) for text in texts]
    return map_valid(
        valid, lambda readable: _tokenize_valid(readable, tokenizer, special_tokens=special_tokens)
    )


def _check_characters(text: TextWithTargets) -> TextWithTargets:
    # JSON can hold half of a surrogate pair; tokenizers crash on it without naming the text.
    try:
        text.text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            f"character {error.start} is half of a surrogate pair, which is no text"
        ) from None
    return text


def _tokenize_valid(
    texts: Sequence[TextWithTargets], tokenizer: Any, *, special_tokens: bool
) -> list[TokenizedText | RowError]:
    if not texts:
        return []
    encoded = _call_tokenizer(
        tokenizer, [text.text for text in texts], special_tokens=special_tokens
    )

    def tokenized(at: int, text: TextWithTargets) -> TokenizedText:
        ids = np.asarray(encoded["input_ids"][at], dtype=np.int64)
        if text.spans is None:
            return TokenizedText(ids, np.ones(len(ids), dtype=np.bool_))
        if tokenizer.is_fast:
            offsets, length = encoded["offset_mapping"][at], len(text.text)
            groups = group_spans(text.spans, text.weights)
            masks = [mask_from_offsets(offsets, group, text_length=length) for group in groups]
        else:
            spans = _token_spans(text, ids, tokenizer=tokenizer, special_tokens=special_tokens)
            groups = group_spans(spans, text.weights)
            masks = [mask_from_token_spans(len(ids), group) for group in groups]
        return merge_masks(ids, masks, weights=text.weights)

    return [result_or_error(tokenized, at, text) for at, text in enumerate(texts)]


def mask_from_offsets(
    offsets: Sequence[Span], spans: Sequence[Span], *, text_length: int
) -> TokenMask:
    """Mark every token that covers at least one character of a span.

    A token that lies across the start of a span is therefore a target: the model must learn
    to produce the character.

    Args:
        offsets: The characters of each token, as a fast tokenizer gives them.
        spans: The target characters.
        text_length: Characters in the text. Tokens that the tokenizer added behind the text
            are targets if a span reaches its end.

    Returns:
        Mask [tokens].
    """
    starts, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    # Byte-level tokenizers trim spaces off offsets, so that a token of spaces is empty: it then
    # starts where the token before it ends.
    previous = np.concatenate([[0], np.maximum.accumulate(ends)[:-1]]) if len(ends) else ends
    starts = np.where(starts == ends, np.minimum(starts, previous), starts)
    mask: TokenMask = np.zeros(len(ends), dtype=np.bool_)
    for start, end in spans:
        mask |= (starts < end) & (ends > start)
    in_text = np.flatnonzero(ends > 0)
    behind = in_text[-1] + 1 if len(in_text) else 0
    mask[behind:] = any(end >= text_length for _, end in spans)
    return mask


def mask_from_token_spans(length: int, spans: Sequence[Span]) -> TokenMask:
    """Mark the tokens of spans.

    Args:
        length: Number of tokens.
        spans: Start and end (exclusive) in tokens.

    Returns:
        Mask [length].
    """
    mask: TokenMask = np.zeros(length, dtype=np.bool_)
    for start, end in spans:
        mask[start:end] = True
    return mask


def group_spans(spans: Sequence[Span], weights: Sequence[float] | None) -> list[Sequence[Span]]:
    """The spans that share a mask.

    Args:
        spans: In order.
        weights: Of the spans, or None.

    Returns:
        All spans in one group; each in its own where they have weights.
    """
    return [spans] if weights is None else [[span] for span in spans]


def merge_masks(
    ids: NDArray[np.int64], masks: Sequence[TokenMask], *, weights: Sequence[float] | None
) -> TokenizedText:
    """Tokens with the targets of several masks.

    Args:
        ids: [length].
        masks: One [length] for each group of `group_spans`.
        weights: Of each mask's tokens; None: there is one mask, whose tokens all count alike.

    Returns:
        The tokens.
    """
    if weights is None:
        (mask,) = masks
        return TokenizedText(ids, mask)
    token_weights: TokenWeights = np.zeros(len(ids), dtype=np.float32)
    for mask, weight in zip(masks, weights, strict=True):
        token_weights[mask] = weight
    return TokenizedText(ids, token_weights > 0, token_weights)


def _call_tokenizer(tokenizer: Any, texts: list[str], *, special_tokens: bool) -> Any:
    """Tokenise texts, neither truncated nor padded, with offsets if the tokenizer has them."""
    return tokenizer(
        texts,
        add_special_tokens=special_tokens,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,
    )


def _token_spans(
    text: TextWithTargets, ids: NDArray[np.int64], *, tokenizer: Any, special_tokens: bool
) -> list[Span]:
    """Spans in tokens without offsets: the text up to each border must give the same tokens."""
    assert text.spans is not None

    def border(at: int) -> int:
        if at == 0:
            return 0
        if at >= len(text.text):
            return len(ids)
        encoded = _call_tokenizer(tokenizer, [text.text[:at]], special_tokens=special_tokens)
        before: list[int] = list(encoded["input_ids"][0])
        same_place: list[int] = ids[: len(before)].tolist()
        if before and before[-1] == tokenizer.eos_token_id != same_place[-1]:
            before.pop()  # added by the tokenizer, which took the part for all of the text
        if before != same_place[: len(before)]:
            raise RowError(
                f"the tokens of its first {at} characters change when the rest follows, and this "
                "tokenizer gives no offsets to tell where the targets start: use a fast tokenizer"
            )
        return len(before)

    return [(border(start), border(end)) for start, end in text.spans]
