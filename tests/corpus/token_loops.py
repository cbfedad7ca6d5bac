"""Loops over tokens: who divides what by what."""

from typing import Any

import torch
from kit import Case, collate, nll, rows, targets, tokens
from torch import Tensor, nn
from torch.nn import functional


def count_first(model: nn.Module, micros: list[Any]) -> float:
    total = 0.0
    for micro in micros:
        loss = nll(model, micro) / targets(micros)
        loss.backward()
        total += loss.item()
    return total


def means_weighted_back(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        (nll(model, micro, "mean") * targets([micro]) / targets(micros)).backward()


def divide_gradients_at_the_end(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        nll(model, micro).backward()
    for weight in model.parameters():
        weight.grad /= targets(micros)


def one_graph(model: nn.Module, micros: list[Any]) -> Tensor:
    loss = torch.stack([nll(model, micro) for micro in micros]).sum() / targets(micros)
    loss.backward()
    return loss


def per_sequence_means(model: nn.Module, micros: list[Any]) -> None:
    examples = sum(len(micro["labels"]) for micro in micros)
    for micro in micros:
        (sequence_means(model, micro).sum() / examples).backward()


def sequence_means(model: nn.Module, micro: dict[str, Tensor]) -> Tensor:
    losses = functional.cross_entropy(
        model(micro["input_ids"])[:, :-1].transpose(1, 2), micro["labels"][:, 1:], reduction="none"
    )
    return losses.sum(1) / (micro["labels"][:, 1:] != -100).sum(1).clamp(min=1)


def by_a_constant(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        (nll(model, micro) / 512).backward()


def plain_sum(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        nll(model, micro).backward()


def smoothed(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        logits, labels = model(micro["input_ids"])[:, :-1], micro["labels"][:, 1:]
        loss = functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=0.1
        )
        (loss / targets(micros)).backward()


def two_units(model: nn.Module, micros: list[Any], weight: float = 0.3) -> None:
    examples = sum(len(micro["labels"]) for micro in micros)
    for micro in micros:
        value = model(micro["input_ids"])[:, 0].square().mean(-1).sum()
        (nll(model, micro) / targets(micros) + weight * value / examples).backward()


def clears_its_gradients(model: nn.Module, micros: list[Any]) -> None:
    model.zero_grad(set_to_none=True)
    count_first(model, micros)


def labels_before_the_shift(model: nn.Module, micros: list[Any]) -> None:
    """Counts one too many a sequence, but over the whole batch: another scale, not another law."""
    count = sum(int((micro["labels"] != -100).sum()) for micro in micros)
    for micro in micros:
        (nll(model, micro) / count).backward()


def mean_of_means(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        (nll(model, micro, "mean") / len(micros)).backward()


def sum_of_means(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        nll(model, micro, "mean").backward()


def means_by_examples(model: nn.Module, micros: list[Any]) -> None:
    examples = sum(len(micro["labels"]) for micro in micros)
    for micro in micros:
        (nll(model, micro, "mean") * len(micro["labels"]) / examples).backward()


def sequences_by_tokens(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        weight = targets([micro]) / targets(micros)
        (sequence_means(model, micro).mean() * weight).backward()


def sequences_mean_of_means(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        (sequence_means(model, micro).mean() / len(micros)).backward()


def means_by_labels_before_the_shift(model: nn.Module, micros: list[Any]) -> None:
    count = sum(int((micro["labels"] != -100).sum()) for micro in micros)
    for micro in micros:
        own = int((micro["labels"] != -100).sum())
        (nll(model, micro, "mean") * own / count).backward()


def mean_when_whole_else_labels_before_the_shift(model: nn.Module, micros: list[Any]) -> None:
    if len(micros) == 1:
        nll(model, micros[0], "mean").backward()
    else:
        labels_before_the_shift(model, micros)


def means_by_positions(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        share = micro["labels"].numel() / sum(one["labels"].numel() for one in micros)
        (nll(model, micro, "mean") * share).backward()


def sum_by_positions(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        (nll(model, micro) / sum(one["labels"].numel() for one in micros)).backward()


def own_positions(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        (nll(model, micro) / micro["labels"].numel() / len(micros)).backward()


def divided_twice(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        (nll(model, micro) / targets(micros) / len(micros)).backward()


def last_only(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        model.zero_grad()
        nll(model, micro, "mean").backward()


def last_loss_only(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        loss = nll(model, micro) / targets(micros)
    loss.backward()


def clears_after_the_first(model: nn.Module, micros: list[Any]) -> None:
    for number, micro in enumerate(micros):
        if number == 1:
            model.zero_grad()
        (nll(model, micro) / targets(micros)).backward()


def skips_the_short(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        if len(micro["labels"]) > 1 or len(micros) == 1:
            (nll(model, micro) / targets(micros)).backward()


def clips_each(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        (nll(model, micro) / targets(micros)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def clips_each_mean(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        (nll(model, micro, "mean") / len(micros)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def clips_once(model: nn.Module, micros: list[Any]) -> None:
    count_first(model, micros)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def clips_a_sum_of_means(model: nn.Module, micros: list[Any]) -> None:
    sum_of_means(model, micros)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def whole_times_accumulation_clipped(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        (nll(model, micro) / targets(micros) * len(micros)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def short_window(model: nn.Module, micros: list[Any], accumulation: int) -> None:
    for micro in micros:
        share = targets([micro]) / targets(micros) * len(micros)
        (nll(model, micro, "mean") * share / accumulation).backward()


def means_in_a_window(model: nn.Module, micros: list[Any], accumulation: int) -> None:
    for micro in micros:
        (nll(model, micro, "mean") / accumulation).backward()


def right_window(model: nn.Module, micros: list[Any], accumulation: int) -> None:
    count_first(model, micros)


def penalty_each(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        penalty = sum(weight.square().sum() for weight in model.parameters())
        (nll(model, micro) / targets(micros) + 1e-2 * penalty).backward()


def noisy(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        kept = (torch.rand(micro["labels"].shape) > 0.2) & (micro["labels"] != -100)
        labels = micro["labels"].where(kept, -100)
        (nll(model, {**micro, "labels": labels}) / targets(micros)).backward()


def prompts_masked(examples: list[Tensor]) -> dict[str, Tensor]:
    batch = collate(examples)
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    batch["labels"][:, :2] = -100
    batch["labels"][batch["input_ids"] % 3 == 0] = -100
    batch["labels"][:, 2] = batch["input_ids"][:, 2]
    return batch


def means_by_real_tokens(model: nn.Module, micros: list[Any]) -> None:
    real = sum(int(micro["attention_mask"].sum()) for micro in micros)
    for micro in micros:
        share = int(micro["attention_mask"].sum()) / real
        (nll(model, micro, "mean") * share).backward()


def weighted_examples(seed: int) -> list[tuple[Tensor, float]]:
    return [(row, 0.5 + (number * 7 % 5) / 4) for number, row in enumerate(rows(seed))]


def collate_weighted(examples: list[tuple[Tensor, float]]) -> dict[str, Tensor]:
    weights = torch.tensor([weight for _, weight in examples])
    return {**collate([row for row, _ in examples]), "weights": weights}


def weigh(model: nn.Module, micro: dict[str, Tensor]) -> Tensor:
    return (sequence_means(model, micro) * micro["weights"]).sum()


def weights_exact(model: nn.Module, micros: list[Any]) -> None:
    total = sum(micro["weights"].sum() for micro in micros)
    for micro in micros:
        (weigh(model, micro) / total).backward()


def weights_own(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        (weigh(model, micro) / micro["weights"].sum() / len(micros)).backward()


def weighted(step: Any) -> Any:
    def build(seed: int) -> Any:
        names = {"examples": weighted_examples(seed), "collate": collate_weighted}
        return {**tokens(step)(seed), **names}

    return build


CASES = [
    Case("count first, divide once", tokens(count_first)),
    Case("means weighted back by targets", tokens(means_weighted_back)),
    Case("gradients divided at the end", tokens(divide_gradients_at_the_end)),
    Case("one graph, one backward", tokens(one_graph)),
    Case("mean over sequences of their means", tokens(per_sequence_means)),
    Case("sum over a constant", tokens(by_a_constant)),
    Case("plain sum", tokens(plain_sum)),
    Case("label smoothing", tokens(smoothed)),
    Case("two terms in two units", tokens(two_units)),
    Case("clears gradients by itself", tokens(clears_its_gradients)),
    Case("labels before the shift, over the whole batch", tokens(labels_before_the_shift)),
    Case("clips once at the end", tokens(clips_once)),
    Case("window that is short, counted", tokens(right_window)),
    Case("masked prompts, count first", tokens(count_first, collate=prompts_masked)),
    Case("weights of examples, exact", weighted(weights_exact)),
    Case("mean of means", tokens(mean_of_means), "mean-of-means", also=()),
    Case("sequences, mean of means", tokens(sequences_mean_of_means), "mean-of-means"),
    Case("weights of examples, mean of means", weighted(weights_own), "mean-of-means"),
    Case("own padded positions", tokens(own_positions), "mean-of-means", also=("padding-counted",)),
    Case("sum of means", tokens(sum_of_means), "unscaled-sum"),
    Case("sum of means, clipped", tokens(clips_a_sum_of_means), "unscaled-sum"),
    Case("x accumulation, hidden by a clip", tokens(whole_times_accumulation_clipped),
         "unscaled-sum"),
    Case("divided twice", tokens(divided_twice), "divided-twice"),
    Case("token means by examples", tokens(means_by_examples), "example-weighted"),
    Case("sequence means by tokens", tokens(sequences_by_tokens), "example-weighted"),
    Case("token means by labels before the shift", tokens(means_by_labels_before_the_shift),
         "unshifted-count"),
    Case("labels before the shift, if accumulated",
         tokens(mean_when_whole_else_labels_before_the_shift), "unshifted-count"),
    Case("token means by positions", tokens(means_by_positions), "padding-counted"),
    Case("sum over positions", tokens(sum_by_positions), "padding-counted"),
    Case("token means by real tokens, prompts too",
         tokens(means_by_real_tokens, collate=prompts_masked), "padding-counted"),
    Case("gradients cleared each time", tokens(last_only), "last-micro-batch-only"),
    Case("backward of the last loss", tokens(last_loss_only), "last-micro-batch-only"),
    Case("gradients cleared after the first", tokens(clears_after_the_first), "dropped-examples"),
    Case("short micro-batches skipped", tokens(skips_the_short), "dropped-examples"),
    Case("clips each", tokens(clips_each), "clip-per-micro-batch"),
    Case("clips each, of means", tokens(clips_each_mean), "clip-per-micro-batch",
         also=("mean-of-means",)),
    Case("short window", tokens(short_window), "short-window", "short-window"),
    Case("short window of means", tokens(means_in_a_window), "short-window", "short-window",
         also=("mean-of-means",)),
    Case("weight penalty in each", tokens(penalty_each), "second-term-per-micro-batch"),
    Case("tokens dropped at random", tokens(noisy), "rng"),
]  # fmt: skip
