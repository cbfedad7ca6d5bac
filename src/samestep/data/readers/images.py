"""Images of conversations: which files a row names, opening them, and running a processor.

A processor of transformers puts as many image tokens in the place of an image as the model makes of
it. It always sees one row by itself: what it makes of an image cannot depend on the neighbours.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from samestep.data.messages import Messages, read_messages
from samestep.data.row_texts import shortened
from samestep.data.rows import RowError
from samestep.data.target_spans import Span
from samestep.utils.extras import MissingExtraError, missing_text
from samestep.utils.files import open_regular, user_path

if TYPE_CHECKING:
    from PIL.Image import Image


_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What is decoded, whatever a file is called. Pillow knows more, some by running other programs on
the content (EPS: Ghostscript)."""


def image_messages(values: Mapping[str, Any], folder: Path) -> tuple[Messages, list[Path]]:
    """The messages of a row with bare image parts, and the files that belong to them in order.

    Args:
        values: ``messages``; a content is text, or parts ``{"type": "text", "text": ...}`` and
            ``{"type": "image", "image": file}``. Image parts without a file take those of the
            column ``images``, one after another.
        folder: Where relative files are looked for.

    Returns:
        Messages whose contents are lists of parts, as templates of such models take them.

    Raises:
        RowError: The messages or their images are not such.
    """
    if values.get("messages") is None:
        raise RowError("it has no messages, which rows with images need")
    named = values.get("images")
    if named is not None and not isinstance(named, list):
        raise RowError(f"images must be a list of files, found {shortened(named)}")
    listed = list(named or [])
    messages: Messages = []
    files: list[Path] = []
    for message in read_messages(values, "messages"):
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
            raise RowError(f"the content of a {message['role']} message is neither text nor parts")
        kept = []
        for part in parts:
            if part.get("type") == "image":
                files.append(_image_file(part, listed, folder=folder))
                kept.append({"type": "image"})
            elif part.get("type") == "text" and isinstance(part.get("text"), str):
                kept.append({"type": "text", "text": part["text"]})
            else:
                raise RowError(f"a part must be text or an image, found type {part.get('type')!r}")
        messages.append({**message, "content": kept})
    if listed:
        raise RowError(f"images names {len(listed)} files more than there are image parts")
    return messages, files


def _image_file(part: Mapping[str, Any], listed: list[Any], *, folder: Path) -> Path:
    name = part.get("image") or part.get("path") or (listed.pop(0) if listed else None)
    if not isinstance(name, str):
        raise RowError("an image part names no file: give it image, or list the files in images")
    if "://" in name:
        raise RowError(f"image {name}: images come from files; download it first")
    return folder / user_path(name)


def _open_image(file: Path) -> "Image":
    """An image in RGB, all of it read.

    Raises:
        RowError: The file is missing, or no image that can be read.
        MissingExtraError: Pillow is not installed.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise MissingExtraError(missing_text("vision", ["Pillow"], what="an image")) from None
    try:
        with open_regular(file) as content, Image.open(content, formats=_FORMATS) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise RowError(f"image {file}: no such file") from None
    except UnidentifiedImageError:
        known = ", ".join(_FORMATS)
        raise RowError(f"image {file}: none of the formats that are read ({known})") from None
    except MemoryError:
        raise RowError(f"image {file}: cannot be read (it does not fit into memory)") from None
    except Exception as error:  # decoders of damaged files raise whatever they trip over
        raise RowError(f"image {file}: cannot be read ({error})") from None


def sha256_of_images(files: Sequence[Path]) -> str:
    """One digest of several files.

    Args:
        files: The files, in order.

    Returns:
        SHA-256 of the digests of their contents, hexadecimal.
    """
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


@dataclass(frozen=True)
class Replacement:
    """A part of a text that a processor replaced by the tokens of an image.

    Attributes:
        span: The part, in characters of the text.
        new_span: What stands there instead, in characters of the text with all images' tokens.
        growth: How many characters longer it is.
    """

    span: Span
    new_span: Span
    growth: int


def run_processor(
    text: str, files: Sequence[Path], *, processor: Any
) -> tuple[dict[str, Tensor], list[Replacement]]:
    """What a processor makes of one row.

    Args:
        text: The rendered conversation, with one image token in the place of each image.
        files: The images in the order of the text.
        processor: A processor of transformers, with a fast tokenizer.

    Returns:
        Its tensors by name [1, ...], among them ``input_ids`` [1, length] and ``offset_mapping``
        [1, length, 2]; and which parts of the text it replaced.

    Raises:
        RowError: An image cannot be read.
        MissingExtraError: Pillow is not installed.
    """
    settings = {"return_tensors": "pt", "add_special_tokens": False, "return_offsets_mapping": True}
    if not files:  # some processors insist on an image
        return dict(processor.tokenizer([text], **settings)), []
    images = [_open_image(file) for file in files]
    outputs = dict(
        processor(text=[text], images=images, return_text_replacement_offsets=True, **settings)
    )
    replacements = [
        Replacement(
            span=tuple(part["span"]),
            new_span=tuple(part["new_span"]),
            growth=len(part["replacement"]) - len(part["text"]),
        )
        for part in outputs.pop("text_replacement_offsets")[0]
    ]
    return outputs, replacements


def shift_span(span: Span, replacements: Sequence[Replacement]) -> Span:
    """Where a span of a text stands after the images' tokens were put in.

    Args:
        span: In characters of the text.
        replacements: Of `run_processor`.

    Returns:
        In characters of the text with all images' tokens.
    """

    def shifted(at: int) -> int:
        return at + sum(part.growth for part in replacements if part.span[1] <= at)

    return shifted(span[0]), shifted(span[1])


def image_axes(processor: Any) -> dict[str, int]:
    """Along which axis images follow one another, in each tensor that a processor makes of them.

    Each family has a shape of its own; so the processor is run on an image once and twice.

    Args:
        processor: A processor of transformers.

    Returns:
        The axis by the tensor's name; tensors of tokens are not among them.
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


def concatenate_images(tensors: Sequence[Tensor], axis: int) -> Tensor:
    """Tensors one after another along an axis, filled up with zeros along the others.

    Args:
        tensors: Of the same number of axes.
        axis: Along which they follow one another.

    Returns:
        A tensor that is along the other axes as large as the largest of them.
    """
    shape = torch.tensor([tensor.shape for tensor in tensors]).max(0).values.tolist()
    filled = []
    for tensor in tensors:
        size = [*shape]
        size[axis] = tensor.shape[axis]
        out = tensor.new_zeros(size)
        out[tuple(slice(0, length) for length in tensor.shape)] = tensor
        filled.append(out)
    return torch.cat(filled, dim=axis)
