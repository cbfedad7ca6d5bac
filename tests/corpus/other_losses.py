"""Other losses: classes, regression, preference pairs, contrast, CTC, several terms."""

from collections.abc import Callable
from typing import Any

import torch
from kit import Case, Tiny, V, lengths, nll, rows, targets, tokens
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 5


class Classifier(nn.Module):
    def __init__(self, outputs: int = CLASSES) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, outputs))

    def forward(self, features: Tensor) -> Tensor:
        return self.body(features)


def points(seed: int) -> list[tuple[Tensor, int]]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (len(lengths(seed)),), generator=draw)
    return [(torch.randn(6, generator=draw), int(label)) for label in labels]


def pairs_of_tensors(examples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    return torch.stack([x for x, _ in examples]), torch.tensor([y for _, y in examples])


def classes(step: Callable[..., Any], **names: Any) -> Callable[[int], dict[str, Any]]:
    def build(seed: int) -> dict[str, Any]:
        base = {"model": Classifier, "examples": points(seed), "collate": pairs_of_tensors}
        return {**base, "step": step, **names}

    return build


def number(micros: list[Any]) -> int:
    return sum(len(y) for _, y in micros)


def class_sum(model: nn.Module, micros: list[Any]) -> None:
    for x, y in micros:
        (functional.cross_entropy(model(x), y, reduction="sum") / number(micros)).backward()


def class_means_by_examples(model: nn.Module, micros: list[Any]) -> None:
    for x, y in micros:
        (functional.cross_entropy(model(x), y) * len(y) / number(micros)).backward()


def class_mean_of_means(model: nn.Module, micros: list[Any]) -> None:
    for x, y in micros:
        (functional.cross_entropy(model(x), y) / len(micros)).backward()


def class_sum_of_means(model: nn.Module, micros: list[Any]) -> None:
    for x, y in micros:
        functional.cross_entropy(model(x), y).backward()


RARE = torch.tensor([0.2, 1.0, 3.0, 0.5, 2.0], dtype=torch.float64)


def class_weights(model: nn.Module, micros: list[Any]) -> None:
    total = sum(RARE[y].sum() for _, y in micros)
    for x, y in micros:
        loss = functional.cross_entropy(model(x), y, weight=RARE, reduction="sum")
        (loss / total).backward()


def class_weights_by_examples(model: nn.Module, micros: list[Any]) -> None:
    """Mean reduction divides by the weights of the micro-batch's own classes."""
    for x, y in micros:
        loss = functional.cross_entropy(model(x), y, weight=RARE)
        (loss * len(y) / number(micros)).backward()


def class_weights_mean_of_means(model: nn.Module, micros: list[Any]) -> None:
    for x, y in micros:
        (functional.cross_entropy(model(x), y, weight=RARE) / len(micros)).backward()


def focal(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    losses = functional.cross_entropy(model(x), y, reduction="none")
    return (1 - (-losses).exp()) ** 2 * losses


def focal_sum(model: nn.Module, micros: list[Any]) -> None:
    for x, y in micros:
        (focal(model, x, y).sum() / number(micros)).backward()


def focal_mean_of_means(model: nn.Module, micros: list[Any]) -> None:
    for x, y in micros:
        (focal(model, x, y).mean() / len(micros)).backward()


def dice(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Soft dice over a micro-batch: a ratio of sums, no sum over examples."""
    p, t = model(x).softmax(-1), functional.one_hot(y, CLASSES)
    return 1 - (2 * (p * t).sum() + 1) / (p.square().sum() + t.sum() + 1)


def dice_of_micro_batches(model: nn.Module, micros: list[Any]) -> None:
    for x, y in micros:
        (dice(model, x, y) * len(y) / number(micros)).backward()


def dice_of_examples(model: nn.Module, micros: list[Any]) -> None:
    for x, y in micros:
        each = [dice(model, x[i : i + 1], y[i : i + 1]) for i in range(len(y))]
        (torch.stack(each).sum() / number(micros)).backward()


def squares(model: nn.Module, micros: list[Any]) -> None:
    for x, y in micros:
        error = model(x).sum(-1) - y
        (error.square().sum() / number(micros)).backward()


def squares_mean_of_means(model: nn.Module, micros: list[Any]) -> None:
    for x, y in micros:
        (functional.mse_loss(model(x).sum(-1), y.to(x.dtype)) / len(micros)).backward()


def root_mean_square(model: nn.Module, micros: list[Any]) -> None:
    """The root of a mean is no mean of roots."""
    for x, y in micros:
        error = (model(x).sum(-1) - y).square().mean().sqrt()
        (error * len(y) / number(micros)).backward()


def contrast(model: nn.Module, micros: list[Any]) -> None:
    for x, y in micros:
        one = functional.normalize(model(x), dim=-1)
        other = functional.normalize(model(x.roll(1, -1)), dim=-1)
        logits = one @ other.T / 0.2
        loss = functional.cross_entropy(logits, torch.arange(len(y)), reduction="sum")
        (loss / number(micros)).backward()


def contrast_mean_of_means(model: nn.Module, micros: list[Any]) -> None:
    for x, _ in micros:
        one = functional.normalize(model(x), dim=-1)
        other = functional.normalize(model(x.roll(1, -1)), dim=-1)
        loss = functional.cross_entropy(one @ other.T / 0.2, torch.arange(len(x)))
        (loss / len(micros)).backward()


def preference(seed: int) -> list[tuple[Tensor, Tensor]]:
    short = rows(seed)
    return list(zip(short, [*short[3:], *short[:3]], strict=True))


def preference_batch(examples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    pad = nn.utils.rnn.pad_sequence
    return {
        "chosen": pad([chosen for chosen, _ in examples], batch_first=True),
        "rejected": pad([rejected for _, rejected in examples], batch_first=True),
    }


def log_probability(model: nn.Module, ids: Tensor) -> Tensor:
    """Of each row, padding (0) left out. [rows]."""
    losses = functional.cross_entropy(
        model(ids)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none", ignore_index=0
    )
    return -losses.sum(1)


def pair_losses(model: nn.Module, micro: dict[str, Tensor]) -> Tensor:
    chosen, rejected = (log_probability(model, micro[key]) for key in ("chosen", "rejected"))
    return -functional.logsigmoid(0.1 * (chosen - rejected))


def dpo(model: nn.Module, micros: list[Any]) -> None:
    pairs = sum(len(micro["chosen"]) for micro in micros)
    for micro in micros:
        (pair_losses(model, micro).sum() / pairs).backward()


def dpo_mean_of_means(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        (pair_losses(model, micro).mean() / len(micros)).backward()


def dpo_by_tokens(model: nn.Module, micros: list[Any]) -> None:
    words = [int((micro["chosen"] != 0).sum()) for micro in micros]
    for micro, count in zip(micros, words, strict=True):
        (pair_losses(model, micro).mean() * count / sum(words)).backward()


def preferences(step: Callable[..., Any]) -> Callable[[int], dict[str, Any]]:
    return lambda seed: {
        "model": Tiny,
        "examples": preference(seed),
        "collate": preference_batch,
        "step": step,
    }


def ctc_sum(model: nn.Module, micros: list[Any], mean: bool = False) -> None:
    count = sum(len(micro["labels"]) for micro in micros)
    for micro in micros:
        ids = micro["input_ids"]
        logits = model(ids).log_softmax(-1).transpose(0, 1)
        input_lengths, label_lengths = (ids != 0).sum(1), (micro["labels"] > 0).sum(1)
        losses = functional.ctc_loss(
            logits, micro["labels"].clamp(min=0), input_lengths, label_lengths, reduction="none"
        )
        loss = (losses / label_lengths.clamp(min=1)).mean() / len(micros) if mean else None
        (losses.sum() / count if loss is None else loss).backward()


def ctc_mean_of_means(model: nn.Module, micros: list[Any]) -> None:
    ctc_sum(model, micros, mean=True)


def ctc_batch(examples: list[Tensor]) -> dict[str, Tensor]:
    pad = nn.utils.rnn.pad_sequence
    labels = [row[: max(1, len(row) // 4)] for row in examples]
    return {
        "input_ids": pad(examples, batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
    }


def load_balance(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        load = model(micro["input_ids"]).softmax(-1)[micro["labels"] != -100].mean(0)
        balance = load.square().sum() * V * 0.1 / len(micros)
        (nll(model, micro) / targets(micros) + balance).backward()


def entropy_of_micro_batches(model: nn.Module, micros: list[Any]) -> None:
    """The main term is exact, the bonus is a mean of means."""
    for micro in micros:
        logits = model(micro["input_ids"])[micro["labels"] != -100]
        entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
        (nll(model, micro) / targets(micros) - 0.1 * entropy / len(micros)).backward()


def terms_apart(model: nn.Module, micros: list[Any], term: str | None = None) -> None:
    for micro in micros:
        if term in (None, "nll"):
            (nll(model, micro) / targets(micros)).backward()
        if term in (None, "size"):
            size = model(micro["input_ids"])[micro["labels"] != -100].square().mean()
            (0.1 * size / len(micros)).backward()


CASES = [
    Case("classes, sum", classes(class_sum)),
    Case("classes, means weighted by examples", classes(class_means_by_examples)),
    Case("class weights, exact", classes(class_weights)),
    Case("focal loss, sum", classes(focal_sum)),
    Case("dice of each example", classes(dice_of_examples)),
    Case("squares, sum", classes(squares)),
    Case("preference pairs", preferences(dpo)),
    Case("CTC, sum", tokens(ctc_sum, collate=ctc_batch)),
    Case("classes, mean of means", classes(class_mean_of_means), "mean-of-means"),
    Case("classes, sum of means", classes(class_sum_of_means), "unscaled-sum"),
    Case("class weights, by examples", classes(class_weights_by_examples), "example-weighted"),
    Case("class weights, mean of means", classes(class_weights_mean_of_means), "mean-of-means"),
    Case("focal loss, mean of means", classes(focal_mean_of_means), "mean-of-means"),
    Case("dice of micro-batches", classes(dice_of_micro_batches), "batch-coupled-term"),
    Case("squares, mean of means", classes(squares_mean_of_means), "mean-of-means"),
    Case("root of the mean square", classes(root_mean_square), "batch-coupled-term"),
    Case("in-batch contrast", classes(contrast), "batch-coupled-term"),
    Case("in-batch contrast, mean of means", classes(contrast_mean_of_means),
         "batch-coupled-term"),
    Case("pairs, mean of means", preferences(dpo_mean_of_means), "mean-of-means"),
    Case("pairs by tokens", preferences(dpo_by_tokens), "example-weighted"),
    Case("CTC, mean of means", tokens(ctc_mean_of_means, collate=ctc_batch), "mean-of-means"),
    Case("load balance of micro-batches", tokens(load_balance), "batch-coupled-term"),
    Case("entropy bonus, mean of means", tokens(entropy_of_micro_batches),
         "second-term-per-micro-batch"),
    Case("a term alone, mean of means", lambda seed: {
        **tokens(terms_apart)(seed), "terms": ("nll", "size")}, "mean-of-means", "terms",
         also=("second-term-per-micro-batch",)),
]  # fmt: skip
