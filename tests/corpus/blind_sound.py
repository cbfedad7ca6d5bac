"""The sound ones of the second set of blind subjects (`blind_fresh.py`)."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from blind import Blind, hidden_of, token_losses
from kit import Tiny, collate, nll, rows, targets, tokens
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

SEED = 47


def of(step: Callable[..., Any], **names: Any) -> Any:
    return tokens(step, **names)(SEED)


def sizes(micros: list[Any]) -> int:
    return sum(len(micro["input_ids"]) for micro in micros)


def real(micro: dict[str, Tensor]) -> Tensor:
    return micro["labels"][:, 1:] != -100


def pooled(model: Tiny, micro: dict[str, Tensor]) -> Tensor:
    """The mean hidden state of each row, whether it has targets or not."""
    held = (micro["input_ids"] != 0)[..., None]
    return (hidden_of(model, micro["input_ids"]) * held).sum(1) / held.sum(1)


def two_passes(model: Tiny, micros: list[Any]) -> None:
    """luyug/GradCache#7: all vectors first, their gradients, then chunk by chunk."""
    held = [pooled(model, micro).detach().requires_grad_() for micro in micros]
    other = torch.cat([model.embed.weight.detach()[micro["input_ids"][:, 1]] for micro in micros])
    one = functional.normalize(torch.cat(held), dim=-1)
    scores = one @ functional.normalize(other, dim=-1).T / 0.2
    functional.cross_entropy(scores, torch.arange(len(one))).backward()
    for micro, each in zip(micros, held, strict=True):
        (pooled(model, micro) * each.grad).sum().backward()


class Codes(Tiny):
    """Hidden states near codes, which follow their means."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.register_buffer("codes", torch.randn(6, 12, generator=draw))


def codebook(model: Codes, micros: list[Any]) -> None:
    """Codes are assigned by the old codes, and follow once, by sums over all micro-batches."""
    sums, counts = torch.zeros_like(model.codes), model.codes.new_zeros(6, 1)
    for micro in micros:
        own = hidden_of(model, micro["input_ids"])[:, :-1][real(micro)]
        nearest = torch.cdist(own.detach(), model.codes).argmin(1)
        near = (own - model.codes[nearest]).square().sum()
        ((nll(model, micro) + 0.25 * near) / targets(micros)).backward()
        sums.index_add_(0, nearest, own.detach())
        counts.index_add_(0, nearest, torch.ones_like(own[:, :1]))
    with torch.no_grad():
        used = counts[:, 0] > 0
        model.codes[used] = model.codes[used].lerp(sums[used] / counts[used], 0.1)


class Balanced(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.tensor([0.4, -0.1]))


def balanced(model: Balanced, micros: list[Any]) -> float:
    """Learned log-variances; what belongs to no example is divided by the micro-batches."""
    logged = 0.0
    for micro in micros:
        one = nll(model, micro) / targets(micros)
        two = pooled(model, micro).square().sum() / sizes(micros)
        weighted = torch.stack([one, two]) * (-model.log_variance).exp()
        loss = weighted.sum() + 0.5 * model.log_variance.sum() / len(micros)
        loss.backward()
        logged += loss.item()
    return logged


def spoken(examples: list[Tensor]) -> dict[str, Tensor]:
    pad = nn.utils.rnn.pad_sequence
    words = [row[: 1 + len(row) // 4] for row in examples]
    return {"frames": pad(examples, batch_first=True), "words": pad(words, batch_first=True)}


def speech(model: nn.Module, micros: list[Any]) -> None:
    """CTC of each utterance over its own words, by utterances."""
    count = sum(len(micro["frames"]) for micro in micros)
    for micro in micros:
        lengths, words = ((micro[key] != 0).sum(1) for key in ("frames", "words"))
        logits = model(micro["frames"]).log_softmax(-1).transpose(0, 1)
        losses = functional.ctc_loss(logits, micro["words"], lengths, words, reduction="none")
        ((losses / words).sum() / count).backward()


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time, self.body = nn.Linear(1, 10), nn.Linear(6, 10)
        self.out = nn.Linear(10, 6)

    def forward(self, noisy: Tensor, time: Tensor) -> Tensor:
        return self.out(torch.tanh(self.body(noisy) + self.time(time[:, None])))


def latents() -> list[tuple[Tensor, int]]:
    draw = torch.Generator().manual_seed(SEED)
    return [(torch.randn(6, generator=draw), at) for at in range(9)]


def latent_batch(examples: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
    """Noise and time belong to the example."""
    draws = [torch.Generator().manual_seed(100 + at) for _, at in examples]
    return {
        "clean": torch.stack([clean for clean, _ in examples]),
        "noise": torch.stack([torch.randn(6, generator=draw) for draw in draws]),
        "time": torch.cat([torch.rand(1, generator=draw) for draw in draws]),
    }


def denoise(model: nn.Module, micros: list[Any]) -> float:
    """Mean squares with a weight of each time, by examples."""
    count, logged = sum(len(micro["clean"]) for micro in micros), 0.0
    for micro in micros:
        time = micro["time"]
        noisy = (1 - time[:, None]) * micro["clean"] + time[:, None] * micro["noise"]
        errors = (model(noisy, time) - micro["noise"]).square().mean(1)
        loss = (errors / (0.1 + time)).sum() / count
        loss.backward()
        logged += float(loss.detach())
    return logged


def group_batch(examples: list[tuple[Tensor, int, float]]) -> dict[str, Tensor]:
    batch = collate([row for row, _, _ in examples])
    return {
        **batch,
        "group": torch.tensor([group for _, group, _ in examples]),
        "advantage": torch.tensor([advantage for _, _, advantage in examples]),
    }


def rollouts() -> list[tuple[Tensor, int, float]]:
    """Scored and compared with their group before training."""
    return [(row, at // 3, ((at * 5) % 7 - 3) / 3) for at, row in enumerate(rows(SEED))]


def policy(model: nn.Module, micros: list[Any]) -> None:
    """A clipped ratio to older scores that the row itself gives; over all tokens."""
    for micro in micros:
        log = -token_losses(model, micro)
        ratio = (log - log.detach() + 0.1 * torch.sin(micro["labels"][:, 1:].double())).exp()
        advantages = micro["advantage"][:, None]
        worst = torch.minimum(ratio * advantages, ratio.clamp(0.93, 1.07) * advantages)
        (-worst[real(micro)].sum() / targets(micros)).backward()


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.made, self.critic = Tiny(), nn.Sequential(nn.Linear(12, 8), nn.ELU(), nn.Linear(8, 1))


def penalty(model: Critic, micros: list[Any]) -> None:
    """A gradient penalty for each row, through two backwards."""
    for micro in micros:
        vectors = pooled(model.made, micro)
        between = (0.5 * vectors).detach().requires_grad_()
        (slope,) = torch.autograd.grad(model.critic(between).sum(), between, create_graph=True)
        loss = 10 * (slope.norm(dim=1) - 1).square().sum() + model.critic(vectors).sum()
        (loss / sizes(micros)).backward()


def two_players(model: Critic, micros: list[Any]) -> None:
    """The critic's step over all micro-batches, then the generator's against the new critic."""
    critic = torch.optim.Adam(model.critic.parameters(), lr=0.01)
    maker = torch.optim.SGD(model.made.parameters(), lr=0.05)
    for micro in micros:
        vectors = pooled(model.made, micro).detach()
        (functional.softplus(model.critic(vectors)).sum() / sizes(micros)).backward()
    critic.step()
    maker.zero_grad()
    for micro in micros:
        scores = model.critic(pooled(model.made, micro))
        (functional.softplus(-scores).sum() / sizes(micros)).backward()
    maker.step()


def adaptive_clip(model: nn.Module, micros: list[Any]) -> None:
    """Each weight's gradient is cut by that weight's norm, once, and decays by groups."""
    optimizer = torch.optim.AdamW(
        [{"params": [w], "weight_decay": 0.1 * (w.dim() > 1)} for w in model.parameters()], lr=0.02
    )
    for micro in micros:
        (nll(model, micro) / targets(micros)).backward()
    for weight in model.parameters():
        most = 0.01 * weight.detach().norm().clamp(min=1e-3)
        weight.grad *= (most / weight.grad.norm().clamp(min=1e-9)).clamp(max=1)
    optimizer.step()


def f_score(model: nn.Module, batches: list[Any]) -> dict[str, float]:
    """From hits, guesses and labels of all batches; padding left out. And the loss's exponent."""
    hits = guessed = wanted = 0
    loss = 0.0
    with torch.no_grad():
        for batch in batches:
            best = model(batch["input_ids"])[:, :-1].argmax(-1)[real(batch)] % 3 == 0
            labels = batch["labels"][:, 1:][real(batch)] % 3 == 0
            hits += int((best & labels).sum())
            guessed, wanted = guessed + int(best.sum()), wanted + int(labels.sum())
            loss += float(nll(model, batch))
    return {"f1": 2 * hits / max(1, guessed + wanted), "eval_loss": loss / targets(batches)}


def token_mean(model: nn.Module, micros: list[Any]) -> float:
    logged = 0.0
    for micro in micros:
        loss = nll(model, micro) / targets(micros)
        loss.backward()
        logged += loss.item()
    return logged


class Experts(Tiny):
    """One of three experts a token, no capacity."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(12, 3)
        self.experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))

    def routed(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.hidden(self.embed(ids)).cumsum(1))
        p = self.router(hidden).softmax(-1)
        chosen = functional.one_hot(p.argmax(-1), 3).to(p.dtype)
        made = torch.stack([expert(hidden) for expert in self.experts], -1)
        return self.head(hidden + (made * (chosen * p)[..., None, :]).sum(-1)), p


def experts(model: Experts, micros: list[Any]) -> None:
    """The balance of each sequence by itself."""
    for micro in micros:
        logits, p = model.routed(micro["input_ids"])
        held = (micro["input_ids"] != 0)[..., None]
        share = (functional.one_hot(p.argmax(-1), 3) * held).sum(1) / held.sum(1)
        balance = (share * (p * held).sum(1) / held.sum(1)).sum()
        loss = functional.cross_entropy(
            logits[:, :-1][real(micro)], micro["labels"][:, 1:][real(micro)], reduction="sum"
        )
        (loss / targets(micros) + 0.3 * balance / sizes(micros)).backward()


class Checkpointed(Tiny):
    def forward(self, ids: Tensor) -> Tensor:
        def block(hidden: Tensor) -> Tensor:
            return functional.dropout(torch.tanh(self.hidden(hidden)), 0.3, self.training)

        return self.head(checkpoint(block, self.embed(ids), use_reentrant=False).cumsum(1))


def frozen_teacher(model: Tiny, micros: list[Any]) -> None:
    """The eight likeliest tokens of a frozen teacher, and the rest as one."""
    teacher = copy.deepcopy(model).requires_grad_(False)
    for weight in teacher.parameters():
        weight.mul_(0.8)
    for micro in micros:
        wanted, at = teacher(micro["input_ids"])[:, :-1][real(micro)].softmax(-1).topk(8)
        logits = model(micro["input_ids"])[:, :-1][real(micro)].log_softmax(-1).gather(1, at)
        rest = (1 - logits.exp().sum(-1)).clamp(min=1e-9).log() * (1 - wanted.sum(-1))
        (-((wanted * logits).sum() + rest.sum()) / targets(micros)).backward()


SOUND = [
    Blind("two passes over vectors", of(two_passes)),
    Blind("codes follow once", of(codebook, model=Codes)),
    Blind("log-variances divided", of(balanced, model=Balanced)),
    Blind("CTC by utterances", of(speech, collate=spoken)),
    Blind("denoising, noise of the example", {
        "model": Denoiser, "examples": latents(), "collate": latent_batch, "step": denoise}),
    Blind("clipped ratio over all tokens", of(
        policy, examples=rollouts(), collate=group_batch)),
    Blind("gradient penalty of each row", of(penalty, model=Critic)),
    Blind("two players in turn", of(two_players, train=two_players, model=Critic)),
    Blind("adaptive clip, once", of(adaptive_clip, train=adaptive_clip)),
    Blind("F score of all batches", of(token_mean, evaluate=f_score)),
    Blind("experts, balance of each sequence", of(experts, model=Experts)),
    Blind("checkpointed, masks kept", of(token_mean, model=Checkpointed)),
    Blind("frozen teacher's likeliest", of(frozen_teacher)),
]  # fmt: skip
