"""Loops that update: optimizers, schedules, scalers, averages, and steps at the wrong time."""

import copy
from typing import Any

import torch
from kit import Case, Tiny, nll, targets, tokens, trained
from token_loops import count_first, mean_of_means, sum_of_means
from torch import nn
from torch.optim.swa_utils import AveragedModel


def stepped(backward: Any, optimizer: Any = torch.optim.SGD, **settings: Any) -> Any:
    """Gradients by one of the loops, then one step."""

    def train(model: nn.Module, micros: list[Any]) -> Any:
        chosen = optimizer(model.parameters(), **{"lr": 0.05, **settings})
        chosen.zero_grad()
        said = backward(model, micros)
        chosen.step()
        return said

    return trained(train)


def scheduled(model: nn.Module, micros: list[Any]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 10)
    average = AveragedModel(model)
    count_first(model, micros)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    schedule.step()
    average.update_parameters(model)


def by_hand(model: nn.Module, micros: list[Any]) -> None:
    """Plain descent with weight decay, no optimizer."""
    model.zero_grad()
    count_first(model, micros)
    with torch.no_grad():
        for weight in model.parameters():
            weight -= 0.1 * (weight.grad + 0.01 * weight)


def means_by_hand(model: nn.Module, micros: list[Any]) -> None:
    model.zero_grad()
    mean_of_means(model, micros)
    with torch.no_grad():
        for weight in model.parameters():
            weight -= 0.1 * (weight.grad + 0.01 * weight)


def unscaled_by_hand(model: nn.Module, micros: list[Any]) -> None:
    model.zero_grad()
    sum_of_means(model, micros)
    with torch.no_grad():
        for weight in model.parameters():
            weight -= 0.1 * (weight.grad + 0.01 * weight)


def scaled(model: nn.Module, micros: list[Any]) -> None:
    """With a gradient scaler, as for half precision."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for micro in micros:
        scaler.scale(nll(model, micro) / targets(micros)).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()


def two_optimizers(model: Tiny, micros: list[Any]) -> None:
    body = torch.optim.Adam([*model.embed.parameters(), *model.hidden.parameters()], lr=0.01)
    head = torch.optim.SGD(model.head.parameters(), lr=0.1)
    count_first(model, micros)
    body.step()
    head.step()


def each_time(model: nn.Module, micros: list[Any], optimizer: Any = torch.optim.SGD) -> None:
    chosen = optimizer(model.parameters(), lr=0.05)
    for micro in micros:
        chosen.zero_grad()
        nll(model, micro, "mean").backward()
        chosen.step()


def each_time_adam(model: nn.Module, micros: list[Any]) -> None:
    each_time(model, micros, torch.optim.AdamW)


def each_time_without_clearing(model: nn.Module, micros: list[Any]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for micro in micros:
        (nll(model, micro) / targets(micros)).backward()
        optimizer.step()


def each_time_by_hand(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        model.zero_grad()
        nll(model, micro, "mean").backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight -= 0.1 * weight.grad


def unscaled_clip(model: nn.Module, micros: list[Any]) -> None:
    """Clips while the scaler's factor is still on: never mind, but after each micro-batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for micro in micros:
        scaler.scale(nll(model, micro) / targets(micros)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 50.0)
    scaler.step(optimizer)


def looks_ahead(model: nn.Module, micros: list[Any]) -> None:
    """Two passes at two places (sharpness-aware), each over the whole batch: sound."""
    count_first(model, micros)
    norm = torch.cat([weight.grad.flatten() for weight in model.parameters()]).norm()
    steps = [0.05 * weight.grad / norm for weight in model.parameters()]
    with torch.no_grad():
        for weight, step in zip(model.parameters(), steps, strict=True):
            weight += step
    model.zero_grad()
    count_first(model, micros)
    with torch.no_grad():
        for weight, step in zip(model.parameters(), steps, strict=True):
            weight -= step


def distils(model: nn.Module, micros: list[Any]) -> None:
    """Learns from a frozen copy of itself at other weights."""
    teacher = copy.deepcopy(model).requires_grad_(False)
    for weight in teacher.parameters():
        weight.mul_(1.1)
    for micro in micros:
        real = micro["labels"][:, 1:] != -100
        logits = model(micro["input_ids"])[:, :-1][real].log_softmax(-1)
        wanted = teacher(micro["input_ids"])[:, :-1][real].softmax(-1)
        (-(wanted * logits).sum() / targets(micros)).backward()


CASES = [
    Case("SGD", stepped(count_first)),
    Case("SGD with momentum and decay", stepped(count_first, momentum=0.9, weight_decay=0.1)),
    Case("AdamW", stepped(count_first, torch.optim.AdamW)),
    Case("AdamW, schedule, clip, average of weights", trained(scheduled)),
    Case("descent by hand, with decay", trained(by_hand)),
    Case("gradient scaler", trained(scaled)),
    Case("two optimizers", trained(two_optimizers)),
    Case("sharpness-aware", tokens(looks_ahead)),
    Case("distillation", tokens(distils)),
    Case("AdamW, sum of means", stepped(sum_of_means, torch.optim.AdamW), "unscaled-sum"),
    Case("AdamW, mean of means", stepped(mean_of_means, torch.optim.AdamW), "mean-of-means"),
    Case("descent by hand, mean of means", trained(means_by_hand), "mean-of-means"),
    Case("descent by hand, sum of means", trained(unscaled_by_hand), "unscaled-sum"),
    Case("steps each time", trained(each_time), "optimizer-step-per-micro-batch"),
    Case("AdamW steps each time", trained(each_time_adam), "optimizer-step-per-micro-batch"),
    Case("steps each time without clearing", trained(each_time_without_clearing),
         "optimizer-step-per-micro-batch"),
    Case("steps each time by hand", trained(each_time_by_hand), "optimizer-step-per-micro-batch"),
    Case("scaler, clips each", trained(unscaled_clip), "clip-per-micro-batch"),
]  # fmt: skip
