"""Rows to examples: token ids, and which of them are targets."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from samestep.data.examples import Example, Examples
from samestep.data.message_forms import count_roles
from samestep.data.row_converters import convert_rows
from samestep.data.row_formats import RowFormat, common_format
from samestep.data.rows import (
    WEIGHS_NOTHING,
    Row,
    RowDropped,
    RowError,
    RowTally,
    describe_dropped,
    iter_rows,
    read_weight,
)
from samestep.data.target_spans import TokenizedText
from samestep.engine.targets import IGNORE
from samestep.errors import ConfigError, DataError
from samestep.utils.waiting import doing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn: TypeAlias = Literal["completion", "all"]
"""Targets: completions and the assistant's turns, or every token."""

_BATCH = 1_000
"""Rows a call of the tokenizer, which works on them in parallel."""


def tokenize_rows(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None = None,
    append_eos: bool = True,
    train_on: TrainOn = "completion",
    cache: Path | None = None,
    weigh_tokens: bool = False,
    drop_long: bool = False,
) -> Examples:
    """Tokenise rows and mark their targets.

    The format of the rows is recognised by their columns, see
    `samestep.data.row_formats.ROW_FORMATS`: ``input_ids`` (and ``labels``); ``messages`` (and
    ``tools``), where the assistant's turns are targets; ``prompt`` and ``completion``, both text or
    both messages, where the completion is; ``text``, where everything is. Of several, the first
    counts. Each may add ``weight``, 0 for a row that is not learned. Token ids may add
    ``token_weights``, and a message of the assistant a ``weight``: how much their tokens count as
    targets, 0 for not at all. The pad token plays no part.

    Args:
        rows: At least one; all of the same format.
        tokenizer: A tokenizer of transformers, with a chat template if rows are conversations.
        max_length: Keep the first so many tokens of a row; at least 2.
        append_eos: Close text, and prompt and completion, with the end-of-sequence token, as a
            target. Chat templates and token ids close themselves.
        train_on: "all" makes every token a target, in any format.
        cache: A folder to keep the result in, for fast tokenizers.
        weigh_tokens: Whether the objective honours weights of tokens and messages.
        drop_long: Leave rows of more than ``max_length`` tokens out, in place of cutting them.

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
    rows = convert_rows(rows)
    row_format = common_format(rows)
    path = None
    if cache is not None and tokenizer.is_fast and row_format.cached:
        settings = {  # hashed as they are: another name of a setting would miss all caches
            "form": row_format.name,
            "max_length": max_length,
            "append_eos": append_eos,
            "train_on": train_on,
            **({"drop_long": True} if drop_long else {}),
        }
        columns = (*row_format.columns, *row_format.optional, "weight")
        key = cache_key(rows, tokenizer, columns=columns, settings=settings)
        path = cache / f"{key}.safetensors"
        examples = read_cache(path)
        # Weights that the objective does not honour are refused below, with the rows' places.
        # What an earlier release wrote does not say which rows it cut.
        known = examples if examples is not None and examples.cut is not None else None
        if known is not None and (weigh_tokens or known.token_weights is None):
            return known
    dropped, cut = RowTally(), RowTally()
    tokenized = _tokenize(
        rows,
        tokenizer,
        row_format=row_format,
        append_eos=append_eos,
        train_on_all=train_on == "all",
    )
    if not weigh_tokens:
        tokenized = map(_refuse_token_weights, tokenized)
    examples = Examples.from_examples(
        _examples(
            rows,
            tokenized,
            max_length=max_length,
            dropped=dropped,
            cut=None if drop_long else cut,
        ),
        dropped,
        cut=cut,
    )
    if not len(examples):
        found = ", ".join(count_roles(rows))
        roles = f"; roles found: {found}, and the assistant's turns are learned" if found else ""
        raise DataError(f"no row has a target to learn ({describe_dropped(dropped)}{roles})")
    if path is not None:
        write_cache(path, examples)
    return examples


def _tokenize(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    row_format: RowFormat,
    append_eos: bool,
    train_on_all: bool,
) -> Iterator[TokenizedText | RowError]:
    assert row_format.tokenize is not None
    for start in range(0, len(rows), _BATCH):
        doing(f"{start:,} of {len(rows):,} rows tokenised")
        batch = rows[start : start + _BATCH]
        yield from row_format.tokenize(
            batch, tokenizer, append_eos=append_eos, train_on_all=train_on_all
        )


def _refuse_token_weights(tokenized: TokenizedText | RowError) -> TokenizedText | RowError:
    if isinstance(tokenized, TokenizedText) and tokenized.weights is not None:
        return RowError(
            "it has weights of tokens or messages, which this objective does not honour: only "
            "causal_lm, vision_language and distillation do"
        )
    return tokenized


def _examples(
    rows: Sequence[Row],
    tokenized: Iterator[TokenizedText | RowError],
    *,
    max_length: int | None,
    dropped: RowTally,
    cut: RowTally | None,
) -> Iterator[Example]:
    """The examples that have a target; counts the others, and raises all problems at the end.

    Without a tally of those that are cut, long rows are dropped.
    """

    def read(at: int, row: Row) -> Example:
        tokens = next(tokenized)
        weight = read_weight(row.values)
        if isinstance(tokens, RowError):
            raise tokens
        if not weight:
            raise RowDropped(WEIGHS_NOTHING)
        if not tokens.mask[1:].any():
            raise RowDropped("no target")
        if max_length is not None and len(tokens.ids) > max_length:
            if cut is None:
                raise RowDropped(f"longer than {max_length} tokens")
            cut.add(f"cut at {max_length} tokens", at)
        return example_of(tokens, weight=weight, row=at, max_length=max_length)

    return (example for _, example in iter_rows(rows, read, dropped=dropped))


def example_of(
    tokens: TokenizedText, *, weight: float, row: int, max_length: int | None
) -> Example:
    """The example of a row, truncated.

    Args:
        tokens: Of the row.
        weight: Of the row in the loss.
        row: Its index in the source.
        max_length: Keep the first so many tokens; None keeps all.

    Returns:
        The example.

    Raises:
        RowDropped: No target is left.
    """
    mask = tokens.mask[:max_length]
    # The first token has none before it to be predicted from.
    if not mask[1:].any():
        raise RowDropped(f"no target left after truncation to max_length {max_length}")
    ids = torch.from_numpy(tokens.ids[:max_length])
    labels = ids.where(torch.from_numpy(mask), IGNORE)
    weights = None if tokens.weights is None else torch.from_numpy(tokens.weights[:max_length])
    return Example(ids, labels, weight, row=row, token_weights=weights)


log = logging.getLogger("samestep")

_FORMAT = 1
"""To be raised when the same rows give other examples than before."""


def cache_key(
    rows: Sequence[Row], tokenizer: Any, *, columns: Iterable[str], settings: Mapping[str, Any]
) -> str:
    """A key that changes whenever the examples could.

    Args:
        rows: The rows.
        tokenizer: A fast tokenizer.
        columns: The columns that are read; others do not count.
        settings: All settings of the tokenisation.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        # Keys are not sorted: a template may print an object in the order that it has.
        digest.update(json.dumps(value, default=repr).encode())
        digest.update(b"\n")

    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Left behind by whoever used the tokenizer before; not in use here.
    backend.pop("truncation", None)
    backend.pop("padding", None)
    template = tokenizer.chat_template
    add([_FORMAT, version("transformers"), version("tokenizers"), type(tokenizer).__qualname__])
    add(backend)
    add([template, tokenizer.special_tokens_map, tokenizer.split_special_tokens])
    add(date.today().isoformat() if "strftime_now" in json.dumps(template) else None)
    add(settings)
    names = list(columns)
    for row in rows:
        add([row.values.get(name) for name in names])
    return digest.hexdigest()


def read_cache(path: Path) -> Examples | None:
    """Read a cache file.

    Args:
        path: A file that `write_cache` may have written.

    Returns:
        The examples; None if there is no file, or it is damaged (a warning says so).
    """
    try:
        return Examples.load(path) if path.is_file() else None
    except Exception as error:  # whatever damage does to a reader: the cache is then not there
        log.warning("token cache: %s; tokenising again", error)
        return None


def write_cache(path: Path, examples: Examples) -> None:
    """Write a cache file; without room or permission a warning says so, and the run goes on.

    Args:
        path: The file; its folder is made.
        examples: What to keep.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        examples.save(path)
    except OSError as error:
        log.warning("token cache: cannot write %s (%s)", path, error)
