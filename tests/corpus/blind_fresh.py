"""A second set of blind subjects, written before the causes that some of them need were added.

python tests/corpus/blind_fresh.py [--markdown FILE]     audits them all and writes what was said

Each is a loop in words of our own after a public thread, which its first line names where it is
one (owner/name#number), with the answers that are right. The bugs are in `blind_fresh.py`, the
sound ones in `blind_sound.py`. The diagnosis is not tuned to them.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from blind import Blind, hidden_of, token_losses
from blind import main as write
from blind_sound import SOUND, pooled
from kit import Tiny, collate, nll, rows, targets, tokens
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

SEED = 43


def of(step: Callable[..., Any], **names: Any) -> Any:
    return tokens(step, **names)(SEED)


def sizes(micros: list[Any]) -> int:
    return sum(len(micro["input_ids"]) for micro in micros)


def real(micro: dict[str, Tensor]) -> Tensor:
    return micro["labels"][:, 1:] != -100


def trusted_tokens(model: nn.Module, micros: list[Any]) -> None:
    """areal-project/AReaL#1546: tokens are kept while their mean square stays small."""
    for micro in micros:
        losses = token_losses(model, micro)[real(micro)]
        ranked = losses.detach().square().sort().values
        below = ranked.cumsum(0) / torch.arange(1, len(ranked) + 1) <= ranked.mean() * 0.6
        kept = losses.detach().square() <= ranked[max(0, int(below.sum()) - 1)]
        (losses[kept].sum() / targets(micros)).backward()


def token_means_by_rollouts(model: nn.Module, micros: list[Any]) -> None:
    """modelscope/twinkle#292: a token mean, weighted by the rollouts of the micro-batch."""
    for micro in micros:
        advantages = (micro["input_ids"][:, :1] % 3 - 1).double() + 0.5
        mean = (token_losses(model, micro) * advantages)[real(micro)].mean()
        (mean * len(advantages) / sizes(micros)).backward()


def chunks_but_the_last_detached(model: Tiny, micros: list[Any]) -> None:
    """huggingface/sentence-transformers#3862: of all mini-batches the last one has a gradient."""
    vectors = [pooled(model, micro) for micro in micros]
    vectors = [each.detach() for each in vectors[:-1]] + vectors[-1:]
    margins = (torch.cat(vectors).square().sum(1) - 1).abs().sum()
    (margins / sizes(micros)).backward()


def clips_in_the_chunk_loop(model: nn.Module, micros: list[Any]) -> None:
    """lukas-blecher/LaTeX-OCR#222: the norm is cut inside the loop over chunks."""
    for micro in micros:
        per_row = token_losses(model, micro).sum(1) / real(micro).sum(1)
        (per_row.mean() * len(per_row) / sizes(micros)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.02)


class Recomputing(Tiny):
    """openai/guided-diffusion#167: the recomputed block draws other dropout masks."""

    preserve = False

    def block(self, hidden: Tensor) -> Tensor:
        return functional.dropout(torch.tanh(self.hidden(hidden)), 0.3, self.training)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = checkpoint(
            self.block, self.embed(ids), use_reentrant=False, preserve_rng_state=self.preserve
        )
        return self.head(hidden.cumsum(1))


def logged_mean(model: nn.Module, micros: list[Any]) -> float:
    logged = 0.0
    for micro in micros:
        loss = nll(model, micro) / targets(micros)
        loss.backward()
        logged += loss.item()
    return logged


def dead_router_loss(model: Tiny, micros: list[Any]) -> float:
    """NVIDIA-NeMo/Automodel#1408: the auxiliary loss is logged, its gradient never arrives."""
    logged = 0.0
    for micro in micros:
        scores = hidden_of(model, micro["input_ids"])[:, :-1][real(micro)][:, :4]
        extra = scores.logsumexp(-1).square().sum().detach()
        loss = (nll(model, micro) + 0.3 * extra) / targets(micros)
        loss.backward()
        logged += loss.item()
    return logged


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(7, 14), nn.GELU(), nn.Linear(14, 4))

    def forward(self, anchors: Tensor) -> Tensor:
        return self.body(anchors)


def images() -> list[tuple[Tensor, Tensor]]:
    """Anchors of an image, 12 each, and which of them hold an object: few, and not alike."""
    draw = torch.Generator().manual_seed(SEED)
    held = [5, 1, 9, 3, 2, 7, 4, 11]
    return [
        (torch.randn(12, 7, generator=draw), (torch.arange(12) < number).float()) for number in held
    ]


def image_batch(examples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {
        "anchors": torch.stack([anchors for anchors, _ in examples]),
        "positive": torch.stack([positive for _, positive in examples]),
    }


def detection(step: Callable[..., Any]) -> dict[str, Any]:
    return {"model": Detector, "examples": images(), "collate": image_batch, "step": step}


def boxes_of_each(model: nn.Module, micros: list[Any]) -> None:
    """facebookresearch/detr#267: box losses over the boxes of the micro-batch, averaged."""
    for micro in micros:
        errors = model(micro["anchors"]).abs().sum(-1) * micro["positive"]
        (errors.sum() / micro["positive"].sum() / len(micros)).backward()


def focal_by_images(model: nn.Module, micros: list[Any]) -> None:
    """fizyr/keras-retinanet#339: over the positive anchors of the batch, weighted by images."""
    for micro in micros:
        scores = model(micro["anchors"])[..., 0]
        each = functional.binary_cross_entropy_with_logits(
            scores, micro["positive"], reduction="none"
        )
        focal = (1 - (-each).exp()) ** 2 * each
        share = len(scores) / sum(len(one["anchors"]) for one in micros)
        (focal.sum() / micro["positive"].sum() * share).backward()


class Critic(nn.Module):
    """A generator (hidden states) and a critic of them."""

    def __init__(self) -> None:
        super().__init__()
        self.made, self.critic = Tiny(), nn.Sequential(nn.Linear(12, 8), nn.ELU(), nn.Linear(8, 1))


def critic_cleared(model: Critic, micros: list[Any]) -> None:
    """ajbrock/BigGAN-PyTorch#25, the other way round: the critic is cleared a micro-batch."""
    for micro in micros:
        (nll(model.made, micro) / targets(micros)).backward()
        model.critic.zero_grad()
        vectors = pooled(model.made, micro).detach()
        (model.critic(vectors).sum() / sizes(micros)).backward()


def penalty_between(model: Critic, micros: list[Any]) -> None:
    """hwalsuklee/tensorflow-generative-model-collections#33: places are drawn a batch."""
    for micro in micros:
        vectors = pooled(model.made, micro)
        share = torch.rand(len(vectors), 1)
        between = (share * vectors).detach().requires_grad_()
        (slope,) = torch.autograd.grad(model.critic(between).sum(), between, create_graph=True)
        loss = (slope.norm(dim=1) - 1).square().sum() + model.critic(vectors).sum()
        (loss / sizes(micros)).backward()


def two_views(model: Tiny, micros: list[Any]) -> None:
    """mdiephuis/SimCLR#13: negatives are what shares the micro-batch, in both views."""
    for micro in micros:
        one, two = pooled(model, micro), model.embed(micro["input_ids"][:, 1])
        both = functional.normalize(torch.cat([one, two]), dim=-1)
        scores = (both @ both.T / 0.3).fill_diagonal_(-1e9)
        pairs = torch.arange(len(both)).roll(len(one))
        (functional.cross_entropy(scores, pairs, reduction="sum") / sizes(micros)).backward()


def group_batch(examples: list[tuple[Tensor, int, float]]) -> dict[str, Tensor]:
    batch = collate([row for row, _, _ in examples])
    return {
        **batch,
        "group": torch.tensor([group for _, group, _ in examples]),
        "reward": torch.tensor([reward for _, _, reward in examples]),
    }


def rollouts() -> list[tuple[Tensor, int, float]]:
    return [(row, int(at % 3 == 0), (at * 5 % 7) / 3) for at, row in enumerate(rows(SEED))]


def baseline_of_those_present(model: nn.Module, micros: list[Any]) -> None:
    """HorizonRobotics/alf#1642: a group's baseline is that of its members in the micro-batch."""
    for micro in micros:
        same = (micro["group"][:, None] == micro["group"]).to(micro["reward"].dtype)
        advantages = micro["reward"] + 0.1 - same @ micro["reward"] / same.sum(1)
        rows_of = token_losses(model, micro).sum(1)
        ((rows_of * advantages).sum() / targets(micros)).backward()


def divergence_by_micro_batch(model: nn.Module, micros: list[Any]) -> None:
    """huggingface/trl#2995: the policy over all tokens, its divergence over the micro-batch's."""
    for micro in micros:
        advantages = (micro["input_ids"][:, :1] % 4 - 1.5).double()
        losses = token_losses(model, micro)
        ratio = -losses - 3.0
        divergence = (ratio.exp() - ratio - 1)[real(micro)].mean() / len(micros)
        ((losses * advantages).sum() / targets(micros) + 0.2 * divergence).backward()


class Balanced(Tiny):
    """Two tasks, with a learned log-variance each."""

    def __init__(self) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.tensor([0.2, -0.3]))


def regular_in_each(model: Balanced, micros: list[Any]) -> None:
    """autonomousvision/transfuser#335: the log-variances themselves are added a micro-batch."""
    for micro in micros:
        one = nll(model, micro) / targets(micros)
        two = pooled(model, micro).square().sum() / sizes(micros)
        weighted = torch.stack([one, two]) * (-model.log_variance).exp()
        (weighted.sum() + 0.5 * model.log_variance.sum()).backward()


class Momentum(Tiny):
    """A queue of keys, as long as two micro-batches may be."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(5)
        self.register_buffer("queue", torch.randn(16, 12, generator=draw))


def enqueues(model: Momentum, micros: list[Any]) -> None:
    """A queue of negatives moves on at every micro-batch."""
    for micro in micros:
        query = functional.normalize(pooled(model, micro), dim=-1)
        keys = functional.normalize(model.embed(micro["input_ids"][:, 0]), dim=-1).detach()
        scores = torch.cat([(query * keys).sum(1, keepdim=True), query @ model.queue.T], 1)
        first = torch.zeros(len(query)).long()
        loss = functional.cross_entropy(scores / 0.5, first, reduction="sum")
        (loss / sizes(micros)).backward()
        model.queue = torch.cat([keys, model.queue])[: len(model.queue)]


class Student(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = Tiny().requires_grad_(False)


def teacher_follows(model: Student, micros: list[Any]) -> None:
    """A teacher by moving average follows at every micro-batch."""
    for micro in micros:
        wanted = model.teacher(micro["input_ids"])[:, :-1][real(micro)].softmax(-1)
        logits = model(micro["input_ids"])[:, :-1][real(micro)].log_softmax(-1)
        (-(wanted * logits).sum() / targets(micros)).backward()
        for own, other in zip(model.teacher.parameters(), model.parameters(), strict=False):
            own.data.lerp_(other.data, 0.05)


def spoken(examples: list[Tensor]) -> dict[str, Tensor]:
    pad = nn.utils.rnn.pad_sequence
    words = [row[: 1 + len(row) // 3] for row in examples]
    return {
        "frames": pad(examples, batch_first=True),
        "words": pad(words, batch_first=True),
    }


def utterances(model: nn.Module, micro: dict[str, Tensor]) -> Tensor:
    """CTC of each utterance over its words."""
    lengths, words = ((micro[key] != 0).sum(1) for key in ("frames", "words"))
    logits = model(micro["frames"]).log_softmax(-1).transpose(0, 1)
    losses = functional.ctc_loss(logits, micro["words"], lengths, words, reduction="none")
    return losses / words


def speech_by_frames(model: nn.Module, micros: list[Any]) -> None:
    """PaddlePaddle/PaddleSpeech#567: means over utterances, weighted by frames."""
    frames = [int((micro["frames"] != 0).sum()) for micro in micros]
    for micro, own in zip(micros, frames, strict=True):
        (utterances(model, micro).mean() * own / sum(frames)).backward()


def masked_features(model: Tiny, micros: list[Any]) -> None:
    """Features of a batch are masked at a place drawn for the batch."""
    for micro in micros:
        embedded = model.embed(micro["input_ids"])
        keep = torch.ones(embedded.shape[-1])
        keep[int(torch.randint(0, 9, ())) :][:3] = 0
        logits = model.head(torch.tanh(model.hidden(embedded * keep).cumsum(1)))[:, :-1]
        loss = functional.cross_entropy(logits[real(micro)], micro["labels"][:, 1:][real(micro)],
                                        reduction="sum")  # fmt: skip
        (loss / targets(micros)).backward()


def accuracy_with_padding(model: nn.Module, batches: list[Any]) -> dict[str, float]:
    """DaoyuanLi2816/Molecule-Generator#21: padding is right or wrong like any token."""
    right = places = 0
    with torch.no_grad():
        for batch in batches:
            guesses = model(batch["input_ids"]).topk(9).indices
            right += int((guesses == batch["input_ids"][..., None]).any(-1).sum())
            places += batch["input_ids"].numel()
    return {"accuracy": right / places}


def means_by_places(model: nn.Module, batches: list[Any]) -> dict[str, float]:
    """Adit-Jain-srm/NightmareNet#385: batch means, weighted by places, padding too."""
    with torch.no_grad():
        total = sum(float(nll(model, b, "mean")) * b["input_ids"].numel() for b in batches)
    return {"eval_loss": total / sum(batch["input_ids"].numel() for batch in batches)}


def logs_the_last(model: nn.Module, micros: list[Any]) -> float:
    """karpathy/nanochat#515: the loss of the last micro-batch is what is logged."""
    for micro in micros:
        loss = nll(model, micro) / targets(micros)
        loss.backward()
    return loss.item() * len(micros)


def shards_clip_alone(model: nn.Module, micros: list[Any]) -> None:
    """pytorch/pytorch#170862: each rank clips the weights that it keeps by their norm alone."""
    count = torch.tensor(float(targets(micros)))
    distributed.all_reduce(count)
    for micro in micros:
        (nll(model, micro) / count).backward()
    world = distributed.get_world_size()
    weights = list(model.parameters())
    for weight in weights:
        distributed.all_reduce(weight.grad)
    for rank in range(world):
        nn.utils.clip_grad_norm_(weights[rank::world], 0.05)


def scores_from_the_front(model: nn.Module, micros: list[Any]) -> None:
    """A teacher's scores are kept for the whole batch, and read from the front each time."""
    scores = torch.cat([(micro["input_ids"][:, :3].sum(1) % 5).double() for micro in micros])
    for micro in micros:
        own = token_losses(model, micro).sum(1) / real(micro).sum(1)
        ((own - scores[: len(own)]).square().sum() / len(scores)).backward()


def hardest_triplets(model: Tiny, micros: list[Any]) -> None:
    """The hardest positive and negative of the micro-batch, by the class of the first token."""
    for micro in micros:
        vectors = functional.normalize(pooled(model, micro), dim=-1)
        kind = micro["input_ids"][:, 0] % 2
        away = (2 - 2 * vectors @ vectors.T).clamp(min=1e-6).sqrt()
        same = kind[:, None] == kind
        far = away.masked_fill(~same, 0).max(1).values
        near = away.masked_fill(same, 2).min(1).values
        (functional.softplus(far - near).sum() / sizes(micros)).backward()


def classes_present(model: nn.Module, micros: list[Any]) -> None:
    """Balanced by class: means over each class's rows, averaged over the classes present."""
    for micro in micros:
        each = token_losses(model, micro).sum(1) / real(micro).sum(1)
        means = [each[micro["group"] == kind].mean() for kind in micro["group"].unique()]
        (torch.stack(means).mean() * len(each) / sizes(micros)).backward()


def two_passes_of_means(model: Tiny, micros: list[Any]) -> None:
    """Vectors first, then their gradients chunk by chunk, where a mean stands for a sum."""
    held = [pooled(model, micro).detach().requires_grad_() for micro in micros]
    (torch.cat(held) - 0.3).square().sum().div(sizes(micros)).backward()
    for micro, each in zip(micros, held, strict=True):
        (pooled(model, micro) * each.grad).sum(1).mean().backward()


BUGS = [
    Blind("tokens kept by a batch's mean square", of(trusted_tokens), ("batch-coupled-term",)),
    Blind("PPO token means by rollouts", of(token_means_by_rollouts), ("example-weighted",)),
    Blind("chunks but the last detached", of(chunks_but_the_last_detached),
          ("last-micro-batch-only",)),
    Blind("clipped in the chunk loop", of(clips_in_the_chunk_loop), ("clip-per-micro-batch",)),
    Blind("recomputed with other masks", of(logged_mean, model=Recomputing),
          ("recomputed-differently",), ("dropout",)),
    Blind("router loss logged, not optimised", of(dead_router_loss), ("reported-not-optimised",)),
    Blind("boxes of each micro-batch", detection(boxes_of_each), ("mean-of-means",)),
    Blind("focal by positives, by images", detection(focal_by_images), ("example-weighted",)),
    Blind("critic cleared a micro-batch", of(critic_cleared, model=Critic),
          ("last-micro-batch-only",)),
    Blind("gradient penalty at drawn places", of(penalty_between, model=Critic), ("rng",)),
    Blind("two views, NT-Xent", of(two_views), ("batch-coupled-term",)),
    Blind("group baseline of those present", of(
        baseline_of_those_present, examples=rollouts(), collate=group_batch),
        ("batch-coupled-term",)),
    Blind("divergence by micro-batch", of(divergence_by_micro_batch),
          ("second-term-per-micro-batch",)),
    Blind("log-variances in each", of(regular_in_each, model=Balanced),
          ("second-term-per-micro-batch",)),
    Blind("queue of negatives", of(enqueues, model=Momentum), ("state-per-micro-batch",)),
    Blind("teacher follows each time", of(teacher_follows, model=Student),
          ("state-per-micro-batch",)),
    Blind("CTC by frames", of(speech_by_frames, collate=spoken), ("example-weighted",)),
    Blind("features masked a batch", of(masked_features), ("rng",)),
    Blind("accuracy with padding", of(logged_mean, evaluate=accuracy_with_padding),
          ("padding-scored",)),
    Blind("evaluation means by places", of(logged_mean, evaluate=means_by_places),
          ("padding-scored", "eval-mean-of-means")),
    Blind("logs the last micro-batch", of(logs_the_last), ("reported-not-optimised",)),
    Blind("shards clipped alone", of(shards_clip_alone, wrap=None),
          ("partial-norm",), ("micro-batch", "ranks")),
    Blind("teacher's scores from the front", of(scores_from_the_front), ("misaligned-values",)),
    Blind("hardest triplets", of(hardest_triplets), ("batch-coupled-term",)),
    Blind("classes present", of(classes_present, examples=rollouts(), collate=group_batch),
          ("mean-of-means",)),
    Blind("two passes of means", of(two_passes_of_means), ("weighted-by-size",)),
]  # fmt: skip

if __name__ == "__main__":
    sys.exit(write([*BUGS, *SOUND]))
