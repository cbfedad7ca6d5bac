"""Next-token cross entropy of conversations with images."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from samestep.train.objectives.causal_lm import CausalLMConfig

if TYPE_CHECKING:
    from samestep.data.collate import Padding
    from samestep.data.records import Records


class VisionLanguageConfig(CausalLMConfig):
    """Fine-tune a model of images and text on conversations; image tokens are never targets."""

    objective: Literal["vision_language"] = "vision_language"  # type: ignore[assignment]
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""
    padding: Literal["right", "left"] = "right"
    """How micro-batches are laid out. Changes speed and memory, not the step."""

    auto_class: ClassVar[str] = "AutoModelForImageTextToText"

    def load_tokenizer(self, source: str) -> Any:
        """The model's processor."""
        from samestep.models.load import load_processor

        return load_processor(source, trust_remote_code=self.trust_remote_code)

    def pad_id(self, tokenizer: Any) -> int:
        """The pad token of the processor's tokenizer."""
        return tokenizer.tokenizer.pad_token_id or 0

    def read(self, source: str, tokenizer: Any, like: "Records | None" = None) -> "Records":
        """Rows of messages with images, whose files lie beside the rows."""
        from samestep.data.load import load_rows
        from samestep.data.readers.vision import image_records

        path = Path(source).expanduser()
        return image_records(
            load_rows(source),
            tokenizer,
            folder=path if path.is_dir() else path.parent,
            max_length=self.max_length,
            train_on=self.train_on,
        )

    def collate(
        self,
        data: "Records",
        indices: Sequence[int],
        *,
        padding: "Padding",
        pad_id: int,
        key: tuple[int, int],
    ) -> dict[str, Any]:
        """Tokens side by side, and the images of all of them."""
        import torch

        from samestep.data.readers.vision import collate_image_records

        dtype = getattr(torch, self.dtype)
        return collate_image_records(data, indices, padding=padding, pad_id=pad_id, dtype=dtype)
