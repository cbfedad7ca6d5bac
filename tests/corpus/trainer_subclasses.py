"""Subclasses, loss functions and collators for transformers.Trainer."""

from collections.abc import Callable
from typing import Any

import torch
from kit import Case, lengths
from torch import Tensor, nn
from torch.nn import functional
from trainers import V, classifier, collate, factory
from transformers import BertConfig, BertForMaskedLM, Trainer

AXES = ("micro-batch", "order", "padding", "short-window", "zero-target")
"""What training does; the Trainer's own evaluation loss is a mean of means, whatever the loss."""


def rows(seed: int, classes: int | None = None) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(seed)
    made = []
    for number, length in enumerate(lengths(seed)):
        ids = torch.randint(2, V, (length,), generator=draw).tolist()
        labels = ids if classes is None else number % classes
        made.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels})
    return made


def token_losses(outputs: Any, labels: Tensor) -> Tensor:
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")


def over_items(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return token_losses(outputs, labels) / num_items_in_batch


def over_own_targets(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return token_losses(outputs, labels) / (labels[:, 1:] != -100).sum()


def items_and_load(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    load = outputs.logits.softmax(-1)[labels != -100].mean(0)
    return over_items(outputs, labels, num_items_in_batch) + load.square().sum() * V


class IgnoresItems(Trainer):
    """The classic override: the model's mean, and the trainer told that it divides."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        labels = inputs.pop("labels")
        return token_losses(model(**inputs), labels) / (labels[:, 1:] != -100).sum()


class ClipsEachTime(Trainer):
    def training_step(self, model: nn.Module, *args: Any, **options: Any) -> Tensor:
        loss = super().training_step(model, *args, **options)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        return loss


class ClearsEachTime(Trainer):
    def training_step(self, model: nn.Module, *args: Any, **options: Any) -> Tensor:
        model.zero_grad()
        return super().training_step(model, *args, **options)


def trained(*, classes: int | None = None, **options: Any) -> Callable[[int], Any]:
    return lambda seed: factory(data=rows(seed, classes), **options)


def longest(features: list[Any]) -> dict[str, Tensor]:
    """Padded further, to a multiple of eight."""
    batch = collate(features)
    more = -batch["input_ids"].shape[1] % 8
    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {key: functional.pad(value, (0, more), value=fills[key]) for key, value in batch.items()}


def reader() -> nn.Module:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=24,
        )
    )  # fmt: skip


def labels_over_items(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits = outputs.logits.flatten(0, 1)
    return functional.cross_entropy(logits, labels.flatten(), reduction="sum") / num_items_in_batch


def case(name: str, build: Callable[[int], Any], cause: str | None = None, **more: Any) -> Case:
    return Case(name, build, cause, axes=AXES, **more)


CASES = [
    case("trainer of a causal model", trained()),
    case("loss over items", trained(compute_loss_func=over_items)),
    case("padded to multiples of eight", trained(collator=longest)),
    case("override that ignores items", trained(kind=IgnoresItems), "mean-of-means"),
    case("loss over own targets", trained(compute_loss_func=over_own_targets), "unscaled-sum"),
    case("sequence classifier", trained(model=classifier, classes=3), "unscaled-sum"),
    case("trainer that clips each time", trained(kind=ClipsEachTime), "clip-per-micro-batch"),
    case("trainer that clears each time", trained(kind=ClearsEachTime), "last-micro-batch-only"),
    case("loss with load balance", trained(compute_loss_func=items_and_load),
         "batch-coupled-term"),
    case("both directions, masked", trained(model=reader, compute_loss_func=labels_over_items)),
]  # fmt: skip
