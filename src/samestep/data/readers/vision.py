"""Conversations with images: rows to tokens and targets, and to micro-batches.

A processor of transformers puts as many image tokens in the place of an image as the model makes of
it. It runs once on each row when rows are read, to know its tokens, and again when a micro-batch is
made, so that no pixel is kept. It always sees one row by itself: what it makes of an image cannot
depend on the neighbours.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samestep.data.collate import Padding, collate
from samestep.data.conversations import mark_turns, renderer
from samestep.data.encode import (
    Mask,
    Span,
    TextWithTargets,
    TokenizedText,
    by_weight,
    mask_from_offsets,
    masked,
)
from samestep.data.examples import Example, Examples
from samestep.data.readers.images import image_messages, open_image, sha256_of_images
from samestep.data.records import Records
from samestep.data.row_formats import tools_of
from samestep.data.rows import Row, RowError, raise_all, weight_of
from samestep.engine.targets import IGNORE, sequence_spans
from samestep.errors import ConfigError, DataError


@dataclass(frozen=True)
class ImageConversation:
    """A rendered conversation and the files of its images.

    Attributes:
        text: With one image token in the place of each image.
        files: In the order of the text.
    """

    text: str
    files: tuple[Path, ...]


@dataclass(frozen=True)
class ImageDataset:
    """The conversations of a data set, in the order of its records.

    Attributes:
        rows: One for each record.
        processor: What read them.
        digest: SHA-256 of the texts and of the images' contents; all that its repr shows.
    """

    rows: tuple[ImageConversation, ...]
    processor: Any
    digest: str

    def __repr__(self) -> str:
        return f"Gallery({self.digest})"

    @cached_property
    def axes(self) -> dict[str, int]:
        """Along which axis images follow one another, in each tensor of theirs."""
        return image_axes(self.processor)


def image_records(
    rows: Sequence[Row],
    processor: Any,
    folder: Path,
    *,
    max_length: int | None = None,
    everything: bool = False,
) -> Records:
    """Tokenise conversations with images and mark the assistant's turns; never an image token.

    Args:
        rows: Rows with ``messages``, as for `samestep.data.readers.images.image_messages`.
        processor: A processor of transformers, with a chat template and a fast tokenizer.
        folder: Where relative image files are looked for.
        max_length: Keep the first so many tokens of a row. A row is dropped, and counted, if that
            would cut into an image.
        everything: Every token but those of images is a target.

    Returns:
        A record for every row that has a target, with ``meta["gallery"]``.

    Raises:
        DataError: Rows or images cannot be used (lists every one), or no row has a target.
        ConfigError: The processor cannot do what the rows need.
    """
    if not processor.chat_template:
        raise ConfigError("the processor has no chat template, which rows with images need")
    if not processor.tokenizer.is_fast:
        raise ConfigError("rows with images need a fast tokenizer, to tell where targets start")
    problems: list[str] = []
    dropped: Counter[str] = Counter()
    kept: list[tuple[Example, ImageConversation]] = []
    digest = hashlib.sha256()
    for at, row in enumerate(rows):
        try:
            one = _marked(row, processor, folder, everything)
            tokens, is_image = _encode(*one, processor)
            weight = weight_of(row.values)
        except RowError as error:
            problems.append(f"{row.origin}: {error}")
            continue
        mask = tokens.mask[:max_length]
        if is_image[len(mask) :].any():
            dropped[f"an image does not fit in max_length {max_length}"] += 1
        elif not mask[1:].any():
            dropped["no target"] += 1
        else:
            ids = torch.from_numpy(tokens.ids[: len(mask)])
            given = tokens.weights
            weights = None if given is None else torch.from_numpy(given[: len(mask)])
            labels = ids.where(torch.from_numpy(mask), IGNORE)
            illustrated = ImageConversation(one[0].text, one[1])
            kept.append((Example(ids, labels, weight, at, weights), illustrated))
            digest.update(sha256_of_images(list(one[1])).encode() + one[0].text.encode())
    raise_all(problems)
    if not kept:
        counts = "; ".join(f"{count} rows: {reason}" for reason, count in dropped.items())
        raise DataError(f"no row has a target to learn ({counts})")
    examples = Examples.from_examples((example for example, _ in kept), dropped)
    shown = tuple(illustrated for _, illustrated in kept)
    gallery = ImageDataset(shown, processor, digest.hexdigest())
    return Records(examples, meta={"gallery": gallery})


def _marked(
    row: Row, processor: Any, folder: Path, everything: bool
) -> tuple[TextWithTargets, tuple[Path, ...]]:
    messages, files = image_messages(row.values, folder)
    render = renderer(processor, tools_of(row.values))
    if everything:
        if any("weight" in message for message in messages):
            raise RowError("a message has a weight, which train_on: all would ignore")
        marked = TextWithTargets(render(messages, False), None)
    else:
        endings = processor.tokenizer.all_special_tokens
        marked = mark_turns(messages, render, endings=endings)
    found = marked.text.count(processor.image_token)
    if found != len(files):
        raise RowError(
            f"its text has {found} image tokens {processor.image_token!r} for {len(files)} images: "
            "the text of a message must not hold that token, and the template must write it"
        )
    return marked, tuple(files)


def _encode(
    marked: TextWithTargets, files: Sequence[Path], processor: Any
) -> tuple[TokenizedText, Mask]:
    """The tokens of a row, and which of them stand for images."""
    outputs, replaced = _process(marked.text, files, processor)
    ids = outputs["input_ids"][0].numpy()
    offsets = outputs["offset_mapping"][0].tolist()
    images: list[Span] = [tuple(one["new_span"]) for one in replaced]
    length = len(marked.text) + sum(_growth(one) for one in replaced)
    is_image = mask_from_offsets(offsets, images, text_length=length + 1)
    if marked.spans is None:
        return TokenizedText(ids, ~is_image), is_image
    moved = [(_moved(start, replaced), _moved(end, replaced)) for start, end in marked.spans]
    masks = [
        mask_from_offsets(offsets, group, text_length=length) & ~is_image
        for group in by_weight(moved, marked.weights)
    ]
    return masked(ids, masks, marked.weights), is_image


def _growth(replacement: Mapping[str, Any]) -> int:
    return len(replacement["replacement"]) - len(replacement["text"])


def _moved(at: int, replaced: Sequence[Mapping[str, Any]]) -> int:
    """Where a position of the text stands after the images' tokens were put in."""
    grown: int = sum(_growth(one) for one in replaced if one["span"][1] <= at)
    return at + grown


def _process(
    text: str, files: Sequence[Path], processor: Any
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """What a processor makes of one row [1, ...], and which pieces of the text it replaced."""
    settings = {"return_tensors": "pt", "add_special_tokens": False, "return_offsets_mapping": True}
    if not files:  # some processors insist on an image
        return dict(processor.tokenizer([text], **settings)), []
    images = [open_image(file) for file in files]
    outputs = processor(
        text=[text], images=images, return_text_replacement_offsets=True, **settings
    )
    outputs = dict(outputs)
    return outputs, outputs.pop("text_replacement_offsets")[0]


def collate_image_records(
    records: Records,
    indices: Sequence[int],
    *,
    padding: Padding,
    pad_id: int,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """One micro-batch of conversations with images.

    Args:
        records: Of `image_records`.
        indices: Which of them; at least one.
        padding: "right" or "left".
        pad_id: What to fill padding with.
        dtype: Of pixels; not every model casts them to its own.

    Returns:
        What `collate` gives, and what the processor made of tokens and images. Without
        ``position_ids`` where the model makes them itself, row by row, of the shapes of the images
        (it is told by ``mm_token_type_ids`` where they are).

    Raises:
        DataError: An image is not as it was when it was read.
    """
    gallery: ImageDataset = records.meta["gallery"]
    examples = [records.sequences[at] for at in indices]
    micro = collate(examples, padding=padding, pad_id=pad_id)
    by_token: dict[str, dict[int, Tensor]] = {}
    by_image: dict[str, list[Tensor]] = {}
    for place, (at, example) in enumerate(zip(indices, examples, strict=True)):
        row = gallery.rows[at]
        outputs, _ = _process(row.text, row.files, gallery.processor)
        length = len(example.input_ids)
        if not torch.equal(outputs.pop("input_ids")[0, :length], example.input_ids):
            raise DataError(
                f"images {', '.join(map(str, row.files))}: changed since they were read"
            )
        for name in outputs.keys() - {"attention_mask", "offset_mapping"}:
            if name in gallery.axes:
                by_image.setdefault(name, []).append(outputs[name])
            else:
                by_token.setdefault(name, {})[place] = outputs[name][0, :length]
    if "mm_token_type_ids" in by_token:
        del micro["position_ids"]
    for name, rows in by_token.items():
        micro[name] = _laid_out(rows, micro)
    for name, parts in by_image.items():
        joined = _joined(parts, gallery.axes[name])
        micro[name] = joined.to(dtype) if joined.is_floating_point() else joined
    return micro


def image_axes(processor: Any) -> dict[str, int]:
    """Along which axis images follow one another, in each tensor that a processor makes of them.

    Each family has a shape of its own; so the processor is asked, with an image once and twice.
    """
    from PIL import Image

    image = Image.fromarray(np.arange(48 * 48 * 3, dtype=np.uint8).reshape(48, 48, 3))
    once, twice = (
        processor(
            text=[processor.image_token * number],
            images=[image] * number,
            return_tensors="pt",
            add_special_tokens=False,
        )
        for number in (1, 2)
    )
    axes = {}
    for name, value in once.items():
        if value.shape != once["input_ids"].shape:
            sizes = zip(value.shape, twice[name].shape, strict=True)
            axes[name] = next(axis for axis, (one, two) in enumerate(sizes) if one != two)
    return axes


def _laid_out(rows: Mapping[int, Tensor], micro: Mapping[str, Any]) -> Tensor:
    """Values of tokens in the layout of the micro-batch; 0 in padding, and in rows without any."""
    out = next(iter(rows.values())).new_zeros(micro["input_ids"].shape)
    for place, (row, span) in enumerate(sequence_spans(micro)):
        if place in rows:
            out[row, span] = rows[place]
    return out


def _joined(parts: Sequence[Tensor], axis: int) -> Tensor:
    """Tensors one after another along an axis, filled up with zeros along the others."""
    shape = torch.tensor([part.shape for part in parts]).max(0).values.tolist()
    filled = []
    for part in parts:
        wanted = [*shape]
        wanted[axis] = part.shape[axis]
        out = part.new_zeros(wanted)
        out[tuple(slice(0, size) for size in part.shape)] = part
        filled.append(out)
    return torch.cat(filled, dim=axis)
