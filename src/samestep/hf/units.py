"""Units: what a trainer's mean loss is a mean over, and counting it from a micro-batch alone."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto import modeling_auto as auto

from samestep.engine.targets import IGNORE
from samestep.errors import ConfigError, StepError

try:
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
except ImportError:  # of a release whose models hold their losses themselves
    LOSS_MAPPING, ForCausalLMLoss = {}, object()

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Unit:
    """What a mean is a mean over.

    Attributes:
        name: For messages.
        count: The number of units of a micro-batch, an integer tensor without dimensions.
        masks: Whether a label of -100 takes a row or token out of the mean.
        paired: Whether the first half of the rows belongs to the second.
        one_length: Whether the mean depends on how long its micro-batch is padded.
        empty_is_zero: Whether the trainer's own mean over no unit is 0, and not a NaN.
    """

    name: str
    count: Callable[[Batch], Tensor]
    masks: bool = False
    paired: bool = False
    one_length: bool = False
    empty_is_zero: bool = False


def row_tensors(batch: Batch) -> dict[str, Tensor]:
    """The tensors of a batch that have a row for each row of it, by name."""
    rows = num_rows(batch)
    return {
        name: value
        for name, value in batch.items()
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows
    }


def num_rows(batch: Batch) -> int:
    """The rows of a batch, by its tokens, its labels, or else its first tensor.

    Raises:
        StepError: There is no tensor in it.
    """
    first = [
        name for name in ("input_ids", "labels", *batch) if isinstance(batch.get(name), Tensor)
    ]
    for name in first:
        if batch[name].dim():
            return int(batch[name].shape[0])
    raise StepError(f"a micro-batch without any tensor: it has {', '.join(batch) or 'nothing'}")


def num_examples(batch: Batch, *, paired: bool) -> int:
    """The rows, or pairs, of a batch."""
    return num_pairs(batch) if paired else num_rows(batch)


def stacks_pairs(batch: Batch) -> bool:
    """Whether the chosen rows of a batch stand over the rejected; older TRL names each apart."""
    return "input_ids" in batch


def num_pairs(batch: Batch) -> int:
    """The pairs of a batch."""
    return num_rows(batch) // (2 if stacks_pairs(batch) else 1)


def _labels_of(batch: Batch) -> Tensor:
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        raise StepError(
            f"a micro-batch without labels (it has {', '.join(batch)}): its targets cannot be "
            "counted; give exact(trainer, unit=...) a function that counts what its loss averages"
        )
    return labels


def _count_labels(batch: Batch) -> Tensor:
    return (_labels_of(batch) != IGNORE).sum()


def _count_shifted(batch: Batch) -> Tensor:
    if isinstance(batch.get("shift_labels"), Tensor):
        shifted: Tensor = batch["shift_labels"]
        return (shifted != IGNORE).sum()
    return (_labels_of(batch)[..., 1:] != IGNORE).sum()


def _count_rows(batch: Batch) -> Tensor:
    return torch.tensor(num_rows(batch))


def _count_pairs(batch: Batch) -> Tensor:
    return torch.tensor(num_pairs(batch))


def _count_chosen(batch: Batch) -> Tensor:
    if not stacks_pairs(batch) or "completion_mask" not in batch:
        raise StepError(
            f"a micro-batch without input_ids and completion_mask (it has {', '.join(batch)}): the "
            "tokens of its chosen answers cannot be counted; take TRL 1.0 or later"
        )
    rows = num_pairs(batch)
    mask: Tensor = batch["completion_mask"]
    return (mask[:rows, 1:] != 0).sum()


def _inside(positions: Tensor, length: int) -> Tensor:
    return (positions.clamp(0, length) != length).sum()


def _count_answers(batch: Batch) -> Tensor:
    length = batch["input_ids"].shape[1]
    starts, ends = (_inside(batch[f"{name}_positions"], length) for name in ("start", "end"))
    if starts != ends:
        raise StepError(
            f"a micro-batch with {int(starts)} starts and {int(ends)} ends of answers inside it: "
            "the loss averages each by itself, so no count makes it exact; drop or shorten "
            "the rows whose answer is cut off by the maximum length"
        )
    return starts


SHIFTED = Unit("shifted-labels", _count_shifted, masks=True)
LABELS = Unit("labels", _count_labels, masks=True)
ROWS = Unit("rows", _count_rows)
PAIRS = Unit("pairs", _count_pairs, paired=True)
CHOSEN = Unit("chosen-tokens", _count_chosen, paired=True)
ANSWERS = Unit("answers", _count_answers, one_length=True)
SFT = Unit("shifted-labels", _count_shifted, masks=True, empty_is_zero=True)

NAMED = {unit.name: unit for unit in (SHIFTED, LABELS, ROWS, PAIRS)}
"""The units that a user can name, and those that are tried where the loss is unknown."""

_ONE_LABEL_A_ROW = (
    auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES,
    auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    auto.MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES,
)
_BY_LABEL = (
    auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)


def library_classes(trainer: Any) -> list[str]:
    """The names of the classes of TRL that a trainer derives from, nearest first."""
    return [kind.__name__ for kind in type(trainer).__mro__ if _package(kind) == "trl"]


def own_methods(trainer: Any, *names: str) -> list[tuple[type, str]]:
    """Those of these methods that the user's own classes override, with the class."""
    kinds = [kind for kind in type(trainer).__mro__ if _package(kind) not in _LIBRARIES]
    return [(kind, name) for kind in kinds for name in names if name in vars(kind)]


_LIBRARIES = ("transformers", "trl", "samestep", "builtins", "accelerate", "typing")


def _package(kind: type) -> str:
    return kind.__module__.split(".")[0]


def base_model(trainer: Any) -> Any:
    """A trainer's model without the wrappers of accelerate and PEFT."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def unit_named(unit: str | Callable[[Batch], Any]) -> Unit:
    """The unit that a user asks for by name or by a function that counts.

    Raises:
        ConfigError: There is no unit of that name.
    """
    if not isinstance(unit, str):
        return Unit("given", lambda batch: torch.as_tensor(unit(batch)))
    if unit not in NAMED:
        raise ConfigError(f"unit={unit!r}: one of {', '.join(NAMED)}, or a function that counts")
    return NAMED[unit]


def known_unit(trainer: Any) -> Unit | None:
    """The unit of a loss that is the library's own; None if it has to be found from its values."""
    if own_methods(trainer, "compute_loss") or getattr(trainer, "compute_loss_func", None):
        return None
    names = library_classes(trainer)
    if "SFTTrainer" in names:
        return SFT
    if "RewardTrainer" in names:
        return PAIRS
    if "DPOTrainer" in names:
        return CHOSEN if list(trainer.args.loss_type) == ["sft"] else PAIRS
    return _unit_of_model(base_model(trainer), smoothed=trainer.label_smoother is not None)


def _unit_of_model(model: Any, *, smoothed: bool) -> Unit | None:
    kind = type(model)
    if _package(kind) != "transformers":
        return None
    name = kind.__name__
    if _holds((auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,), name) and smoothed:
        return SHIFTED
    encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
    shifts = _mapped_loss(model) is ForCausalLMLoss
    if shifts and not smoothed and not encoder_decoder and _calls_mapped_loss(kind):
        return SHIFTED
    if _holds(_BY_LABEL, name):
        return LABELS
    if _holds(_ONE_LABEL_A_ROW, name):
        classes = model.config.num_labels > 1 or "MultipleChoice" in name
        single = model.config.problem_type in (None, "single_label_classification")
        return _row_unit(classes and single)
    if _holds((auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,), name):
        return ANSWERS
    return None


def _mapped_loss(model: Any) -> Any:
    """The function that a model's type of loss is mapped to; some releases do not tell the type."""
    if hasattr(model, "loss_type"):
        return LOSS_MAPPING.get(model.loss_type)
    return getattr(model, "loss_function", None)


def _row_unit(has_classes: bool) -> Unit:
    """Rows; where each has a class, only those whose class is not -100."""

    def count(batch: Batch) -> Tensor:
        labels = batch.get("labels")
        classes = isinstance(labels, Tensor) and not labels.is_floating_point()
        return _count_labels(batch) if has_classes and classes else _count_rows(batch)

    return Unit("rows", count, masks=has_classes)


def _holds(mappings: tuple[Mapping[str, Any], ...], name: str) -> bool:
    """Whether a class stands in one of the tables of transformers."""
    held = [entry for mapping in mappings for entry in mapping.values()]
    return any(name == entry or (isinstance(entry, tuple) and name in entry) for entry in held)


def _calls_mapped_loss(kind: type) -> bool:
    """Whether a model's forward computes its loss by the function that its type is mapped to."""
    try:
        return "self.loss_function(" in inspect.getsource(inspect.unwrap(kind.forward))  # type: ignore[attr-defined]
    except OSError:
        return False
