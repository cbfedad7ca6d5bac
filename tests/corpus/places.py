"""Places: packs, padding on the left, and what a forward sees of its neighbours; and trainers."""

from typing import Any

import torch
from kit import Case, V, collate, nll, targets, tokens
from pairs import pair
from torch import Tensor, nn
from torch.nn import functional
from trainer_subclasses import AXES, over_items, rows, token_losses
from trainers import factory
from transformers import Trainer

WIDTH = 12


class Attention(nn.Module):
    """One layer of causal attention; what it may see and where tokens are come with the batch."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embed, self.place = nn.Embedding(V, WIDTH), nn.Embedding(512, WIDTH)
        self.qkv, self.head = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, V)

    def placed(self, ids: Tensor, places: Tensor) -> Tensor:
        hidden = self.embed(ids)
        if self.kind == "learned":
            return hidden + self.place(places)
        if self.kind == "waves":
            rates = 30.0 ** -(torch.arange(WIDTH) / WIDTH)
            return hidden + torch.sin(places[..., None] * rates + torch.arange(WIDTH) % 2)
        return hidden

    def forward(self, ids: Tensor, places: Tensor, seen: Tensor) -> Tensor:
        hidden = self.placed(ids, places)
        q, k, v = self.qkv(hidden).chunk(3, -1)
        scores = q @ k.transpose(1, 2) / WIDTH**0.5
        if self.kind == "distances":  # only how far apart two tokens are
            scores = scores - 0.1 * (places[:, :, None] - places[:, None])
        if self.kind == "turned":  # a rotation, made in float32
            scores = turned(q, places) @ turned(k, places).transpose(1, 2) / WIDTH**0.5
        causal = torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
        mixed = scores.masked_fill(~(seen & causal), -1e9).softmax(-1) @ v
        return self.head(hidden + mixed)


def turned(x: Tensor, places: Tensor) -> Tensor:
    angles = places[..., None].float() / 20.0 ** torch.linspace(0, 1, WIDTH // 2)
    one, two = x.chunk(2, -1)
    return torch.cat(
        [one * angles.cos() - two * angles.sin(), one * angles.sin() + two * angles.cos()], -1
    ).to(x.dtype)


def numbered(examples: list[Tensor]) -> dict[str, Tensor]:
    """A row each, padded on the right; the number of its sequence for every token, 0 for none."""
    batch = collate(examples)
    return {**batch, "number": (batch["input_ids"] != 0).long()}


def joined(examples: list[Tensor]) -> dict[str, Tensor]:
    """All in one row, without the labels at the borders."""
    labels = [torch.cat([row.new_tensor([-100]), row[1:]]) for row in examples]
    number = [torch.full_like(row, at) for at, row in enumerate(examples, start=1)]
    return {
        "input_ids": torch.cat(examples)[None],
        "labels": torch.cat(labels)[None],
        "number": torch.cat(number)[None],
    }


def steps_over(kind: str, *, restart: bool, apart: bool = True) -> Any:
    """Attends within the sequence of each token (or wherever), from places that start anew."""

    def forward(model: Attention, micro: dict[str, Tensor]) -> Tensor:
        number = micro["number"]
        same = number[:, :, None] == number[:, None]
        before = torch.arange(number.shape[1]).expand_as(number)
        places = same.tril().sum(-1) - 1 if restart else before
        seen = same if apart else (number > 0)[:, None].expand_as(same)
        return model(micro["input_ids"], places, seen)

    def step(model: Attention, micros: list[Any]) -> None:
        for micro in micros:
            loss = nll(lambda _, one=micro: forward(model, one), micro)
            (loss / targets(micros)).backward()

    return tokens(step, model=lambda: Attention(kind), collate=numbered, pack=joined)


def waves_run_on(right: bool) -> Any:
    return steps_over("waves", restart=right)


def learned_run_on(right: bool) -> Any:
    return steps_over("learned", restart=right)


def sees_the_pack(right: bool) -> Any:
    return steps_over("learned", restart=True, apart=right)


class Reads(nn.Module):
    """A recurrent reader, which starts anew at each sequence of a row, or reads on."""

    def __init__(self, anew: bool) -> None:
        super().__init__()
        self.anew = anew
        self.embed, self.cell = nn.Embedding(V, 8), nn.GRUCell(8, 10)
        self.head = nn.Linear(10, V)

    def forward(self, ids: Tensor, number: Tensor) -> Tensor:
        state = torch.zeros(len(ids), 10, dtype=self.head.weight.dtype)
        states = []
        for at in range(ids.shape[1]):
            if self.anew and at:
                state = state * (number[:, at] == number[:, at - 1])[:, None]
            state = self.cell(self.embed(ids[:, at]), state)
            states.append(state)
        return self.head(torch.stack(states, 1))


def reads_on(right: bool) -> Any:
    def step(model: Reads, micros: list[Any]) -> None:
        for micro in micros:
            loss = nll(lambda ids, one=micro: model(ids, one["number"]), micro)
            (loss / targets(micros)).backward()

    return tokens(step, model=lambda: Reads(right), collate=numbered, pack=joined)


def on_the_left(examples: list[Tensor]) -> dict[str, Tensor]:
    batch = {key: value.flip(1) for key, value in collate([r.flip(0) for r in examples]).items()}
    real = batch["labels"] != -100
    batch["labels"][~real.roll(1, 1) | (torch.arange(real.shape[1]) == 0)] = -100  # of the first
    return {**batch, "attention_mask": real.long()}


def left(kind: str, *, masked: bool, from_edge: bool) -> Any:
    def step(model: Attention, micros: list[Any]) -> None:
        for micro in micros:
            real = micro["attention_mask"]
            edge = torch.arange(real.shape[1]).expand_as(real)
            places = edge if from_edge else (real.cumsum(1) - 1).clamp(min=0)
            seen = (real if masked else torch.ones_like(real)).bool()[:, None] | torch.eye(
                real.shape[1]
            ).bool()
            loss = nll(lambda ids, p=places, s=seen: model(ids, p, s), micro)
            (loss / targets(micros)).backward()

    return tokens(step, model=lambda: Attention(kind), collate=on_the_left)


def waves_from_the_edge(right: bool) -> Any:
    return left("waves", masked=True, from_edge=not right)


def padding_in_view(right: bool) -> Any:
    return left("learned", masked=right, from_edge=False)


class Convolves(nn.Module):
    """Looks to both sides; padding is wiped out first, or not."""

    def __init__(self, wipes: bool) -> None:
        super().__init__()
        self.wipes = wipes
        self.embed, self.near = nn.Embedding(V, 9), nn.Conv1d(9, 9, 5, padding=2)
        self.head = nn.Linear(9, 3)

    def forward(self, ids: Tensor) -> Tensor:
        real = (ids != 0)[..., None]
        hidden = self.embed(ids) * (real if self.wipes else 1)
        near = torch.tanh(self.near(hidden.transpose(1, 2))).transpose(1, 2)
        return self.head((near * real).sum(1) / real.sum(1))


def looks_to_both_sides(right: bool) -> Any:
    def step(model: Convolves, micros: list[Any]) -> None:
        for micro in micros:
            kinds = micro["input_ids"][:, 0] % 3
            losses = functional.cross_entropy(model(micro["input_ids"]), kinds, reduction="sum")
            (losses / sum(len(one["input_ids"]) for one in micros)).backward()

    return tokens(step, model=lambda: Convolves(right))


class Contrasts(Trainer):
    """Rows against the rows of their micro-batch."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any
    ) -> Any:
        outputs = model(**{key: value for key, value in inputs.items() if key != "labels"})
        vectors = functional.normalize(outputs.logits[:, 0], dim=-1)
        scores = vectors @ vectors.detach().roll(1, -1).T / 0.1
        loss = functional.cross_entropy(scores, torch.arange(len(scores)))
        return (loss, outputs) if return_outputs else loss


class Decays(Trainer):
    """Weights shrink in every training step of a micro-batch."""

    def training_step(self, model: nn.Module, *args: Any, **options: Any) -> Tensor:
        loss = super().training_step(model, *args, **options)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(0.99)
        return loss


def by_rows(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Token means of the micro-batch by its rows: over a constant that is no count of the batch."""
    return token_losses(outputs, labels) / (labels[:, 1:] != -100).sum() * len(labels) / 8


def trained(**options: Any) -> Any:
    return lambda seed: factory(data=rows(seed), **options)


CASES: list[Case] = [
    *pair("packs whose waves run on", waves_run_on, "position-leak", "packing"),
    *pair("packs whose learned places run on", learned_run_on, "position-leak", "packing"),
    *pair("packs that see all of the row", sees_the_pack, "attention-leak", "packing"),
    *pair("packs that are read on", reads_on, "attention-leak", "packing"),
    *pair("waves from the left edge", waves_from_the_edge, "position-leak", "padding",
          also=("padding-attended",)),
    *pair("padding in view on the left", padding_in_view, "padding-attended", "padding",
          also=("position-leak",)),
    *pair("looks at padding on the right", looks_to_both_sides, "padding-attended", "padding"),
    Case("packs by distances run on", steps_over("distances", restart=False)),
    Case("packs by rotations run on", steps_over("turned", restart=False)),
    Case("rotations from the left edge", left("turned", masked=True, from_edge=True)),
    Case("distances from the left edge", left("distances", masked=True, from_edge=True)),
    Case("trainer, in-batch negatives", trained(kind=Contrasts), "batch-coupled-term", axes=AXES),
    Case("trainer, weights shrink each time", trained(kind=Decays, compute_loss_func=over_items),
         "state-per-micro-batch", axes=AXES),
    Case("trainer, token means by rows", trained(compute_loss_func=by_rows), "example-weighted",
         axes=AXES),
]  # fmt: skip
