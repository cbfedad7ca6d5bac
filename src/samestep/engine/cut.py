"""Cuts a micro-batch in two between its examples, without knowing what made it."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from samestep.engine.targets import IGNORE, sequence_spans, shifted_targets
from samestep.engine.terms import MicroBatch

_BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k")
_LONGEST = ("max_length_q", "max_length_k")
_DERIVED = ("target_positions",)
"""What is looked up in the labels where it is missing."""

_TRIES = 4
"""Places near the middle at which it is cut."""

_COUNTS_DIFFER = "its parts do not count what it counts, so its rows are no examples"


@dataclass(frozen=True)
class Halves:
    """A micro-batch, and two that hold the same examples.

    Attributes:
        whole: The micro-batch; where it has one row alone, that row twice.
        parts: Two micro-batches with the examples of the whole, in their order.
    """

    whole: MicroBatch
    parts: tuple[MicroBatch, MicroBatch]


Part: TypeAlias = tuple[int, int]
"""The first example of a part, and the first one after it."""


class _CannotCutError(Exception):
    """Why a micro-batch cannot be cut."""


def cut_in_two(micro_batch: MicroBatch, *, fits: Callable[[Halves], bool]) -> Halves | str:
    """Cut a micro-batch between two of its examples, near its middle.

    Args:
        micro_batch: A tensor, a sequence or a mapping of tensors whose first dimension is rows; or
            a mapping with tokens [rows, length], packed or not, as `samestep.data.collate` makes
            it, with fields of sequences and of records.
        fits: Whether halves hold what the whole does: a pair must not be cut.

    Returns:
        The halves; or why it cannot be cut, in words.
    """
    try:
        layout = _Layout.of(micro_batch)
        if layout.sequences == 1 and not layout.packed:
            found = Halves(_doubled(micro_batch), (micro_batch, micro_batch))
            return found if fits(found) else _COUNTS_DIFFER
        places = sorted(layout.places, key=lambda at: abs(2 * at - layout.sequences))
        for at in places[:_TRIES]:
            first = _part(micro_batch, (0, at), layout)
            found = Halves(micro_batch, (first, _part(micro_batch, (at, layout.sequences), layout)))
            if fits(found):
                return found
    except _CannotCutError as reason:
        return str(reason)
    return _COUNTS_DIFFER if places else "it holds one example (with targets)"


@dataclass(frozen=True)
class _Layout:
    """How the examples of a micro-batch lie in its tensors.

    Attributes:
        sequences: How many there are; rows where nothing is known of tokens.
        tokens: Rows and length of tensors with a number a token; None if there are none.
        packed: Whether all sequences lie in one row.
        spans: The row and the positions of each sequence, where there are tokens.
        records: How many records there are, of sequences / records sequences each.
        places: Where it may be cut: before which sequences.
    """

    sequences: int
    tokens: tuple[int, int] | None
    packed: bool
    spans: list[tuple[int, slice]]
    records: int
    places: list[int]

    @classmethod
    def of(cls, micro_batch: MicroBatch) -> "_Layout":
        ids = None
        if isinstance(micro_batch, Mapping):
            ids = next((micro_batch[n] for n in ("labels", "input_ids") if n in micro_batch), None)
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            rows = _common_rows(micro_batch)
            return cls(rows, None, False, [], rows, list(range(1, rows)))
        shape = (int(ids.shape[0]), int(ids.shape[1]))
        spans = _spans(micro_batch, shape)
        packed = _is_pack(micro_batch, shape)
        if not packed and len(spans) != shape[0]:
            raise _CannotCutError("its rows are packs of several sequences")
        records = _num_records(micro_batch, shape, sequences=len(spans))
        width = len(spans) // records
        places = [at for at in range(width, len(spans), width) if _new_example(micro_batch, at)]
        places = _with_targets(micro_batch, places, spans)
        return cls(len(spans), shape, packed, spans, records, places)


def _is_pack(micro_batch: Mapping[str, Any], shape: tuple[int, int]) -> bool:
    positions, mask = micro_batch.get("position_ids"), micro_batch.get("attention_mask")
    return shape[0] == 1 and mask is None and positions is not None


def _spans(micro_batch: Mapping[str, Any], shape: tuple[int, int]) -> list[tuple[int, slice]]:
    known = any(name in micro_batch for name in ("spans", "cu_seq_lens_q"))
    if known or not _is_pack(micro_batch, shape):
        if known or "input_ids" in micro_batch:
            return sequence_spans(micro_batch)
        return [(row, slice(0, shape[1])) for row in range(shape[0])]
    starts = (micro_batch["position_ids"][0] == 0).nonzero().squeeze(1).tolist()
    starts = starts if starts[:1] == [0] else [0, *starts]
    ends = [*starts[1:], shape[1]]
    return [(0, slice(start, end)) for start, end in zip(starts, ends, strict=True)]


def _num_records(micro_batch: Mapping[str, Any], shape: tuple[int, int], *, sequences: int) -> int:
    fields = micro_batch.get("fields")
    tensors = [] if not isinstance(fields, Mapping) else list(fields.values())
    sizes = {
        int(value.shape[0])
        for value in tensors
        if isinstance(value, Tensor) and value.dim() and tuple(value.shape[:2]) != shape
    }
    if len(sizes) > 1 or any(size == 0 or sequences % size for size in sizes):
        raise _CannotCutError(f"it holds {sequences} sequences, but fields of {sorted(sizes)}")
    return sizes.pop() if sizes else sequences


def _new_example(micro_batch: Mapping[str, Any], at: int) -> bool:
    """Whether another row of the source starts at a sequence: a pair is not cut."""
    ids = micro_batch.get("example_ids")
    return not isinstance(ids, Tensor) or at >= len(ids) or bool(ids[at] != ids[at - 1])


def _with_targets(
    micro_batch: Mapping[str, Any], places: list[int], spans: list[tuple[int, slice]]
) -> list[int]:
    """The places with targets on both sides, where labels tell."""
    labels = micro_batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        return places
    is_target = (shifted_targets(micro_batch) != IGNORE).cpu()
    held = [at for at, (row, span) in enumerate(spans) if bool(is_target[row, span].any())]
    return [at for at in places if held and held[0] < at <= held[-1]]


def _common_rows(micro_batch: MicroBatch) -> int:
    """The one first dimension of all tensors."""
    sizes = {int(tensor.shape[0]) if tensor.dim() else 0 for tensor in _tensors(micro_batch)}
    sizes.discard(0 if isinstance(micro_batch, Mapping) else -1)
    if len(sizes) != 1 or 0 in sizes:
        raise _CannotCutError(
            f"the first dimensions of its tensors are {sorted(sizes) or 'none'}: they are not rows"
        )
    return sizes.pop()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _part(value: Any, part: Part, layout: _Layout, name: str = "") -> Any:
    """The part of a value, whatever it is, that belongs to some of the sequences."""
    if isinstance(value, Tensor):
        return _part_of_tensor(value, part, layout, name)
    if isinstance(value, Mapping):
        items = {key: _part(item, part, layout, str(key)) for key, item in _kept(value)}
        if layout.packed and "cu_seq_lens_q" in value:
            items.update(_borders(value, part, layout))
        return _like(value, items)
    if name == "spans":
        return _moved(layout.spans[slice(*part)], packed=layout.packed)
    if isinstance(value, list | tuple):
        if value and all(isinstance(item, Tensor) for item in value) and not name:
            return type(value)(
                [_part(item, part, layout, f"[{at}]") for at, item in enumerate(value)]
            )
        if len(value) == layout.sequences:
            return value[slice(*part)]
        raise _CannotCutError(f"{name!r} is a {type(value).__name__} of {len(value)}")
    if value is None or isinstance(value, int | float | str | bool):
        return value
    raise _CannotCutError(f"{name or 'it'!r} is a {type(value).__name__}")


def _part_of_tensor(value: Tensor, part: Part, layout: _Layout, name: str) -> Tensor:
    start, stop = part
    if value.dim() == 0:
        return value
    if layout.tokens is not None and tuple(value.shape[:2]) == layout.tokens:
        if layout.packed:
            return value[:, layout.spans[start][1].start : layout.spans[stop - 1][1].stop]
        return value[start:stop]
    if value.shape[0] == layout.sequences:
        return value[start:stop]
    width = layout.sequences // layout.records
    if value.shape[0] == layout.records:
        return value[start // width : stop // width]
    raise _CannotCutError(
        f"{name!r} has shape {tuple(value.shape)}, which is not its {layout.sequences} sequences"
    )


def _kept(value: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if key not in (*_DERIVED, *_BORDERS, *_LONGEST):
            yield key, item


def _borders(value: Mapping[str, Any], part: Part, layout: _Layout) -> dict[str, Any]:
    spans = layout.spans[slice(*part)]
    ends = [0, *(span.stop - spans[0][1].start for _, span in spans)]
    borders = torch.tensor(ends).to(value["cu_seq_lens_q"])
    longest = max(span.stop - span.start for _, span in spans)
    found: dict[str, Any] = {name: borders for name in _BORDERS if name in value}
    for name in _LONGEST:
        if name in value:
            old = value[name]
            found[name] = torch.as_tensor(longest).to(old) if isinstance(old, Tensor) else longest
    return found


def _moved(spans: Sequence[tuple[int, slice]], *, packed: bool) -> list[tuple[int, slice]]:
    row = spans[0][0]
    start = spans[0][1].start if packed else 0
    return [(r - row, slice(span.start - start, span.stop - start)) for r, span in spans]


def _doubled(value: Any, name: str = "") -> Any:
    """A micro-batch of one row, with that row twice."""
    if isinstance(value, Tensor):
        return torch.cat([value, value]) if value.dim() else value
    if isinstance(value, Mapping):
        return _like(value, {key: _doubled(item, str(key)) for key, item in _kept(value)})
    if name == "spans":
        return [*value, *((row + 1, span) for row, span in value)]
    if isinstance(value, list | tuple):
        if not name:
            return type(value)([_doubled(item, f"[{at}]") for at, item in enumerate(value)])
        return type(value)([*value, *value])
    return value


def _like(value: Mapping[str, Any], items: dict[str, Any]) -> Any:
    """A mapping of the same kind with other items."""
    if type(value) is dict:
        return items
    other: Any = copy.copy(value)
    for key in list(other):
        del other[key]
    other.update(items)
    return other
