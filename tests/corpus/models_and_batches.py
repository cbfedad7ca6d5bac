"""Models and collators: batch statistics, padding that is seen, packs, LoRA, tied weights."""

from collections.abc import Callable
from typing import Any

import torch
from kit import Case, Tiny, V, collate, lengths, nll, targets, tokens
from peft import LoraConfig, get_peft_model
from token_loops import count_first, mean_of_means
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence
from transformers import LlamaConfig, LlamaForCausalLM


class Images(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3), norm(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        return self.body(pixels)


def images(norm: Callable[[int], nn.Module]) -> Callable[[int], dict[str, Any]]:
    def build(seed: int) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(seed)
        pixels = [torch.randn(1, 6, 6, generator=draw) for _ in lengths(seed)]
        return {
            "model": lambda: Images(norm),
            "examples": [(one, number % 3) for number, one in enumerate(pixels)],
            "collate": lambda rows: (
                torch.stack([x for x, _ in rows]),
                torch.tensor([y for _, y in rows]),
            ),
            "step": image_step,
        }

    return build


def image_step(model: nn.Module, micros: list[Any]) -> None:
    number = sum(len(y) for _, y in micros)
    for x, y in micros:
        (functional.cross_entropy(model(x), y, reduction="sum") / number).backward()


class Reader(nn.Module):
    """A recurrent classifier; with packed sequences padding is never read."""

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.packed = packed
        self.embed, self.rnn, self.head = nn.Embedding(V, 8), nn.GRU(8, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor, sizes: Tensor) -> Tensor:
        hidden = self.embed(ids).transpose(0, 1)
        if self.packed:
            hidden = pack_padded_sequence(hidden, sizes, enforce_sorted=False)
        _, last = self.rnn(hidden)
        return self.head(last[0])


def reader_batch(examples: list[Tensor]) -> dict[str, Tensor]:
    return {
        "ids": nn.utils.rnn.pad_sequence(examples, batch_first=True),
        "sizes": torch.tensor([len(row) for row in examples]),
        "labels": torch.tensor([int(row.sum()) % 3 for row in examples]),
    }


def read(model: nn.Module, micros: list[Any]) -> None:
    number = sum(len(micro["labels"]) for micro in micros)
    for micro in micros:
        logits = model(micro["ids"], micro["sizes"])
        loss = functional.cross_entropy(logits, micro["labels"], reduction="sum")
        (loss / number).backward()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.unused = nn.Embedding(V, 12), nn.Linear(2, 2)
        self.head = nn.Linear(12, V, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.ones(12), requires_grad=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, None]:
        return self.head((self.embed(ids) * self.frozen).cumsum(1)), None


def tied_step(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        (nll(lambda ids: model(ids)[0], micro) / targets(micros)).backward()


class Bidirectional(nn.Module):
    """Attends in both directions; with a mask or without."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.masked = masked
        self.embed, self.head = nn.Embedding(V, 12), nn.Linear(12, V)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.embed(ids)
        bias = mask[:, None, :].log() if self.masked else 0.0
        weights = (hidden @ hidden.transpose(1, 2) + bias).softmax(-1)
        return self.head(torch.tanh(weights @ hidden))


def bidirectional_batch(examples: list[Tensor]) -> dict[str, Tensor]:
    batch = collate(examples)
    return {**batch, "attention_mask": (batch["input_ids"] != 0).double()}


def bidirectional_step(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        mask = micro["attention_mask"]
        (nll(lambda ids, mask=mask: model(ids, mask), micro) / targets(micros)).backward()


def llama() -> Any:
    config = LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=512, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config)


def lora() -> Any:
    torch.manual_seed(1)
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)  # zeros would leave half of the gradient out
    return model


def transformers_step(model: Any, micros: list[Any]) -> float:
    count, total = targets(micros), 0.0
    for micro in micros:
        loss = model(**micro, num_items_in_batch=count).loss
        loss.backward()
        total += float(loss.detach())
    return total


def left_batch(examples: list[Tensor]) -> dict[str, Tensor]:
    batch = collate([row.flip(0) for row in examples])
    batch = {key: value.flip(1) for key, value in batch.items()}
    return {**batch, "attention_mask": (batch["input_ids"] != 0).long()}


class Learned(nn.Module):
    """Learned positions, counted from the left edge or from the first real token."""

    def __init__(self, from_edge: bool) -> None:
        super().__init__()
        self.from_edge = from_edge
        self.embed, self.places = nn.Embedding(V, 12), nn.Embedding(64, 12)
        self.head = nn.Linear(12, V)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        places = (mask.cumsum(1) - 1).clamp(min=0)
        if self.from_edge:
            places = torch.arange(ids.shape[1]).expand_as(ids)
        hidden = self.embed(ids) + self.places(places)
        return self.head(torch.tanh((hidden * mask[..., None]).cumsum(1)))


def learned_step(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        real = micro["attention_mask"]
        labels = micro["labels"].clone()
        labels[:, 1:][real[:, :-1] == 0] = -100  # never predicted from padding
        one = {**micro, "labels": labels}
        loss = nll(lambda ids, real=real: model(ids, real), one)
        (loss / sum(int((m["labels"] != -100).sum()) - len(m["labels"]) for m in micros)).backward()


def packed(examples: list[Tensor], *, borders: bool = True, restart: bool = True) -> Any:
    """All in one row."""
    labels = torch.cat(examples)
    starts = [sum(len(row) for row in examples[:at]) for at in range(len(examples))]
    if borders:
        labels[starts] = -100
    places = [torch.arange(len(row)) for row in examples]
    line = torch.cat(places) if restart else torch.arange(len(labels))
    number = torch.cat([torch.full((len(row),), at) for at, row in enumerate(examples)])
    return {
        "input_ids": torch.cat(examples)[None],
        "labels": labels[None],
        "position_ids": line[None],
        "sequence": number[None],
    }


class Packing(nn.Module):
    """Sums up what came before within the same sequence, or within the same row."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.apart = apart
        self.embed, self.places = nn.Embedding(V, 12), nn.Embedding(512, 12)
        self.head = nn.Linear(12, V)

    def forward(self, ids: Tensor, places: Tensor, sequence: Tensor) -> Tensor:
        causal = torch.ones(ids.shape[1], ids.shape[1]).tril()
        seen = causal * (sequence[:, :, None] == sequence[:, None, :] if self.apart else 1)
        hidden = self.embed(ids) + self.places(places)
        return self.head(torch.tanh(seen.to(hidden.dtype) @ hidden))


def packing_rows(examples: list[Tensor]) -> dict[str, Tensor]:
    batch = collate(examples)
    ids = batch["input_ids"]
    places = torch.arange(ids.shape[1]).expand_as(ids)
    return {**batch, "position_ids": places, "sequence": torch.zeros_like(ids)}


def packing_step(model: nn.Module, micros: list[Any]) -> None:
    count = targets(micros)
    for micro in micros:
        places, sequence = micro["position_ids"], micro["sequence"]
        loss = nll(lambda ids, p=places, s=sequence: model(ids, p, s), micro)
        (loss / count).backward()


def packing(apart: bool = True, step: Any = packing_step, **kinds: bool) -> Any:
    return tokens(
        step,
        model=lambda: Packing(apart),
        collate=packing_rows,
        pack=lambda examples: packed(examples, **kinds),
    )


def labels_counted_step(model: nn.Module, micros: list[Any]) -> None:
    """Right in rows, where every sequence gives up its first label; a pack has none to give up."""
    count = sum(micro["labels"].numel() if len(micro["labels"]) == 1 else targets([micro])
                for micro in micros)  # fmt: skip
    for micro in micros:
        loss = nll(lambda ids, m=micro: model(ids, m["position_ids"], m["sequence"]), micro)
        (loss / count).backward()


def filled_to_four(examples: list[Tensor]) -> dict[str, Tensor]:
    """Repeats the first rows until the batch holds a multiple of four."""
    return collate([*examples, *examples[: -len(examples) % 4]])


def cut_to_the_shortest(examples: list[Tensor]) -> dict[str, Tensor]:
    shortest = min(len(row) for row in examples)
    return collate([row[:shortest] for row in examples])


def padding_learned(examples: list[Tensor]) -> dict[str, Tensor]:
    """Padding has the label 0, a token like any other."""
    ids = nn.utils.rnn.pad_sequence(examples, batch_first=True)
    return {"input_ids": ids, "labels": ids}


def always_packed(apart: bool) -> Any:
    """A collator that packs: the leak shows wherever two sequences share a micro-batch."""
    return tokens(packing_step, model=lambda: Packing(apart), collate=packed)


CASES = [
    Case("image model with group norm", images(lambda width: nn.GroupNorm(2, width))),
    Case("recurrent, packed", tokens(read, model=lambda: Reader(True), collate=reader_batch)),
    Case("tied, frozen and unused weights, tuples", tokens(tied_step, model=Tied)),
    Case("both directions, masked", tokens(
        bidirectional_step, model=lambda: Bidirectional(True), collate=bidirectional_batch)),
    Case("Llama, items counted", tokens(transformers_step, model=llama)),
    Case("Llama with LoRA", tokens(transformers_step, model=lora)),
    Case("padded on the left, positions from the first token", tokens(
        learned_step, model=lambda: Learned(False), collate=left_batch)),
    Case("packed rows", packing()),
    Case("a collator that packs", always_packed(True)),
    Case("rows repeated, sums", tokens(count_first, collate=collate)),
    Case("image model with batch norm", images(nn.BatchNorm2d), "batch-coupled-term",
         also=()),
    Case("recurrent, padding read", tokens(
        read, model=lambda: Reader(False), collate=reader_batch), "padding-attended"),
    Case("both directions, not masked", tokens(
        bidirectional_step, model=lambda: Bidirectional(False), collate=bidirectional_batch),
        "padding-attended"),
    Case("padded on the left, positions from the edge", tokens(
        learned_step, model=lambda: Learned(True), collate=left_batch), "position-leak",
        "padding", also=("padding-attended",)),
    Case("pack that sees its neighbours", packing(False), "attention-leak", "packing"),
    Case("pack whose positions run on", packing(restart=False), "position-leak", "packing"),
    Case("pack with targets across borders", packing(borders=False), "boundary-target",
         "packing"),
    Case("a collator that packs, seeing neighbours", always_packed(False), "attention-leak",
         also=()),
    Case("LoRA, mean of means", tokens(mean_of_means, model=Tiny), "mean-of-means"),
    Case("rows cut to the shortest", tokens(count_first, collate=cut_to_the_shortest),
         "dropped-examples"),
    Case("padding is learned", tokens(count_first, collate=padding_learned), "padding-counted"),
    Case("rows repeated to fill the batch", tokens(count_first, collate=filled_to_four),
         "duplicated-examples"),
]  # fmt: skip
