"""From spans of characters to a mask of tokens. Pure functions; no pad id is ever looked at."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

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
