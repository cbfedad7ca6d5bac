"""Language models: next tokens, images with texts, masked tokens, encoder-decoders, a teacher."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor

from samestep.data.collate import Padding
from samestep.data.describe import with_report
from samestep.data.load import load_rows
from samestep.data.readers.prompts import ROWS, prompt_records
from samestep.data.readers.rollouts import teacher_topk_records
from samestep.data.readers.texts import collate_masked, collate_seq2seq, mask_settings, text_records
from samestep.data.readers.vision import collate_image_records, image_records
from samestep.data.records import Records
from samestep.data.row_formats import common_format
from samestep.data.rows import Row
from samestep.data.splitting import split_texts
from samestep.data.tokenize import tokenize_rows
from samestep.engine.terms import LossFn, Objective, constant
from samestep.engine.two_pass import TwoPass
from samestep.errors import ConfigError
from samestep.models.load import load_processor
from samestep.models.lora import num_embeddings
from samestep.models.routers import router_biases, routers
from samestep.objectives.distillation import Distillation, TopKDistillation
from samestep.objectives.language import DFT, SEQ2SEQ_COUNTERS, CausalLMLoss, MaskedLM, Seq2Seq
from samestep.objectives.routers import RouterBias, RouterLosses
from samestep.objectives.units import LABELLED_TOKEN_COUNTERS
from samestep.train.precision import weight_dtype
from samestep.train.recipes.base import Recipe, load_frozen, token_cache
from samestep.train.rollouts import RolloutMaker
from samestep.train.settings.base import TrainSettings
from samestep.train.settings.language import (
    CausalLMSettings,
    LongText,
    MaskedLMSettings,
    Seq2SeqSettings,
    VisionLanguageSettings,
)
from samestep.train.settings.objectives import DistillationSettings
from samestep.utils.files import user_path
from samestep.utils.sources import Source

_TARGET_COLUMNS = ("top_ids", "top_logps")
"""What a teacher said of the targets, beside the columns of causal_lm."""


def read_language(
    settings: TrainSettings,
    source: Source,
    tokenizer: Any,
    *,
    train_on: Literal["completion", "all"] = "completion",
    long_text: LongText = "cut",
) -> Records:
    """Rows of text, prompt and completion, messages, or token ids.

    Args:
        settings: ``max_length``, ``append_eos``.
        source: A value of ``data`` or ``eval_data``.
        tokenizer: The model's tokenizer.
        train_on: Targets: completions and assistant turns, or every token.
        long_text: What becomes of rows of more than ``max_length`` tokens.

    Returns:
        The records.

    Raises:
        DataError: The rows cannot be used.
    """
    rows = load_rows(source, row_format=settings.row_format, columns=settings.columns)
    if long_text == "split":
        assert settings.max_length is not None
        rows = split_texts(
            rows,
            tokenizer,
            max_length=settings.max_length,
            append_eos=settings.append_eos,
            cache=token_cache(settings),
        )
    return _language_records(
        settings, rows, tokenizer, train_on=train_on, drop_long=long_text == "drop"
    )


def _language_records(
    settings: TrainSettings,
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    train_on: Literal["completion", "all"],
    used: Sequence[str] = (),
    drop_long: bool = False,
) -> Records:
    records = Records(
        tokenize_rows(
            rows,
            tokenizer,
            max_length=settings.max_length,
            append_eos=settings.append_eos,
            train_on=train_on,
            cache=token_cache(settings),
            weigh_tokens=True,
            drop_long=drop_long,
        )
    )
    row_format = common_format(rows)
    return with_report(
        records,
        rows,
        tokenizer,
        format=row_format.name,
        used=(*row_format.columns, *row_format.optional, *used),
        append_eos=settings.append_eos and row_format.closed,
    )


class CausalLMRecipe(Recipe):
    """Cross entropy of next tokens."""

    settings: CausalLMSettings

    def read(self, source: Source, tokenizer: Any, training: Records | None = None) -> Records:
        """Rows of text, prompt and completion, messages, or token ids."""
        settings = self.settings
        return read_language(
            settings, source, tokenizer, train_on=settings.train_on, long_text=settings.long_text
        )

    def build(self, model: Any, data: Sequence[Records]) -> Objective:
        """Cross entropy, normalised as the settings say, and what they say of the routers."""
        settings = self.settings
        value = settings.normalize
        normalize = constant(value) if isinstance(value, float) else value
        loss: LossFn = CausalLMLoss(
            normalize=normalize, label_smoothing=settings.label_smoothing, z_loss=settings.z_loss
        )
        if settings.loss == "dft":
            loss = DFT(normalize)
        if settings.router_loss or settings.router_z_loss or settings.router_bias_rate:
            return self._with_routers(loss, model)
        return Objective(loss)

    def _with_routers(self, loss: LossFn, model: Any) -> Objective:
        settings = self.settings
        if not routers(model):
            raise ConfigError(f"router settings: {type(model).__name__} has no routers")
        if settings.router_bias_rate and len(router_biases(model)) < len(routers(model)):
            raise ConfigError(
                f"router_bias_rate: the routers of {type(model).__name__} have no bias to move; "
                "use router_loss"
            )
        bias = RouterBias(settings.router_bias_rate) if settings.router_bias_rate else None
        both = RouterLosses(
            loss,
            settings.router_loss,
            balance_weight=settings.router_loss_weight,
            z_weight=settings.router_z_loss,
            bias=bias,
        )
        return Objective(
            TwoPass(both) if settings.router_loss == "window" else both,
            both.counters,
            after_step=None if bias is None else bias.after_step,
        )


class VisionLanguageRecipe(CausalLMRecipe):
    """Cross entropy of next tokens in conversations with images."""

    settings: VisionLanguageSettings
    auto_class: ClassVar[str] = "AutoModelForImageTextToText"

    def load_tokenizer(self, source: str) -> Any:
        """The model's processor."""
        return load_processor(source, trust_remote_code=self.settings.trust_remote_code)

    def pad_id(self, tokenizer: Any) -> int:
        """The pad token of the processor's tokenizer."""
        return tokenizer.tokenizer.pad_token_id or 0

    def read(self, source: Source, tokenizer: Any, training: Records | None = None) -> Records:
        """Rows of messages with images, whose files lie beside the rows."""
        path = user_path(self.one_source(source))
        rows = self.load_rows(source)
        records = image_records(
            rows,
            tokenizer,
            folder=path if path.is_dir() else path.parent,
            max_length=self.settings.max_length,
            train_on=self.settings.train_on,
        )
        used = ("messages", "images", "tools")
        return with_report(records, rows, tokenizer, format="messages with images", used=used)

    def collate(
        self,
        data: Records,
        indices: Sequence[int],
        *,
        padding: Padding,
        pad_id: int,
        key: tuple[int, int],
    ) -> dict[str, Any]:
        """Tokens side by side, and the images of all of them."""
        dtype = weight_dtype(self.settings)  # of pixels; autocast and FSDP2 cast them
        return collate_image_records(data, indices, padding=padding, pad_id=pad_id, dtype=dtype)


class MaskedLMRecipe(Recipe):
    """Cross entropy of masked tokens."""

    settings: MaskedLMSettings
    auto_class: ClassVar[str] = "AutoModelForMaskedLM"
    peft_task: ClassVar[str] = "FEATURE_EXTRACTION"

    def read(self, source: Source, tokenizer: Any, training: Records | None = None) -> Records:
        """Rows of text."""
        meta = mask_settings(tokenizer)
        rows = self.load_rows(source)
        records = text_records(
            rows, tokenizer, columns=["text"], max_length=self.settings.max_length
        )
        records.meta.update(meta)
        return with_report(records, rows, tokenizer, format="text", used=["text"])

    def collate(
        self,
        data: Records,
        indices: Sequence[int],
        *,
        padding: Padding,
        pad_id: int,
        key: tuple[int, int],
    ) -> dict[str, Any]:
        """A micro-batch with masks that belong to the examples."""
        share = self.settings.mask_share
        return collate_masked(data, indices, share=share, padding=padding, pad_id=pad_id, key=key)

    def build(self, model: Any, data: Sequence[Records]) -> Objective:
        """Cross entropy by masked token."""
        return Objective(MaskedLM(), LABELLED_TOKEN_COUNTERS)


class Seq2SeqRecipe(Recipe):
    """Cross entropy of what a decoder writes about what an encoder has read."""

    settings: Seq2SeqSettings
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    peft_task: ClassVar[str] = "SEQ_2_SEQ_LM"

    def read(self, source: Source, tokenizer: Any, training: Records | None = None) -> Records:
        """Rows of prompt (read by the encoder) and completion (written by the decoder)."""
        rows, columns = self.load_rows(source), ["prompt", "completion"]
        records = text_records(
            rows,
            tokenizer,
            columns=columns,
            max_length=self.settings.max_length,
            of_target=["completion"],
        )
        return with_report(records, rows, tokenizer, format="prompt and completion", used=columns)

    def load_model(self, source: str, data: Sequence[Records]) -> Any:
        """The model without dropout: its masks could not be tied to the examples."""
        return self.load_with(source, dropout_rate=0.0, dropout=0.0, activation_dropout=0.0)

    def collate(
        self,
        data: Records,
        indices: Sequence[int],
        *,
        padding: Padding,
        pad_id: int,
        key: tuple[int, int],
    ) -> dict[str, Any]:
        """Prompts padded for the encoder; completions padded as the decoder's targets."""
        return collate_seq2seq([data[at] for at in indices], pad_id=pad_id)

    def outputs(self, model: Any, micro: dict[str, Any]) -> Tensor:
        """The encoder's states."""
        inputs = {name: micro[name] for name in ("input_ids", "attention_mask") if name in micro}
        states: Tensor = model.get_encoder()(**inputs).last_hidden_state
        return states

    def build(self, model: Any, data: Sequence[Records]) -> Objective:
        """Cross entropy by token of the decoder."""
        return Objective(Seq2Seq(self.settings.label_smoothing), SEQ2SEQ_COUNTERS)


class DistillationRecipe(Recipe):
    """The divergence from a teacher, a model or its likeliest tokens kept in the rows."""

    settings: DistillationSettings

    def read(self, source: Source, tokenizer: Any, training: Records | None = None) -> Records:
        """Rows as of causal_lm; without a teacher with its top-k log-probabilities; or prompts."""
        settings = self.settings
        rows, in_rows = self.load_rows(source), settings.teacher is None
        if settings.on_policy and training is None:
            records = prompt_records(rows, tokenizer, columns=False)
            read = ("prompt", "tools")
            return with_report(records, rows, tokenizer, format="prompts", used=read)
        used = _TARGET_COLUMNS if in_rows else ()
        records = _language_records(
            settings, rows, tokenizer, train_on=settings.train_on, used=used
        )
        if not in_rows:
            return records
        report = records.report
        records = teacher_topk_records(rows, records.sequences, max_length=settings.max_length)
        records.report = report
        return records

    def rollouts(self, model: Any, tokenizer: Any, data: Records) -> RolloutMaker | None:
        """What writes the completions; what is evaluated has its own."""
        if ROWS not in data.meta:
            return None
        return RolloutMaker(self.settings, model, tokenizer=tokenizer, prompts=data)

    def build(self, model: Any, data: Sequence[Records]) -> Objective:
        """The divergence from the teacher."""
        if self.settings.teacher is None:
            return self._from_rows(model, data)
        return self._from_teacher(model, self.settings.teacher)

    def _from_rows(self, model: Any, data: Sequence[Records]) -> Objective:
        settings = self.settings
        own = num_embeddings(model)
        highest = max(int(records.token_fields["top_ids"].max()) for records in data)
        if highest >= own:
            raise ConfigError(
                f"top_ids: the teacher names token {highest}, but the model has {own} embeddings: "
                "they must share a vocabulary"
            )
        return Objective(
            TopKDistillation(
                settings.divergence, nll_weight=settings.nll_weight, normalize=settings.normalize
            )
        )

    def _from_teacher(self, model: Any, source: str) -> Objective:
        settings = self.settings
        trust, dtype = settings.trust_remote_code, weight_dtype(settings, trains=False)
        return Objective(
            Distillation(
                load_frozen(source, model, field="teacher", trust_remote_code=trust, dtype=dtype),
                kind=settings.divergence,
                temperature=settings.temperature,
                nll_weight=settings.nll_weight,
                normalize=settings.normalize,
            )
        )
