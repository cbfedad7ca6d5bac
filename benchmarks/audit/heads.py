"""Every trainable head of `transformers`, small, as a factory of trainers.

samestep check benchmarks/audit/heads.py:LlamaForCausalLM
"""

import functools
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers as hf
from shrink import FIRST_WORD, VOCABULARY, parameters, small
from torch import nn
from transformers.models.auto import modeling_auto as auto

TASKS: dict[str, Any] = {
    "causal LM": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked LM": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "sequence classification": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "token classification": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "question answering": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "vision-language": auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
LARGEST = 30_000_000
"""Weights of the largest model that is run."""

ROWS, CLASSES, END = 8, 3, 2


def classes_of(task: str) -> list[str]:
    """The names of the classes of a task, each once."""
    found: list[str] = []
    for names in TASKS[task].values():
        found += [names] if isinstance(names, str) else list(names)
    return sorted(set(found))


def task_of(name: str) -> str:
    """The first task that a class belongs to."""
    return next(task for task in TASKS if name in classes_of(task))


def rows(task: str, *, image: int | None = None) -> list[dict[str, Any]]:
    """Random rows whose lengths, and whose numbers of targets, are ragged.

    Args:
        task: One of `TASKS`.
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


def build(name: str) -> nn.Module:
    """A small random model of a class.

    Raises:
        ValueError: Even the small one is too large.
        Exception: Whatever the class raises.
    """
    model_class = getattr(hf, name)
    config = small(model_class.config_class, **_needs(name, model_class.config_class))
    with torch.device("meta"):
        size = parameters(model_class._from_config(config))
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} M parameters after shrinking")
    torch.manual_seed(0)
    return model_class._from_config(config, dtype=torch.float32)


def head(name: str, *, image: bool = False) -> Callable[..., hf.Trainer]:
    """A ``make_trainer`` of a class of `transformers`, of text alone or with a picture a row."""
    folder = tempfile.gettempdir()
    model = functools.cache(lambda: build(name))  # the auditor restores it before every run

    def make_trainer(
        *, per_device_train_batch_size: int, gradient_accumulation_steps: int
    ) -> hf.Trainer:
        task = task_of(name)
        if task == "seq2seq" and not model().config.is_encoder_decoder:
            task = "causal LM"
        return hf.Trainer(
            model=model(),
            args=hf.TrainingArguments(
                output_dir=folder,
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


def __getattr__(name: str) -> Callable[..., hf.Trainer]:
    if any(name in classes_of(task) for task in TASKS):
        return head(name)
    raise AttributeError(name)
