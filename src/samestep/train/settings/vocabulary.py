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
    given = {name: getattr(settings, name) for name in VocabularyFields.model_fields}
    empty = [
        f"{name}: a token is empty"
        for name, tokens in given.items()
        if not all(token.strip() for token in tokens)
    ]
    counts = Counter(token for tokens in given.values() for token in tokens)
    twice = [repr(token) for token, number in counts.items() if number > 1]
    names = " and ".join(name for name, tokens in given.items() if tokens)
    return empty + ([f"{names}: {', '.join(twice)} more than once"] if twice else [])
