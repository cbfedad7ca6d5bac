"""From spans of characters to a mask of tokens. Pure functions; no pad id is ever looked at."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samestep.data.rows import RowError

Span = tuple[int, int]
"""Start and end (exclusive) in characters."""

Mask = NDArray[np.bool_]
"""Whether each token is a target [length]."""

Weights = NDArray[np.float32]
"""How much each token counts as a target [length]; 0 where it is none."""


def mask_from_offsets(offsets: Sequence[Span], spans: Sequence[Span], *, text_length: int) -> Mask:
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
    mask: Mask = np.zeros(len(ends), dtype=np.bool_)
    for start, end in spans:
        mask |= (starts < end) & (ends > start)
    in_text = np.flatnonzero(ends > 0)
    behind = in_text[-1] + 1 if len(in_text) else 0
    mask[behind:] = any(end >= text_length for _, end in spans)
    return mask


def mask_from_borders(length: int, borders: Sequence[Span]) -> Mask:
    """Mark the tokens between borders.

    Args:
        length: Number of tokens.
        borders: Start and end (exclusive) in tokens.

    Returns:
        Mask [length].
    """
    mask: Mask = np.zeros(length, dtype=np.bool_)
    for start, end in borders:
        mask[start:end] = True
    return mask


@dataclass(frozen=True, slots=True)
class TextWithTargets:
    """A text and which of its characters are targets.

    Attributes:
        text: The whole text.
        spans: The target characters; None: everything, with whatever the tokenizer adds.
        weights: The weight of each span's tokens; None: 1.
    """

    text: str
    spans: tuple[Span, ...] | None
    weights: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedText:
    """Tokens and which of them are targets.

    Attributes:
        ids: [length], int64.
        mask: [length], bool.
        weights: The weight of each token as a target [length], float32; None: 1.
    """

    ids: NDArray[np.int64]
    mask: Mask
    weights: Weights | None = None

    def with_eos(self, eos_id: int | None) -> "TokenizedText":
        """The tokens closed by an end-of-sequence token, as a target, if they are not yet."""
        if eos_id is None or (len(self.ids) and self.ids[-1] == eos_id):
            return self
        weights = None if self.weights is None else np.append(self.weights, np.float32(1))
        return TokenizedText(np.append(self.ids, eos_id), np.append(self.mask, True), weights)


def encode(
    marked: Sequence[TextWithTargets], tokenizer: Any, *, special_tokens: bool
) -> list[TokenizedText | RowError]:
    """Tokenise texts in one call and mark their targets.

    Args:
        marked: The texts.
        tokenizer: A tokenizer of transformers, fast or not.
        special_tokens: Whether the tokenizer adds those that it adds to a text (such as BOS).

    Returns:
        For each text its tokens, or why it cannot be used.
    """
    problems = [_unreadable(one.text) for one in marked]
    readable = [one for one, problem in zip(marked, problems, strict=True) if problem is None]
    masked = iter(_encode_readable(readable, tokenizer, special_tokens))
    return [next(masked) if problem is None else problem for problem in problems]


def _unreadable(text: str) -> RowError | None:
    # JSON can hold half of a surrogate pair; tokenizers crash on it without naming the text.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return RowError(f"character {error.start} is half of a surrogate pair, which is no text")
    return None


def _encode_readable(
    marked: Sequence[TextWithTargets], tokenizer: Any, special_tokens: bool
) -> list[TokenizedText | RowError]:
    if not marked:
        return []
    encoded = call(tokenizer, [one.text for one in marked], special_tokens=special_tokens)
    results: list[TokenizedText | RowError] = []
    for at, one in enumerate(marked):
        ids = np.asarray(encoded["input_ids"][at], dtype=np.int64)
        try:
            if one.spans is None:
                results.append(TokenizedText(ids, np.ones(len(ids), dtype=np.bool_)))
                continue
            if tokenizer.is_fast:
                offsets, groups = encoded["offset_mapping"][at], by_weight(one.spans, one.weights)
                masks = [mask_from_offsets(offsets, g, text_length=len(one.text)) for g in groups]
            else:
                borders = _token_borders(one, ids, tokenizer, special_tokens)
                masks = [mask_from_borders(len(ids), g) for g in by_weight(borders, one.weights)]
            results.append(masked(ids, masks, one.weights))
        except RowError as error:
            results.append(error)
    return results


def by_weight(spans: Sequence[Span], weights: Sequence[float] | None) -> list[Sequence[Span]]:
    """The spans that share a mask: all of them, or each its own where they have weights."""
    return [spans] if weights is None else [[span] for span in spans]


def masked(
    ids: NDArray[np.int64], masks: Sequence[Mask], weights: Sequence[float] | None
) -> TokenizedText:
    """Tokens with their targets: the masks of `by_weight`, and the weight of each."""
    if weights is None:
        (mask,) = masks
        return TokenizedText(ids, mask)
    of_tokens: Weights = np.zeros(len(ids), dtype=np.float32)
    for one, weight in zip(masks, weights, strict=True):
        of_tokens[one] = weight
    return TokenizedText(ids, of_tokens > 0, of_tokens)


def call(tokenizer: Any, texts: list[str], *, special_tokens: bool) -> Any:
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


def _token_borders(
    marked: TextWithTargets, ids: NDArray[np.int64], tokenizer: Any, special_tokens: bool
) -> list[Span]:
    """Spans in tokens without offsets: the text up to each border must give the same tokens."""
    assert marked.spans is not None

    def border(at: int) -> int:
        if at == 0:
            return 0
        if at >= len(marked.text):
            return len(ids)
        before = call(tokenizer, [marked.text[:at]], special_tokens=special_tokens)
        start: list[int] = list(before["input_ids"][0])
        together: list[int] = ids[: len(start)].tolist()
        if start and start[-1] == tokenizer.eos_token_id != together[-1]:
            start.pop()  # added by the tokenizer, which took the part for the whole
        if start != together[: len(start)]:
            raise RowError(
                f"the tokens of its first {at} characters change when the rest follows, and this "
                "tokenizer gives no offsets to tell where the targets start: use a fast tokenizer"
            )
        return len(start)

    return [(border(start), border(end)) for start, end in marked.spans]
