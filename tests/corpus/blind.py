"""Subjects that were written before the diagnosis was changed, and that it was never tuned to.

python tests/corpus/blind.py [--markdown FILE]     audits them all and writes what was said

Kinds that come up in public issue threads. Each has the answers that are right by name; where two
names are as true, both stand here.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kit import Tiny, V, collate, nll, rows, targets, tokens
from torch import Tensor, nn
from torch.nn import functional

from samestep.audit.check import check

SEED = 41


@dataclass(frozen=True)
class Blind:
    """A subject and what is right.

    Attributes:
        name: What a reader calls it.
        subject: Its names.
        right: The causes that are right on any axis; empty of a sound one.
        axes: The axes to run; None: the default ones.
    """

    name: str
    subject: Any
    right: tuple[str, ...] = ()
    axes: tuple[str, ...] | None = None


def hidden_of(model: Tiny, ids: Tensor) -> Tensor:
    return torch.tanh(model.hidden(model.embed(ids)).cumsum(1))


def pooled(model: Tiny, micro: dict[str, Tensor]) -> Tensor:
    real = (micro["labels"] != -100)[..., None]
    return (hidden_of(model, micro["input_ids"]) * real).sum(1) / real.sum(1)


def token_losses(model: nn.Module, micro: dict[str, Tensor]) -> Tensor:
    logits = model(micro["input_ids"])[:, :-1].transpose(1, 2)
    return functional.cross_entropy(logits, micro["labels"][:, 1:], reduction="none")


def of(step: Callable[..., Any], **names: Any) -> Any:
    return tokens(step, **names)(SEED)


def noise_reseeded(model: Tiny, micros: list[Any]) -> None:
    """Noise on embeddings, from the same seed in each micro-batch."""
    for micro in micros:
        torch.manual_seed(7)
        embedded = model.embed(micro["input_ids"])
        embedded = embedded + 0.1 * torch.rand_like(embedded)
        logits = model.head(torch.tanh(model.hidden(embedded).cumsum(1)))[:, :-1].transpose(1, 2)
        loss = functional.cross_entropy(logits, micro["labels"][:, 1:], reduction="sum")
        (loss / targets(micros)).backward()


def smoothing_by_micro_batch(model: Tiny, micros: list[Any]) -> None:
    """The smoothing is averaged by itself, and once a micro-batch."""
    for micro in micros:
        logits = model(micro["input_ids"])[:, :-1][micro["labels"][:, 1:] != -100]
        smooth = -logits.log_softmax(-1).mean()
        (0.9 * nll(model, micro) / targets(micros) + 0.1 * smooth).backward()


def kl_by_micro_batch(model: Tiny, micros: list[Any]) -> None:
    """A penalty of the mean distance to uniform, a micro-batch, beside a loss over the whole."""
    for micro in micros:
        logits = model(micro["input_ids"])[:, :-1][micro["labels"][:, 1:] != -100]
        log = logits.log_softmax(-1)
        (nll(model, micro) / targets(micros) + 0.2 * (log.exp() * log).sum(-1).mean()).backward()


def whitened_rewards(model: Tiny, micros: list[Any]) -> None:
    """Rewards are normalised within the micro-batch."""
    size = sum(len(micro["input_ids"]) for micro in micros)
    for micro in micros:
        rewards = (micro["input_ids"] % 5).double().sum(1)
        if len(rewards) > 1:
            rewards = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        ((token_losses(model, micro).sum(1) * rewards).sum() / size).backward()


def load_balance(model: Tiny, micros: list[Any]) -> None:
    """Share of tokens times mean probability of each of four experts, a micro-batch."""
    for micro in micros:
        real = micro["labels"] != -100
        p = hidden_of(model, micro["input_ids"])[real][:, :4].softmax(-1)
        share = functional.one_hot(p.argmax(-1), 4).double().mean(0)
        balance = 4 * (share * p.mean(0)).sum()
        weight = real.sum() / sum((one["labels"] != -100).sum() for one in micros)
        (nll(model, micro) / targets(micros) + 0.5 * balance * weight).backward()


class Normed(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(12)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(hidden_of(self, ids).transpose(1, 2)).transpose(1, 2))


class FrequencyScaled(Tiny):
    """Embedding gradients are divided by how often a token is in the micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, 12, scale_grad_by_freq=True)


class PowerIterated(Tiny):
    """A spectral norm, whose vectors turn at every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.utils.parametrizations.spectral_norm(self.hidden)


def whole_mean(model: nn.Module, micros: list[Any]) -> float:
    logged = 0.0
    for micro in micros:
        loss = nll(model, micro) / targets(micros)
        loss.backward()
        logged += loss.item()
    return logged


def negatives_in_batch(model: Tiny, micros: list[Any]) -> None:
    size = sum(len(micro["input_ids"]) for micro in micros)
    for micro in micros:
        one = functional.normalize(pooled(model, micro), dim=-1)
        two = functional.normalize(model.embed(micro["input_ids"][:, 0]), dim=-1)
        scores = one @ two.T / 0.2
        loss = functional.cross_entropy(scores, torch.arange(len(one)), reduction="sum")
        (loss / size).backward()


def clamped_by_hooks(model: Tiny, micros: list[Any]) -> None:
    """A hook on each weight clamps what every backward delivers."""
    handles = [w.register_hook(lambda g: g.clamp(-0.002, 0.002)) for w in model.parameters()]
    whole_mean(model, micros)
    for handle in handles:
        handle.remove()


def by_padded_length(model: Tiny, micros: list[Any]) -> None:
    """Token losses over rows times the longest row, by examples."""
    size = sum(len(micro["input_ids"]) for micro in micros)
    for micro in micros:
        losses = token_losses(model, micro)
        (losses.sum() / losses.numel() * len(losses) / size).backward()


def skips_small(model: Tiny, micros: list[Any]) -> None:
    """Micro-batches smaller than the largest are skipped, counts and all."""
    full = max(len(micro["input_ids"]) for micro in micros)
    kept = [micro for micro in micros if len(micro["input_ids"]) == full]
    whole_mean(model, kept)


class Baseline(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("baseline", torch.ones(()))


def running_baseline(model: Baseline, micros: list[Any]) -> None:
    """The loss is scaled by its running mean, which moves once a micro-batch."""
    for micro in micros:
        loss = nll(model, micro)
        model.baseline.lerp_(loss.detach() / targets([micro]), 0.1)
        (loss / targets(micros) / model.baseline).backward()


def hardest_tokens(model: Tiny, micros: list[Any]) -> None:
    """The hardest half of the tokens of a micro-batch."""
    for micro in micros:
        losses = token_losses(model, micro)[micro["labels"][:, 1:] != -100]
        hard = losses.topk(max(1, len(losses) // 2)).values
        (hard.sum() / targets(micros)).backward()


def last_undivided(model: Tiny, micros: list[Any]) -> None:
    """All but the last micro-batch are divided by the accumulation."""
    for at, micro in enumerate(micros):
        loss = nll(model, micro) / targets(micros)
        (loss if at == len(micros) - 1 else loss / len(micros)).backward()


def logs_only_cross_entropy(model: Tiny, micros: list[Any]) -> float:
    """The z-loss is optimised, right, and not reported."""
    logged = 0.0
    for micro in micros:
        loss = nll(model, micro) / targets(micros)
        logits = model(micro["input_ids"])[:, :-1][micro["labels"][:, 1:] != -100]
        (loss + 0.1 * logits.logsumexp(-1).square().sum() / targets(micros)).backward()
        logged += loss.item()
    return logged


def hardest_of_rows(model: Tiny, micros: list[Any]) -> None:
    """The hardest token of each row: sound."""
    size = sum(len(micro["input_ids"]) for micro in micros)
    for micro in micros:
        (token_losses(model, micro).max(1).values.sum() / size).backward()


def by_closure(model: Tiny, micros: list[Any]) -> None:
    """L-BFGS calls its closure several times a step: sound."""
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

    def closure() -> float:
        optimizer.zero_grad()
        return whole_mean(model, micros)

    optimizer.step(closure)


def follows_once(model: nn.Module, micros: list[Any]) -> float:
    """An average of the weights, a schedule, momentum: each moves once. Sound."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    average = torch.optim.swa_utils.AveragedModel(model)
    logged = whole_mean(model, micros)
    optimizer.step()
    schedule.step()
    average.update_parameters(model)
    return logged


SUBJECTS = [
    Blind("noise reseeded a micro-batch", of(noise_reseeded), ("rng",)),
    Blind("label smoothing, own mean", of(smoothing_by_micro_batch),
          ("second-term-per-micro-batch",)),
    Blind("KL, mean of the micro-batch", of(kl_by_micro_batch), ("second-term-per-micro-batch",)),
    Blind("rewards whitened", of(whitened_rewards), ("batch-coupled-term",)),
    Blind("load balance", of(load_balance), ("batch-coupled-term",)),
    Blind("BatchNorm", of(whole_mean, model=Normed),
          ("batch-coupled-term", "padding-attended", "state-per-micro-batch")),
    Blind("embedding scaled by frequency", of(whole_mean, model=FrequencyScaled),
          ("batch-coupled-term",)),
    Blind("spectral norm", of(whole_mean, model=PowerIterated), ("state-per-micro-batch",)),
    Blind("in-batch negatives", of(negatives_in_batch), ("batch-coupled-term",)),
    Blind("clamped by hooks", of(clamped_by_hooks), ("clip-per-micro-batch",)),
    Blind("padded length", of(by_padded_length), ("padding-counted",)),
    Blind("small micro-batches skipped", of(skips_small), ("dropped-examples",)),
    Blind("running baseline", of(running_baseline, model=Baseline), ("state-per-micro-batch",)),
    Blind("hardest tokens", of(hardest_tokens), ("batch-coupled-term",)),
    Blind("last undivided", of(last_undivided), ("divided-twice", "unexplained")),
    Blind("z-loss unreported", of(logs_only_cross_entropy), ("reported-not-optimised",)),
    Blind("hardest of rows", of(hardest_of_rows)),
    Blind("L-BFGS", of(by_closure, train=by_closure)),
    Blind("average, schedule, momentum once", of(follows_once, train=follows_once)),
    Blind("token mean", {"model": Tiny, "examples": rows(SEED), "collate": collate,
                         "step": whole_mean}),
]  # fmt: skip


def judged(subject: Blind) -> tuple[bool, str]:
    """Whether every name is right, and what was said."""
    try:
        report = check(subject.subject, subject.axes)
    except Exception as error:  # the table shows whatever came
        return False, f"{type(error).__name__}: {error}".splitlines()[0][:70]
    found = {axis.name: str(axis.cause) for axis in report.axes if axis.verdict == "inexact"}
    good = bool(found) == bool(subject.right) and {*found.values()} <= {*subject.right}
    return good, ", ".join(f"{axis}: {cause}" for axis, cause in found.items()) or "exact"


def table(subjects: Sequence[Blind]) -> Iterator[str]:
    """Lines of Markdown."""
    yield "| subject | right answer | said | right |"
    yield "| --- | --- | --- | --- |"
    number = 0
    for subject in subjects:
        good, said = judged(subject)
        number += good
        right = " or ".join(subject.right) or "exact"
        yield f"| {subject.name} | {right} | {said} | {'yes' if good else 'no'} |"
    yield f"\n{number} of {len(subjects)} right."


def main(subjects: Sequence[Blind] = SUBJECTS) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--markdown", type=Path)
    given = parser.parse_args()
    text = "\n".join(table(subjects)) + "\n"
    print(text)
    if given.markdown:
        given.markdown.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
