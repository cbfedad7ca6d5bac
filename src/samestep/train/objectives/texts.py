"""Embeddings, masked language models, and encoders with decoders."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from samestep.train.config import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor

    from samestep.data.collate import Padding
    from samestep.data.records import Records
    from samestep.engine.terms import Objective


class EmbeddingConfig(TrainConfig):
    """Sentence embeddings by contrast: the whole effective batch are the negatives."""

    auto_class: ClassVar[str] = "AutoModel"
    task: ClassVar[str] = "FEATURE_EXTRACTION"
    objective: Literal["embedding"] = "embedding"
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""
    pooling: Literal["mean", "last", "first"] = "mean"
    """A sequence's vector: the mean of its tokens' states, its last token's or its first's."""
    temperature: float = Field(default=0.05, gt=0)
    """Cosines are divided by this."""
    symmetric: bool = False
    """Positives look for their anchors too."""

    def read(self, source: str, tokenizer: Any, like: "Records | None" = None) -> "Records":
        """Rows of anchor and positive, and negative if the first row has one."""
        from samestep.data.load import load_rows
        from samestep.data.readers.texts import text_records

        rows = load_rows(source)
        columns = ["anchor", "positive"]
        if like.width == 3 if like else rows[0].values.get("negative") is not None:
            columns.append("negative")
        return text_records(rows, tokenizer, columns=columns, max_length=self.max_length)

    def outputs(self, model: Any, micro: dict[str, Any]) -> "Tensor":
        """The vector of each sequence."""
        from samestep.models.outputs import sequence_embeddings

        return sequence_embeddings(model, micro, pooling=self.pooling)

    def build(self, model: Any, data: Sequence["Records"]) -> "Objective":
        """The coupled loss."""
        from samestep.engine.terms import Objective
        from samestep.engine.two_pass import TwoPass
        from samestep.objectives.embedding import Embedding
        from samestep.objectives.units import EXAMPLE_COUNTERS

        loss = Embedding(
            width=data[0].width,
            pooling=self.pooling,
            scale=1 / self.temperature,
            symmetric=self.symmetric,
        )
        return Objective(TwoPass(loss), EXAMPLE_COUNTERS)


class MaskedLMConfig(TrainConfig):
    """Masked language modelling (arXiv:1810.04805)."""

    auto_class: ClassVar[str] = "AutoModelForMaskedLM"
    task: ClassVar[str] = "FEATURE_EXTRACTION"
    objective: Literal["masked_lm"] = "masked_lm"
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""
    mask_share: float = Field(default=0.15, gt=0, lt=1)
    """Share of the tokens that are masked, drawn anew in every step."""

    def read(self, source: str, tokenizer: Any, like: "Records | None" = None) -> "Records":
        """Rows of text."""
        from samestep.data.load import load_rows
        from samestep.data.readers.texts import mask_settings, text_records

        settings = mask_settings(tokenizer)
        records = text_records(
            load_rows(source), tokenizer, columns=["text"], max_length=self.max_length
        )
        records.meta.update(settings)
        return records

    def collate(
        self,
        data: "Records",
        indices: Sequence[int],
        *,
        padding: "Padding",
        pad_id: int,
        key: tuple[int, int],
    ) -> dict[str, Any]:
        """A micro-batch with masks that belong to the examples."""
        from samestep.data.readers.texts import collate_masked

        return collate_masked(
            data, indices, share=self.mask_share, padding=padding, pad_id=pad_id, key=key
        )

    def build(self, model: Any, data: Sequence["Records"]) -> "Objective":
        """Cross entropy by masked token."""
        from samestep.engine.terms import Objective
        from samestep.objectives.language import MaskedLM
        from samestep.objectives.units import LABELLED_TOKEN_COUNTERS

        return Objective(MaskedLM(), LABELLED_TOKEN_COUNTERS)


class Seq2SeqConfig(TrainConfig):
    """Fine-tune a model with an encoder and a decoder."""

    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    task: ClassVar[str] = "SEQ_2_SEQ_LM"
    objective: Literal["seq2seq"] = "seq2seq"
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target probability that is spread over the vocabulary."""

    def read(self, source: str, tokenizer: Any, like: "Records | None" = None) -> "Records":
        """Rows of prompt (read by the encoder) and completion (written by the decoder)."""
        from samestep.data.load import load_rows
        from samestep.data.readers.texts import text_records

        columns = ["prompt", "completion"]
        return text_records(
            load_rows(source),
            tokenizer,
            columns=columns,
            max_length=self.max_length,
            of_target=["completion"],
        )

    def load(self, source: str, data: Sequence["Records"]) -> Any:
        """The model without dropout: its masks could not be tied to the examples."""
        return self.load_with(source, dropout_rate=0.0, dropout=0.0, activation_dropout=0.0)

    def collate(
        self,
        data: "Records",
        indices: Sequence[int],
        *,
        padding: "Padding",
        pad_id: int,
        key: tuple[int, int],
    ) -> dict[str, Any]:
        """Prompts padded for the encoder; completions padded as the decoder's targets."""
        from samestep.data.readers.texts import collate_seq2seq

        return collate_seq2seq([data[at] for at in indices], pad_id=pad_id)

    def outputs(self, model: Any, micro: dict[str, Any]) -> "Tensor":
        """The encoder's states."""
        inputs = {name: micro[name] for name in ("input_ids", "attention_mask") if name in micro}
        states: Tensor = model.get_encoder()(**inputs).last_hidden_state
        return states

    def problems(self) -> list[str]:
        """The layout is given by the encoder."""
        if self.padding in ("none", "left"):
            return [f"padding: seq2seq pads to the right, not {self.padding!r}"]
        return []

    def build(self, model: Any, data: Sequence["Records"]) -> "Objective":
        """Cross entropy by token of the decoder."""
        from samestep.engine.terms import Objective
        from samestep.objectives.language import SEQ2SEQ_COUNTERS, Seq2Seq

        return Objective(Seq2Seq(self.label_smoothing), SEQ2SEQ_COUNTERS)
