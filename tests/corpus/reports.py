"""What loops say: logged losses, metrics, evaluations."""

import math
from collections.abc import Callable
from typing import Any

import torch
from kit import Case, nll, targets, tokens
from token_loops import count_first, mean_of_means
from torch import Tensor, nn
from torch.nn import functional


def right(model: nn.Module, micro: dict[str, Tensor]) -> Tensor:
    """Targets among the eight best guesses, so that a random model has some."""
    labels = micro["labels"][:, 1:]
    guesses = model(micro["input_ids"])[:, :-1].topk(8).indices
    return ((guesses == labels[..., None]).any(-1) & (labels != -100)).sum()


def reports(number: Callable[[nn.Module, list[Any]], Any]) -> Callable[[int], Any]:
    """An exact loop that reports this."""

    def step(model: nn.Module, micros: list[Any]) -> Any:
        with torch.no_grad():
            said = number(model, micros)
        count_first(model, micros)
        return said

    return tokens(step)


def everything(model: nn.Module, micros: list[Any]) -> dict[str, float]:
    loss = sum(float(nll(model, micro)) for micro in micros) / targets(micros)
    hits = sum(int(right(model, micro)) for micro in micros)
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "accuracy": hits / targets(micros),
        "micro_batches": len(micros),
        "padded_tokens": sum(micro["labels"].numel() for micro in micros),
        "learning_rate": 1e-3,
    }


def mean_of_losses(model: nn.Module, micros: list[Any]) -> float:
    return sum(float(nll(model, micro, "mean")) for micro in micros) / len(micros)


def last_loss(model: nn.Module, micros: list[Any]) -> float:
    return float(nll(model, micros[-1], "mean"))


def sum_of_losses(model: nn.Module, micros: list[Any]) -> float:
    return sum(float(nll(model, micro, "mean")) for micro in micros)


def mean_of_accuracies(model: nn.Module, micros: list[Any]) -> dict[str, float]:
    values = [int(right(model, micro)) / max(1, targets([micro])) for micro in micros]
    return {"loss": everything(model, micros)["loss"], "accuracy": sum(values) / len(values)}


def without_penalty(model: nn.Module, micros: list[Any]) -> float:
    """Optimises a penalty that it does not report."""
    total = count_first(model, micros)
    (1e-2 * sum(weight.square().sum() for weight in model.parameters())).backward()
    return total


def reports_over_targets(model: nn.Module, micros: list[Any]) -> float:
    """Optimises over labels before the shift, reports over targets."""
    count = sum(int((micro["labels"] != -100).sum()) for micro in micros)
    total = 0.0
    for micro in micros:
        loss = nll(model, micro)
        (loss / count).backward()
        total += loss.item()
    return total / targets(micros)


def reports_what_it_optimises(model: nn.Module, micros: list[Any]) -> float:
    """Wrong, but honest: the report changes because the objective does."""
    mean_of_means(model, micros)
    with torch.no_grad():
        return mean_of_losses(model, micros)


def evaluates(evaluate: Callable[[nn.Module, list[Any]], Any]) -> Callable[[int], Any]:
    def without_gradients(model: nn.Module, batches: list[Any]) -> Any:
        model.eval()
        with torch.no_grad():
            found = evaluate(model, batches)
        model.train()
        return found

    return tokens(count_first, evaluate=without_gradients)


def evaluation(model: nn.Module, batches: list[Any]) -> dict[str, float]:
    return {f"eval_{key}": value for key, value in everything(model, batches).items()}


def accuracy_of_batches(model: nn.Module, batches: list[Any]) -> dict[str, float]:
    values = [int(right(model, batch)) / targets([batch]) for batch in batches]
    return {"eval_loss": everything(model, batches)["loss"], "accuracy": sum(values) / len(values)}


def perplexity_of_batches(model: nn.Module, batches: list[Any]) -> dict[str, float]:
    return {"perplexity": math.exp(mean_of_losses(model, batches))}


def losses_by_examples(model: nn.Module, batches: list[Any]) -> float:
    sizes = [len(batch["labels"]) for batch in batches]
    values = [float(nll(model, batch, "mean")) for batch in batches]
    return sum(v * b for v, b in zip(values, sizes, strict=True)) / sum(sizes)


class Normed(nn.Module):
    """Batch statistics, also in evaluation: the mode is never changed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = (
            nn.Embedding(29, 12),
            nn.BatchNorm1d(12),
            nn.Linear(12, 29),
        )

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(ids).cumsum(1).transpose(1, 2)).transpose(1, 2))


def evaluates_in_train_mode(model: nn.Module, batches: list[Any]) -> dict[str, float]:
    model.train()
    with torch.no_grad():
        return {"loss": everything(model, batches)["loss"]}


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(29, 12), nn.Linear(12, 29)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids).cumsum(1)
        return self.head(hidden * 2 if not self.training else hidden)


def leaves_eval_mode(model: nn.Module, batches: list[Any]) -> float:
    model.eval()
    with torch.no_grad():
        return everything(model, batches)["loss"]


def leaves_gradients(model: nn.Module, batches: list[Any]) -> float:
    functional.mse_loss(model(batches[0]["input_ids"]), torch.zeros(()), reduction="sum").backward()
    with torch.no_grad():
        return everything(model, batches)["loss"]


CASES = [
    Case("reports sums over counts", reports(everything)),
    Case("evaluates sums over counts", evaluates(evaluation)),
    Case("reports the mean of losses", reports(mean_of_losses), "reported-not-optimised",
         "reported"),
    Case("reports the last loss", reports(last_loss), "reported-not-optimised", "reported"),
    Case("reports the sum of means", reports(sum_of_losses), "reported-not-optimised", "reported"),
    Case("does not report a penalty", tokens(without_penalty), "reported-not-optimised",
         "reported"),
    Case("reports over targets, not over labels", tokens(reports_over_targets), "unshifted-count",
         "reported"),
    Case("reports a mean of means as it is", tokens(reports_what_it_optimises), "mean-of-means",
         "reported"),
    Case("reports the mean of accuracies", reports(mean_of_accuracies), "metric-mean-of-means",
         "reported"),
    Case("evaluates the mean of losses", evaluates(mean_of_losses), "eval-mean-of-means",
         "evaluation-batch"),
    Case("evaluates losses by examples", evaluates(losses_by_examples), "eval-mean-of-means",
         "evaluation-batch"),
    Case("evaluates the mean of accuracies", evaluates(accuracy_of_batches),
         "metric-mean-of-means", "evaluation-batch"),
    Case("evaluates the perplexity of a mean of means", evaluates(perplexity_of_batches),
         "metric-mean-of-means", "evaluation-batch"),
    Case("evaluates in train mode", tokens(
        count_first, model=Normed, evaluate=evaluates_in_train_mode), "batch-coupled-term",
        "evaluation-batch", axes=("evaluation-batch",)),
    Case("evaluation leaves eval mode", tokens(
        count_first, model=Dropping, evaluate=leaves_eval_mode), "evaluation-side-effect",
        "evaluation-first"),
    Case("evaluation leaves gradients", tokens(count_first, evaluate=leaves_gradients),
         "evaluation-side-effect", "evaluation-first"),
]  # fmt: skip
