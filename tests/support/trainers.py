"""Tiny trainers of `transformers`, sound and wrong, as factories for the auditor."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

V = 61

SHAPE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def rows(number: int = 10, *, seed: int = 0, classes: int | None = None) -> list[dict[str, Any]]:
    """Ragged rows: every token is a target, or each row has a class."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for row in range(number):
        length = int(torch.randint(3, 24, (), generator=draw))
        ids = torch.randint(2, V, (length,), generator=draw).tolist()
        labels = ids if classes is None else row % classes
        made.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels})
    return made


def collate(features: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad on the right."""

    def padded(key: str, value: int) -> torch.Tensor:
        held = [torch.tensor(feature[key]) for feature in features]
        return nn.utils.rnn.pad_sequence(held, batch_first=True, padding_value=value)

    scalar = isinstance(features[0]["labels"], int)
    labels = torch.tensor([feature["labels"] for feature in features]) if scalar else None
    return {
        "input_ids": padded("input_ids", 0),
        "attention_mask": padded("attention_mask", 0),
        "labels": padded("labels", -100) if labels is None else labels,
    }


def causal() -> nn.Module:
    """A two-layer Llama."""
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def classifier() -> nn.Module:
    """The same with three classes."""
    return LlamaForSequenceClassification(LlamaConfig(num_labels=3, **SHAPE))


def factory(
    *,
    model: Callable[[], nn.Module] = causal,
    data: Any = None,
    kind: type[Trainer] = Trainer,
    collator: Callable[..., Any] = collate,
    arguments: Mapping[str, Any] | None = None,
    **options: Any,
) -> Callable[..., Trainer]:
    """A ``make_trainer`` of these parts."""

    def make_trainer(
        *, per_device_train_batch_size: int, gradient_accumulation_steps: int, **kw: Any
    ) -> Trainer:
        return kind(
            model=model(),
            args=TrainingArguments(
                output_dir=str(kw.get("output_dir", "unused")),
                per_device_train_batch_size=per_device_train_batch_size,
                gradient_accumulation_steps=gradient_accumulation_steps,
                report_to="none",
                **{"use_cpu": True, **(arguments or {})},
            ),
            train_dataset=Dataset.from_list(rows()) if data is None else data,
            data_collator=collator,
            **options,
        )

    return make_trainer
