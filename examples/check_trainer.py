"""A subject for `samestep check`: transformers.Trainer on a sequence classifier.

    samestep check examples/check_trainer.py

The auditor calls `make_trainer` with the two sizes that a batch is cut by, trains one step on the
first rows of the trainer's own data, and compares the gradients. Any trainer derived from
transformers.Trainer will do, TRL's among them: build yours here, from a small configuration.
"""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, Trainer, TrainingArguments

VOCABULARY, CLASSES = 50, 3

# Rows of 3 to 22 tokens: equal lengths hide most bugs.
ROWS = [
    {"input_ids": [(7 * row + spot) % VOCABULARY for spot in range(3 + 5 * row % 20)], "label": row}
    for row in range(12)
]


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad on the right; the class is the row modulo the number of classes."""
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    ones = [torch.ones_like(one) for one in ids]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad(ones, batch_first=True),
        "labels": torch.tensor([row["label"] % CLASSES for row in rows]),
    }


def make_trainer(
    *, per_device_train_batch_size: int, gradient_accumulation_steps: int, **kw: Any
) -> Trainer:
    """A trainer as you would build it; the sizes go to its arguments."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=CLASSES,
        pad_token_id=0,
    )
    return Trainer(
        model=LlamaForSequenceClassification(config),
        args=TrainingArguments(
            output_dir="runs/check",
            per_device_train_batch_size=per_device_train_batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            report_to="none",
            **kw,
        ),
        train_dataset=ROWS,
        data_collator=collate,
    )
