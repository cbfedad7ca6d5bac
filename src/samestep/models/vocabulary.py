"""Tokens that a tokenizer and a model get beside those that they have."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from samestep.errors import ConfigError
from samestep.models.lora import num_embeddings
from samestep.models.placement import DRAWN
from samestep.models.weightless import is_weightless

_log = logging.getLogger("samestep")


def extend_tokenizer(tokenizer: Any, tokens: Sequence[str], special: Sequence[str]) -> None:
    """Add tokens to a tokenizer; the log says which, and which it had already.

    Args:
        tokenizer: A tokenizer or a processor of transformers; changed in place.
        tokens: Ordinary ones.
        special: Those that are left out where text is decoded for people.

    Raises:
        ConfigError: There is no tokenizer.
    """
    if not tokens and not special:
        return
    if tokenizer is None:
        raise ConfigError("add_tokens: this objective has no tokenizer")
    text = getattr(tokenizer, "tokenizer", tokenizer)
    known = text.get_vocab()
    text.add_tokens(list(tokens))
    text.add_tokens(list(special), special_tokens=True)
    for token in (*tokens, *special):
        had = "which the tokenizer had already" if token in known else "new"
        _log.info("add_tokens: %r is id %d, %s", token, text.convert_tokens_to_ids(token), had)


def size_of(tokenizer: Any) -> int:
    """How many tokens a tokenizer, or that of a processor, has."""
    return len(getattr(tokenizer, "tokenizer", tokenizer))


def grow_embeddings(model: Any, after: int, *, seed: int = 0) -> None:
    """Give a model as many rows of embeddings as asked, drawn as transformers does by default.

    Rows that it has stay, also those beyond its tokenizer: new tokens take those first.

    Args:
        model: A model of transformers, without adapters; changed in place.
        after: How many rows it should have at least.
        seed: Of the new rows.
    """
    before = num_embeddings(model) if after else 0
    if after <= before:
        return
    torch.manual_seed(seed)
    # Without weights there is no mean of them to draw around.
    model.resize_token_embeddings(after, mean_resizing=not is_weightless())
    setattr(model, DRAWN, True)
    _log.info("add_tokens: the embeddings grow from %d to %d rows", before, after)


def rows_that_train(
    model: Any, tokens: Sequence[int], new: Sequence[int], *, saved: Sequence[str]
) -> dict[str, list[int]]:
    """Which rows of which modules train beside adapters, as PEFT's trainable_token_indices.

    Args:
        model: A model of transformers, without adapters.
        tokens: Tokens whose embeddings train; the head's rows too where it shares them.
        new: Tokens whose rows in the head train, too, where it has its own.
        saved: Names of modules that train entirely.

    Returns:
        Ids by the name of the module.

    Raises:
        ConfigError: New rows are shared with a module that would not train with them.
    """
    names = {module: name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    shared = [  # a module may have several names, of which PEFT would wrap one
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if getattr(module, "weight", None) is embedding.weight
        and name not in (names[embedding], names.get(head))
    ]
    if new and shared:
        raise ConfigError(
            f"add_tokens: {type(model).__name__} shares its embeddings with {', '.join(shared)}, "
            "where adapters cannot train the new rows; train all weights (without lora_rank)"
        )
    wanted: list[tuple[nn.Module, set[int]]] = [(embedding, {*tokens, *new})]
    if head is not None and head.weight is not embedding.weight:
        wanted.append((head, {*new}))
    return {
        names[module]: sorted(ids)
        for module, ids in wanted
        if ids and not any(f".{names[module]}".endswith(f".{each}") for each in saved)
    }
