"""A source of rows, as settings name it: a path, and what of it is read. No PyTorch."""

from typing import Annotated, TypeAlias

from pydantic import BaseModel, ConfigDict, Field


class DataSource(BaseModel):
    """A source with more to say of it than its name."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    path: Annotated[str, Field(min_length=1)]
    """A file, a folder, a pattern, a URL, or a name of the Hub."""
    split: str | None = None
    """Which split of a data set that has several (train)."""
    config: str | None = None
    """Which configuration of a data set of the Hub."""
    weight: float | None = Field(default=None, gt=0)
    """Its share of every epoch, beside the weights of the other sources."""
    rows: int | None = Field(default=None, ge=1)
    """How many of its rows an epoch takes."""
    stream: bool = False
    """Read it row by row, without an end."""
    columns: dict[str, str] | None = None
    """Columns that are called otherwise there: known name to that of the source."""


Source: TypeAlias = str | DataSource | tuple[str | DataSource, ...]
"""What a setting names: one source, or several that are read in their order."""


def parts_of(source: Source) -> tuple[DataSource, ...]:
    """The sources that a setting names, each by itself.

    Args:
        source: Its value.

    Returns:
        In order.
    """
    parts = source if isinstance(source, tuple) else (source,)
    return tuple(
        DataSource.model_construct(path=each) if isinstance(each, str) else each for each in parts
    )


def describe_source(source: Source) -> str:
    """A source in a few words, for messages.

    Args:
        source: The value of a setting.

    Returns:
        Its paths.
    """
    return ", ".join(
        part.path
        + (f"[{part.config}]" if part.config else "")
        + (f" ({part.split})" if part.split else "")
        for part in parts_of(source)
    )


def is_url(path: str) -> bool:
    """Whether a path is one of another file system, such as s3://bucket/rows.jsonl."""
    return "://" in path
