"""The formats of rows: how each is recognised by its columns, and how it becomes tokens.

A format is declared once, in ``ROW_FORMATS``. It is either tokenised as it is, or converted to the
columns of one that is. Converters from outside the package come by reference, see
`samestep.data.row_converters`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from samestep.data.conversations import tokenize_conversations
from samestep.data.peer_formats import (
    from_alpaca,
    from_hh,
    from_openai_preference,
    from_sharegpt,
    is_hh,
)
from samestep.data.rows import Row, RowError, describe_columns, map_rows, result_or_error
from samestep.data.target_spans import TextWithTargets, TokenizedText, tokenize_texts
from samestep.data.token_fields import read_token_ids
from samestep.errors import ConfigError

Columns = Mapping[str, Any]
"""The columns of a row by name; one that is None counts as absent."""


class Tokenize(Protocol):
    """Tokenises rows of a format: one result for each row, in order."""

    def __call__(
        self, rows: Sequence[Row], tokenizer: Any, *, append_eos: bool, train_on_all: bool
    ) -> Sequence[TokenizedText | RowError]:
        """The tokens of each row, or why it cannot be used.

        Args:
            rows: Rows of the format, some hundreds.
            tokenizer: A tokenizer of transformers.
            append_eos: Close what does not close itself with the end-of-sequence token.
            train_on_all: Every token is a target.
        """


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """A format of rows: what it is recognised by, and what becomes of it.

    Attributes:
        name: For messages, and for the key of the token cache.
        columns: The columns that a row of it must have.
        optional: Further columns that it reads; every format reads ``weight`` too.
        note: What the columns hold where their names do not tell, for messages and docs.
        learned: Which tokens are targets, for docs.
        matches: Whether a row that has all of ``columns`` is of this format; None: it is. It may
            raise a `RowError` where the row is of no format because of what a column holds.
        tokenize: Rows to tokens; or
        convert: The columns of one row to those of a format that is tokenised; it raises a
            `RowError` or ValueError that says what is wrong with the row.
        cached: Whether tokens are kept in the token cache.
        closed: Whether ``append_eos`` closes it.
    """

    name: str
    columns: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    note: str = ""
    learned: str = ""
    matches: Callable[[Columns], bool] | None = None
    tokenize: Tokenize | None = None
    convert: Callable[[dict[str, Any]], Columns] | None = None
    cached: bool = True
    closed: bool = False

    def __post_init__(self) -> None:
        if (self.tokenize is None) == (self.convert is None):
            raise ConfigError(
                f"the row format {self.name!r} needs either tokenize or convert, and not both"
            )

    def recognizes(self, values: Columns) -> bool:
        """Whether a row with these columns is of this format.

        Args:
            values: The columns.

        Returns:
            Whether it is.

        Raises:
            RowError: It is of no format, because of what a column holds.
        """
        if any(values.get(name) is None for name in self.columns):
            return False
        return self.matches is None or self.matches(values)


def _tokenize_ids(
    rows: Sequence[Row], tokenizer: Any, *, append_eos: bool, train_on_all: bool
) -> list[TokenizedText | RowError]:
    return [result_or_error(read_token_ids, row.values, train_on_all=train_on_all) for row in rows]


def _tokenize_messages(
    rows: Sequence[Row], tokenizer: Any, *, append_eos: bool, train_on_all: bool
) -> list[TokenizedText | RowError]:
    return tokenize_conversations(rows, tokenizer, train_on_all=train_on_all)


def _tokenize_completions(
    rows: Sequence[Row], tokenizer: Any, *, append_eos: bool, train_on_all: bool
) -> list[TokenizedText | RowError]:
    def with_targets(values: Columns) -> TextWithTargets:
        text = values["prompt"] + values["completion"]
        completion = (len(values["prompt"]), len(text))
        return TextWithTargets(text, None if train_on_all else (completion,))

    texts = [with_targets(row.values) for row in rows]
    return _closed(texts, tokenizer, append_eos=append_eos)


def _tokenize_plain_texts(
    rows: Sequence[Row], tokenizer: Any, *, append_eos: bool, train_on_all: bool
) -> list[TokenizedText | RowError]:
    texts = [TextWithTargets(row.values["text"], None) for row in rows]
    return _closed(texts, tokenizer, append_eos=append_eos)


def _closed(
    texts: Sequence[TextWithTargets], tokenizer: Any, *, append_eos: bool
) -> list[TokenizedText | RowError]:
    eos_id = tokenizer.eos_token_id if append_eos else None
    return [
        result if isinstance(result, RowError) else result.with_eos(eos_id)
        for result in tokenize_texts(texts, tokenizer, special_tokens=True)
    ]


def _completions_of(kind: type) -> Callable[[Columns], bool]:
    def matches(values: Columns) -> bool:
        prompt, completion = values["prompt"], values["completion"]
        kinds = (str, list)
        if not any(isinstance(prompt, each) and isinstance(completion, each) for each in kinds):
            raise RowError(
                f"prompt is {type(prompt).__name__} and completion is {type(completion).__name__}: "
                "both must be text, or both lists of messages"
            )
        return isinstance(prompt, kind)

    return matches


def _has_text(values: Columns) -> bool:
    if not isinstance(values["text"], str):
        raise RowError(f"text must be text, found {type(values['text']).__name__}")
    return True


_FORMATS = (
    RowFormat(
        name="token ids",
        columns=("input_ids",),
        optional=("labels", "token_weights"),
        learned="every token, or those whose label is not -100",
        tokenize=_tokenize_ids,
        cached=False,
    ),
    RowFormat(
        name="messages",
        columns=("messages",),
        optional=("tools",),
        learned="the assistant's turns, through the tokenizer's chat template",
        tokenize=_tokenize_messages,
    ),
    RowFormat(
        name="prompt and completion",
        columns=("prompt", "completion"),
        note="both text",
        learned="the completion",
        matches=_completions_of(str),
        tokenize=_tokenize_completions,
        closed=True,
    ),
    RowFormat(
        name="prompt and completion turns",
        columns=("prompt", "completion"),
        optional=("tools",),
        note="both lists of messages",
        learned="the assistant's turns in the completion",
        matches=_completions_of(list),
        tokenize=_tokenize_messages,
    ),
    RowFormat(
        name="text",
        columns=("text",),
        learned="every token",
        matches=_has_text,
        tokenize=_tokenize_plain_texts,
        closed=True,
    ),
    RowFormat(
        name="ShareGPT",
        columns=("conversations",),
        optional=("system", "tools"),
        note="turns with from and value",
        learned="the turns of gpt, as of `messages`",
        convert=from_sharegpt,
    ),
    RowFormat(
        name="Alpaca",
        columns=("instruction", "output"),
        optional=("input",),
        note="all text",
        learned="the output, after Alpaca's own prompt as text",
        convert=from_alpaca,
    ),
    RowFormat(
        name="HH",
        columns=("chosen", "rejected"),
        note="both text of Human: and Assistant:",
        learned="for preferences: the last turns, as of messages",
        matches=is_hh,
        convert=from_hh,
    ),
    RowFormat(
        name="OpenAI preferences",
        columns=("input", "preferred_output", "non_preferred_output"),
        note="the first an object with messages (and tools), the others lists of messages",
        learned="for preferences: the outputs, as of messages",
        convert=from_openai_preference,
    ),
)

ROW_FORMATS: dict[str, RowFormat] = {row_format.name: row_format for row_format in _FORMATS}
"""Every format by name. A row that has the columns of several is of the first of them."""


def recognize_format(values: Columns) -> RowFormat | None:
    """The format of a row: the first of ``ROW_FORMATS`` whose columns it has.

    Args:
        values: The columns.

    Returns:
        The format, or None if the columns make none.

    Raises:
        RowError: The columns make none because of what they hold.
    """
    return next((each for each in ROW_FORMATS.values() if each.recognizes(values)), None)


def common_format(rows: Sequence[Row]) -> RowFormat:
    """The format that all rows have.

    Args:
        rows: At least one.

    Returns:
        The format.

    Raises:
        DataError: Rows have no format, or not the same; lists every one.
    """
    first: tuple[RowFormat, str] | None = None

    def same_format(row: Row) -> RowFormat:
        nonlocal first
        row_format = recognize_format(row.values)
        if row_format is None:
            absent = sorted(name for name, value in row.values.items() if value is None)
            nulls = f" ({', '.join(absent)}: null)" if absent else ""
            raise RowError(describe_columns(row.values) + nulls)
        if first is None:
            first = row_format, row.origin
        if row_format is not first[0]:
            raise RowError(f"has {row_format.name}, but {first[1]} has {first[0].name}")
        return row_format

    return map_rows(rows, same_format, hint=_accepted())[0]


def _accepted() -> str:
    """The columns that rows may have, for a message."""
    described = []
    for row_format in ROW_FORMATS.values():
        note = f", {row_format.note}" if row_format.note else ""
        optional = f" (and {', '.join(row_format.optional)})" if row_format.optional else ""
        described.append(" and ".join(row_format.columns) + note + optional)
    return (
        f"accepted columns: {'; or '.join(described)}. All rows must have the same. Each may add "
        "weight"
    )


def document_formats() -> str:
    """The table of formats for the docs, in Markdown."""
    lines = ["| columns | what is learned |", "| --- | --- |"]
    for row_format in ROW_FORMATS.values():
        columns = ", ".join(f"`{name}`" for name in row_format.columns)
        note = f", {row_format.note}" if row_format.note else ""
        optional = ", ".join(f"`{name}`" for name in row_format.optional)
        lines.append(
            f"| {columns}{note}{f' (and {optional})' if optional else ''} | {row_format.learned} |"
        )
    return "\n".join(lines)
