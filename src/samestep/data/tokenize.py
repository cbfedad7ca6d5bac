"""Rows to examples: tokens, and which of them are targets."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from samestep.data.cache import cache_key, read_cache, write_cache
from samestep.data.conversations import encode_conversations
from samestep.data.encode import TextWithTargets, TokenizedText, encode
from samestep.data.examples import Example, Examples
from samestep.data.row_formats import COLUMNS, RowFormat, common_format, token_weights_of, tokens_of
from samestep.data.rows import Row, RowError, raise_all, weight_of
from samestep.engine.targets import IGNORE
from samestep.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 1_000
"""Rows a call of the tokenizer, which works on them in parallel."""


def tokenize_rows(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None = None,
    append_eos: bool = True,
    train_on: Literal["completion", "all"] = "completion",
    cache: Path | None = None,
    weigh_tokens: bool = False,
) -> Examples:
    """Tokenise rows and mark their targets.

    The form of the rows is told from their columns: ``input_ids`` (and ``labels``); ``messages``
    (and ``tools``), where the assistant's turns are targets; ``prompt`` and ``completion``, both
    text or both messages, where the completion is; ``text``, where everything is. Of several, the
    first counts. Each may add ``weight``, a number above 0. Given ids may add ``token_weights``,
    and a message of the assistant a ``weight``: how much their tokens count as targets, 0 for not
    at all. The pad token plays no part.

    Args:
        rows: At least one; all of the same form.
        tokenizer: A tokenizer of transformers, with a chat template if rows are conversations.
        max_length: Keep the first so many tokens of a row; at least 2.
        append_eos: Close text, and prompt and completion, with the end-of-sequence token, as a
            target. Chat templates and given ids close themselves.
        train_on: "all" makes every token a target, in any form.
        cache: A folder to keep the result in, for fast tokenizers.
        weigh_tokens: Whether what the examples are for honours weights of tokens.

    Returns:
        An example for every row that has a target; ``dropped`` counts the others by reason.

    Raises:
        DataError: Rows cannot be used (lists every one), or none has a target.
        ConfigError: The tokenizer cannot do what the rows need, or max_length is too small.
    """
    if max_length is not None and max_length < 2:
        raise ConfigError(f"max_length={max_length}: at least 2, or no token has one before it")
    if not rows:
        raise DataError("there are no rows to tokenise")
    form = common_format(rows)
    everything = train_on == "all"
    path = None
    if cache is not None and tokenizer.is_fast and form != "token ids":
        settings = {
            "form": form,
            "max_length": max_length,
            "append_eos": append_eos,
            "train_on": train_on,
        }
        columns = (*COLUMNS[form], "weight")
        key = cache_key(rows, tokenizer, columns=columns, settings=settings)
        path = cache / f"{key}.safetensors"
        if (examples := read_cache(path)) is not None:
            return examples
    dropped: Counter[str] = Counter()
    masked = _masked_rows(rows, tokenizer, form, append_eos=append_eos, everything=everything)
    if not weigh_tokens:
        masked = map(_unweighted, masked)
    examples = Examples.from_examples(_examples(rows, masked, max_length, dropped), dropped)
    if not len(examples):
        counts = "; ".join(f"{count} rows: {reason}" for reason, count in dropped.items())
        raise DataError(f"no row has a target to learn ({counts})")
    if path is not None:
        write_cache(path, examples)
    return examples


def _masked_rows(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    form: RowFormat,
    *,
    append_eos: bool,
    everything: bool,
) -> Iterator[TokenizedText | RowError]:
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        if form == "token ids":
            yield from (_given(row, everything) for row in batch)
        elif form in ("messages", "prompt and completion turns"):
            yield from encode_conversations(batch, tokenizer, everything=everything)
        else:
            marked = [_mark_text(row, form, everything) for row in batch]
            eos_id = tokenizer.eos_token_id if append_eos else None
            for one in encode(marked, tokenizer, special_tokens=True):
                yield one.with_eos(eos_id) if isinstance(one, TokenizedText) else one


def _given(row: Row, everything: bool) -> TokenizedText | RowError:
    try:
        ids, mask = tokens_of(row.values)
        weights = token_weights_of(row.values, len(ids))
    except RowError as error:
        return error
    mask = mask | everything
    return TokenizedText(ids, mask if weights is None else mask & (weights > 0), weights)


def _unweighted(one: TokenizedText | RowError) -> TokenizedText | RowError:
    if isinstance(one, TokenizedText) and one.weights is not None:
        return RowError(
            "it has weights of tokens or messages, which this objective does not honour: only "
            "causal_lm, vision_language and distillation do"
        )
    return one


def _mark_text(row: Row, form: RowFormat, everything: bool) -> TextWithTargets:
    if form == "text":
        return TextWithTargets(row.values["text"], None)
    prompt, completion = row.values["prompt"], row.values["completion"]
    text = prompt + completion
    return TextWithTargets(text, None if everything else ((len(prompt), len(text)),))


def _examples(
    rows: Sequence[Row],
    masked: Iterator[TokenizedText | RowError],
    max_length: int | None,
    dropped: Counter[str],
) -> Iterator[Example]:
    """The examples that have a target; counts the others, and raises all problems at the end."""
    problems = []
    for at, (row, one) in enumerate(zip(rows, masked, strict=True)):
        try:
            weight = weight_of(row.values)
            if isinstance(one, RowError):
                raise one
        except RowError as error:
            problems.append(f"{row.origin}: {error}")
            continue
        mask = one.mask[:max_length]
        # The first token has none before it to be predicted from.
        if mask[1:].any():
            ids = torch.from_numpy(one.ids[:max_length])
            labels = ids.where(torch.from_numpy(mask), IGNORE)
            weights = None if one.weights is None else torch.from_numpy(one.weights[:max_length])
            yield Example(ids, labels, weight, row=at, token_weights=weights)
        elif one.mask[1:].any():
            dropped[f"no target left after truncation to max_length {max_length}"] += 1
        else:
            dropped["no target"] += 1
    raise_all(problems)
