"""Images of conversations: which files a row names, and opening them."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samestep.data.row_formats import messages_of
from samestep.data.rows import RowError
from samestep.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

Messages = list[dict[str, Any]]


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
    listed = list(values.get("images") or [])
    messages: Messages = []
    files: list[Path] = []
    for message in messages_of(values, "messages"):
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
            raise RowError(f"the content of a {message['role']} message is neither text nor parts")
        kept = []
        for part in parts:
            if part.get("type") == "image":
                files.append(_file(part, listed, folder))
                kept.append({"type": "image"})
            elif part.get("type") == "text" and isinstance(part.get("text"), str):
                kept.append({"type": "text", "text": part["text"]})
            else:
                raise RowError(f"a part must be text or an image, found type {part.get('type')!r}")
        messages.append({**message, "content": kept})
    if listed:
        raise RowError(f"images names {len(listed)} files more than there are image parts")
    return messages, files


def _file(part: Mapping[str, Any], listed: list[Any], folder: Path) -> Path:
    named = part.get("image") or part.get("path") or (listed.pop(0) if listed else None)
    if not isinstance(named, str):
        raise RowError("an image part names no file: give it image, or list the files in images")
    if "://" in named:
        raise RowError(f"image {named}: images come from files; download it first")
    return folder / Path(named).expanduser()


def open_image(file: Path) -> "Image":
    """An image in RGB, all of it read.

    Raises:
        RowError: The file is missing, or no image that can be read.
        ConfigError: Pillow is not installed.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise ConfigError("images need Pillow: pip install 'samestep[vision]'") from None
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise RowError(f"image {file}: no such file") from None
    except UnidentifiedImageError:
        raise RowError(f"image {file}: not an image of a known format") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RowError(f"image {file}: cannot be read ({error})") from None


def sha256_of_images(files: list[Path]) -> str:
    """One digest of the contents of several files, hexadecimal."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
