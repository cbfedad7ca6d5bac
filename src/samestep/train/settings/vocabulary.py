"""Settings of tokens that a tokenizer and a model get beside those that they have."""

from collections import Counter

from pydantic import BaseModel, ConfigDict

from samestep.train.settings.adapters import Names


class VocabularyFields(BaseModel):
    """Which tokens are added."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    add_tokens: Names = ()
    """Tokens that the tokenizer and the embeddings get beside those they have; they train."""
    add_special_tokens: Names = ()
    """The same for special tokens, which are left out where text is decoded for people."""


def vocabulary_problems(settings: VocabularyFields) -> list[str]:
    """Tokens that are none, a line each.

    Args:
        settings: Each field right by itself.
    """
    tokens = (*settings.add_tokens, *settings.add_special_tokens)
    empty = ["add_tokens: a token is empty"] if not all(token.strip() for token in tokens) else []
    twice = [repr(token) for token, number in Counter(tokens).items() if number > 1]
    return empty + ([f"add_tokens: {', '.join(twice)} more than once"] if twice else [])
