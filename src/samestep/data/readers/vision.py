"""Conversations with images: rows to tokens and targets, and to micro-batches.

The processor runs once on each row when rows are read, to know its tokens, and again when a
micro-batch is made, so that no pixel is kept.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samestep.data.collate import Padding, collate_examples, scatter_tokens
from samestep.data.conversations import render_targets, renderer
from samestep.data.examples import Example, Examples
from samestep.data.messages import Conversation, read_tools
from samestep.data.readers.images import (
    concatenate_images,
    image_axes,
    image_messages,
    run_processor,
    sha256_of_images,
    shift_span,
)
from samestep.data.records import Records
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
from samestep.data.target_spans import (
    TextWithTargets,
    TokenizedText,
    TokenMask,
    group_spans,
    mask_from_offsets,
    merge_masks,
)
from samestep.data.tokenize import TrainOn, example_of
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
        # Part of the fingerprint of the records that a checkpoint holds: it must stay as it is.
        return f"Gallery({self.digest})"

    @cached_property
    def axes(self) -> dict[str, int]:
        """Along which axis images follow one another, in each tensor of theirs."""
        return image_axes(self.processor)


def image_records(
    rows: Sequence[Row],
    processor: Any,
    *,
    folder: Path,
    max_length: int | None = None,
    train_on: TrainOn = "completion",
) -> Records:
    """Tokenise conversations with images and mark the assistant's turns; never an image token.

    Args:
        rows: Rows with ``messages``, as for `samestep.data.readers.images.image_messages`.
        processor: A processor of transformers, with a chat template and a fast tokenizer.
        folder: Where relative image files are looked for.
        max_length: Keep the first so many tokens of a row. A row is dropped, and counted, if that
            would cut into an image.
        train_on: "all" makes every token but those of images a target.

    Returns:
        A record for every row that has a target, with an `ImageDataset` as ``meta["gallery"]``.

    Raises:
        DataError: Rows or images cannot be used (lists every one), or no row has a target.
        ConfigError: The processor cannot do what the rows need.
    """
    if not processor.chat_template:
        raise ConfigError("the processor has no chat template, which rows with images need")
    if not processor.tokenizer.is_fast:
        raise ConfigError("rows with images need a fast tokenizer, to tell where targets start")
    dropped, cut = RowTally(), RowTally()
    digest = hashlib.sha256()

    def read(at: int, row: Row) -> tuple[Example, ImageConversation]:
        text, conversation = _render(row, processor, folder=folder, train_on_all=train_on == "all")
        tokens, is_image = _tokenize(text, conversation.files, processor=processor)
        weight = read_weight(row.values)
        if not weight:
            raise RowDropped(WEIGHS_NOTHING)
        if max_length is not None and is_image[max_length:].any():
            raise RowDropped(f"an image does not fit in max_length {max_length}")
        if not tokens.mask[:max_length][1:].any():
            raise RowDropped("no target")
        if max_length is not None and len(tokens.ids) > max_length:
            cut.add(f"cut at {max_length} tokens", at)
        digest.update(sha256_of_images(conversation.files).encode() + conversation.text.encode())
        return example_of(tokens, weight=weight, row=at, max_length=max_length), conversation

    kept = [result for _, result in iter_rows(rows, read, dropped=dropped)]
    if not kept:
        raise DataError(f"no row has a target to learn ({describe_dropped(dropped)})")
    examples = Examples.from_examples((example for example, _ in kept), dropped, cut=cut)
    conversations = tuple(conversation for _, conversation in kept)
    dataset = ImageDataset(conversations, processor, digest.hexdigest())
    return Records(examples, meta={"gallery": dataset})


def _render(
    row: Row, processor: Any, *, folder: Path, train_on_all: bool
) -> tuple[TextWithTargets, ImageConversation]:
    messages, files = image_messages(row.values, folder)
    conversation = Conversation(messages, 0, read_tools(row.values))
    text = render_targets(
        conversation,
        renderer(processor, conversation.tools),
        train_on_all=train_on_all,
        endings=processor.tokenizer.all_special_tokens,
    )
    image_tokens = text.text.count(processor.image_token)
    if image_tokens != len(files):
        raise RowError(
            f"its text has {image_tokens} image tokens {processor.image_token!r} for {len(files)} "
            "images: the text of a message must not hold that token, and the template must write it"
        )
    return text, ImageConversation(text.text, tuple(files))


def _tokenize(
    text: TextWithTargets, files: Sequence[Path], *, processor: Any
) -> tuple[TokenizedText, TokenMask]:
    """The tokens of a row, and which of them stand for images [length]."""
    outputs, replacements = run_processor(text.text, files, processor=processor)
    ids = outputs["input_ids"][0].numpy()
    offsets = outputs["offset_mapping"][0].tolist()
    length = len(text.text) + sum(part.growth for part in replacements)
    images = [part.new_span for part in replacements]
    is_image = mask_from_offsets(offsets, images, text_length=length + 1)
    if text.spans is None:
        return TokenizedText(ids, ~is_image), is_image
    spans = [shift_span(span, replacements) for span in text.spans]
    masks = [
        mask_from_offsets(offsets, group, text_length=length) & ~is_image
        for group in group_spans(spans, text.weights)
    ]
    return merge_masks(ids, masks, weights=text.weights), is_image


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
        What `samestep.data.collate.collate_examples` gives, and what the processor made of tokens
        [rows, length] and of images. Without ``position_ids`` where the model makes them itself,
        row by row, of the shapes of the images (``mm_token_type_ids`` tell it where they are).

    Raises:
        DataError: An image is not as it was when it was read.
    """
    dataset: ImageDataset = records.meta["gallery"]
    examples = [records.sequences[at] for at in indices]
    micro = collate_examples(examples, padding=padding, pad_id=pad_id)
    by_token: dict[str, list[Tensor | None]] = {}
    by_image: dict[str, list[Tensor]] = {}
    for place, (at, example) in enumerate(zip(indices, examples, strict=True)):
        row = dataset.rows[at]
        outputs, _ = run_processor(row.text, row.files, processor=dataset.processor)
        length = len(example.input_ids)
        if not torch.equal(outputs.pop("input_ids")[0, :length], example.input_ids):
            raise DataError(
                f"images {', '.join(map(str, row.files))}: changed since they were read"
            )
        for name in outputs.keys() - {"attention_mask", "offset_mapping"}:
            if name in dataset.axes:
                by_image.setdefault(name, []).append(outputs[name])
            else:
                values = by_token.setdefault(name, [None] * len(examples))
                values[place] = outputs[name][0, :length]
    if "mm_token_type_ids" in by_token:
        del micro["position_ids"]
    for name, values in by_token.items():
        micro[name] = scatter_tokens(values, micro, fill=0)
    for name, tensors in by_image.items():
        joined = concatenate_images(tensors, dataset.axes[name])
        micro[name] = joined.to(dtype) if joined.is_floating_point() else joined
    return micro
