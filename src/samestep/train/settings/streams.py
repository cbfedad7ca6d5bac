"""Settings of data without an end: what of a run needs a length, and is refused with it."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from samestep.utils.sources import DataSource

_OBJECTIVES = ("causal_lm", "dpo", "simpo", "cpo", "orpo")
"""Whose records are those of single rows, so that they can be made of some rows at a time."""


class StreamFields(BaseModel):
    """How sources are read that are never read whole."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    stream: bool = False
    """Read --data row by row, without an end, in bounded memory; needs --steps. In YAML a source
    may say it by itself (stream: true)."""
    shuffle_buffer: int = Field(default=10_000, ge=1)
    """Of a stream: records that are shuffled together; 1 keeps their order."""


def is_stream(settings: StreamFields, parts: Sequence[DataSource]) -> bool:
    """Whether the rows to train on come from a stream.

    Args:
        settings: ``stream``.
        parts: The sources of ``data``.
    """
    return settings.stream or any(part.stream for part in parts)


def stream_problems(
    settings: StreamFields,
    parts: Sequence[DataSource],
    *,
    objective: str,
    evaluated: Sequence[DataSource],
    lengths: dict[str, bool],
) -> list[str]:
    """What does not go with streams, a line each.

    Args:
        settings: Each field right by itself.
        parts: The sources of ``data``.
        objective: What is optimised.
        evaluated: The sources of ``eval_data``.
        lengths: Whether settings are given that need a length, by name; "steps" ends a stream.
    """
    problems = [f"eval_data: {part.path}: a stream has no end" for part in evaluated if part.stream]
    if not is_stream(settings, parts):
        if settings.shuffle_buffer != StreamFields.model_fields["shuffle_buffer"].default:
            problems.append(f"shuffle_buffer: {settings.shuffle_buffer} has no effect: no stream")
        return problems
    if not lengths.pop("steps"):
        problems.append("stream: a stream has no end: set steps")
    problems += [
        f"{name}: not with a stream, which has no length"
        for name, given in lengths.items()
        if given
    ]
    if objective not in _OBJECTIVES:
        problems.append(
            f"stream: objective {objective} needs all rows at once; these take a stream: "
            f"{', '.join(_OBJECTIVES)}"
        )
    whole = [part.path for part in parts if not (settings.stream or part.stream)]
    if whole:
        problems.append(f"stream: {', '.join(whole)} is none: all sources of data are, or none")
    problems += [f"data: {part.path}: rows: a stream takes a weight" for part in parts if part.rows]
    unweighted = [part.path for part in parts if part.weight is None]
    if len(parts) > 1 and unweighted:
        problems.append(f"data: {', '.join(unweighted)}: of several streams each needs a weight")
    return problems
