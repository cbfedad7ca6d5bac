"""Every trainable head of `transformers`, small, as a factory of trainers.

Classes are random and about a thousandth of their size: how a loss normalises does not depend on
the size.
"""

import functools
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers as hf
from torch import nn
from transformers.models.auto import modeling_auto as auto

from samestep.doctor.shrink import FIRST_WORD, VOCABULARY, parameters, small

_TABLES = {
    "causal LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked LM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "sequence classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "question answering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "vision-language": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}
LARGEST = 30_000_000
"""Weights of the largest model that is run."""

ROWS, CLASSES, END = 8, 3, 2


@functools.cache
def tasks() -> dict[str, tuple[str, ...]]:
    """The names of the classes of each task, each once, as the installed release has them."""
    found: dict[str, tuple[str, ...]] = {}
    for task, table in _TABLES.items():
        names: list[str] = []
        for entry in getattr(auto, table, {}).values():
            names += [entry] if isinstance(entry, str) else list(entry)
        found[task] = tuple(sorted(set(names)))
    return found


def classes_of(task: str) -> tuple[str, ...]:
    """The names of the classes of a task."""
    return tasks()[task]


def task_of(name: str) -> str:
    """The first task that a class belongs to.

    Raises:
        KeyError: It belongs to none.
    """
    for task, names in tasks().items():
        if name in names:
            return task
    raise KeyError(name)


def rows(task: str, *, image: int | None = None) -> list[dict[str, Any]]:
    """Random rows whose lengths, and whose numbers of targets, are ragged.

    Args:
        task: One of `tasks`.
        image: Side of a random picture in each row, if it is to have one.
    """
    draw = torch.Generator().manual_seed(0)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    def words(length: int) -> list[int]:
        drawn = torch.randint(FIRST_WORD, VOCABULARY, (length - 1,), generator=draw).tolist()
        return [*drawn, END]

    made = []
    for row in range(ROWS):
        ids = words(number(6, 24))
        targets = 2 + row % 4 + (row == 5) * number(3, 9)
        hidden = [-100] * max(1, len(ids) - targets)
        one: dict[str, Any] = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        if task == "seq2seq":
            one["labels"] = words(targets)
        elif task == "sequence classification":
            one["labels"] = row % CLASSES
        elif task == "token classification":
            one["labels"] = hidden + [number(0, CLASSES) for _ in ids[len(hidden) :]]
        elif task == "question answering":
            one["start_positions"] = number(0, len(ids))
            one["end_positions"] = number(one["start_positions"], len(ids))
        else:
            one["labels"] = hidden + ids[len(hidden) :]
        if image is not None:
            one["pixel_values"] = torch.randn(3, image, image, generator=draw)
        made.append(one)
    return made


def collate(features: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad on the right; labels with -100."""
    batch = {}
    for key in features[0]:
        values = [torch.as_tensor(feature[key]) for feature in features]
        fill = -100 if key == "labels" else 0
        batch[key] = (
            nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)
            if values[0].dim() == 1
            else torch.stack(values)
        )
    return batch


def _needs(name: str, config_class: type) -> dict[str, Any]:
    """Settings without which a head of this kind cannot be used."""
    needs: dict[str, Any] = {"num_labels": CLASSES} if "Classification" in name else {}
    known = config_class().to_dict()
    if name in classes_of("causal LM") and "is_decoder" in known:
        needs["is_decoder"] = True
    if "default_language" in known:
        needs["default_language"] = "en_XX"
    return needs


def build(name: str, fields: dict[str, Any] | None = None) -> nn.Module:
    """A small random model of a class.

    Args:
        name: Of a class of `transformers`.
        fields: Of the configuration to shrink; by default those of the class.

    Raises:
        ValueError: Even the small one is too large.
        Exception: Whatever the class raises.
    """
    model_class = getattr(hf, name)
    needs = _needs(name, model_class.config_class)
    config = small(model_class.config_class, fields=fields, **needs)
    with torch.device("meta"):
        size = parameters(model_class._from_config(config))
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} M parameters after shrinking")
    torch.manual_seed(0)
    model: nn.Module = model_class._from_config(config).float()
    return model


def head(
    name: str, *, image: bool = False, fields: dict[str, Any] | None = None
) -> Callable[..., hf.Trainer]:
    """A ``make_trainer`` of a class of `transformers`, of text alone or with a picture a row."""
    # One for all trainers: the auditor restores it before every run.
    model: Any = functools.cache(lambda: build(name, fields))

    def make_trainer(
        *, per_device_train_batch_size: int, gradient_accumulation_steps: int
    ) -> hf.Trainer:
        task = task_of(name)
        if task == "seq2seq" and not model().config.is_encoder_decoder:
            task = "causal LM"
        return hf.Trainer(
            model=model(),
            args=hf.TrainingArguments(
                output_dir=tempfile.gettempdir(),
                per_device_train_batch_size=per_device_train_batch_size,
                gradient_accumulation_steps=gradient_accumulation_steps,
                report_to="none",
                use_cpu=True,
            ),
            train_dataset=rows(task, image=_side(model().config) if image else None),
            data_collator=collate,
        )

    return make_trainer


def _side(config: Any) -> int:
    for part in (getattr(config, "vision_config", None), getattr(config, "encoder", None), config):
        side = getattr(part, "image_size", None)
        if isinstance(side, int):
            return side
    return 32
