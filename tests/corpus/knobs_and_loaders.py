"""Loops with sizes of their own, and loops whose own loader deals the rows."""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from kit import Case, Tiny, collate, nll, rows, targets
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, RandomSampler
from trainer_subclasses import over_items
from trainer_subclasses import rows as trainer_rows
from trainers import factory
from transformers import Trainer

AXES = ("micro-batch", "knobs")
LOADER = ("loader",)


class Counted:
    """Counts first, divides once; the batch is the window."""

    collate = staticmethod(collate)

    def __init__(self, seed: int) -> None:
        self.examples = rows(seed)

    def model(self) -> nn.Module:
        return Tiny()

    def loss(self, model: nn.Module, micro: Any) -> Tensor:
        return nll(model, micro)

    def step(self, model: nn.Module, micro_batches: list[Any]) -> None:
        total = targets(micro_batches)
        for micro in micro_batches:
            (self.loss(model, micro) / total).backward()


def token_losses(model: nn.Module, micro: Any) -> Tensor:
    logits, labels = model(micro["input_ids"])[:, :-1], micro["labels"][:, 1:]
    losses = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses[labels.flatten() != -100]


class TokenChunks(Counted):
    """The loss in chunks of tokens; an attribute of the subject."""

    knobs: ClassVar[Any] = {"chunk": (1, 7, 64)}
    chunk = 1000

    def loss(self, model: nn.Module, micro: Any) -> Tensor:
        return sum(each.sum() for each in token_losses(model, micro).split(self.chunk))


class MeanOfTokenChunks(TokenChunks):
    def loss(self, model: nn.Module, micro: Any) -> Tensor:
        chunks = token_losses(model, micro).split(self.chunk)
        return torch.stack([each.mean() for each in chunks]).mean() * targets([micro])


class LostRemainder(TokenChunks):
    """Chunks of one size: what is left over is lost."""

    chunk = 1

    def loss(self, model: nn.Module, micro: Any) -> Tensor:
        losses = token_losses(model, micro)
        return losses[: len(losses) // self.chunk * self.chunk].sum()


class RowChunks(Counted):
    """The micro-batch in parts of rows; a keyword of the step."""

    knobs: ClassVar[Any] = {"rows_at_once": (1, 2, 3)}
    means = False

    def step(self, model: nn.Module, micro_batches: list[Any], rows_at_once: int = 99) -> None:
        total = targets(micro_batches)
        for micro in micro_batches:
            ids, labels = (micro[key].split(rows_at_once) for key in ("input_ids", "labels"))
            parts = [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]
            for part in parts:
                share = targets([part]) / total
                if self.means:
                    share = targets([micro]) / total / len(parts)
                (nll(model, part, "mean") * share).backward()


class MeanOfRowChunks(RowChunks):
    means = True


class Recomputing(Tiny):
    """Recomputes its hidden layer or not: an attribute of the model."""

    recompute = False
    counts = False

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def inner(self, hidden: Tensor) -> Tensor:
        if self.counts:
            self.calls += 1
        return torch.tanh(self.hidden(hidden).cumsum(1))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        if self.recompute:
            hidden = checkpoint(self.inner, hidden, use_reentrant=False)
        else:
            hidden = self.inner(hidden)
        return self.head(hidden)


class Recomputes(Counted):
    knobs: ClassVar[Any] = {"recompute": (True, False)}
    network: type[nn.Module] = Recomputing

    def model(self) -> nn.Module:
        return self.network()


class CutsTheGraph(Recomputing):
    """Without recomputation's graph: the input needs no gradient, as of a reentrant checkpoint."""

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        return self.head(self.inner(hidden.detach() if self.recompute else hidden))


class LosesTheEmbedding(Recomputes):
    network = CutsTheGraph


class MovesTwice(Recomputing):
    """Weighs by a statistic that every forward moves, those that recompute too."""

    counts = True

    def forward(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            self.calls.zero_()
        return super().forward(ids)


class StatisticTwice(Recomputes):
    network = MovesTwice


class Contrast(Counted):
    """In-batch negatives over the whole window, in two passes of mini-batches."""

    knobs: ClassVar[Any] = {"mini_batch": (2, 5)}
    cached = True

    def vectors(self, model: Any, micro: Any, mini_batch: int) -> list[tuple[Tensor, Tensor]]:
        """The two sides of each pair, a mini-batch at a time."""
        parts = []
        for ids, labels in zip(
            micro["input_ids"].split(mini_batch), micro["labels"].split(mini_batch), strict=True
        ):
            real = (labels != -100).unsqueeze(-1)
            hidden = torch.tanh(model.hidden(model.embed(ids))) * real
            parts.append((hidden.sum(1), model.head(hidden.sum(1))[:, :12]))
        return parts

    def contrast(self, left: Tensor, right: Tensor) -> Tensor:
        return functional.cross_entropy(left @ right.T, torch.arange(len(left)), reduction="sum")

    def step(self, model: nn.Module, micro_batches: list[Any], mini_batch: int = 99) -> None:
        number = sum(len(micro["input_ids"]) for micro in micro_batches)
        if not self.cached:
            for micro in micro_batches:
                for left, right in self.vectors(model, micro, mini_batch):
                    (self.contrast(left, right) / number).backward()
            return
        with torch.no_grad():
            parts = [p for micro in micro_batches for p in self.vectors(model, micro, mini_batch)]
        leaves = [torch.cat(side).requires_grad_() for side in zip(*parts, strict=True)]
        wanted = torch.autograd.grad(self.contrast(*leaves) / number, leaves)
        at = 0
        for micro in micro_batches:
            for left, right in self.vectors(model, micro, mini_batch):
                held = slice(at, at + len(left))
                at += len(left)
                torch.autograd.backward([left, right], [each[held] for each in wanted])


class UncachedContrast(Contrast):
    cached = False


class Dealt(Counted):
    """Its own loader: batches of neighbours in length."""

    def loader(self, examples: list[Tensor], micro_batch_size: int) -> Iterator[Any]:
        by_length = sorted(examples, key=len)
        for at in range(0, len(by_length), micro_batch_size):
            yield collate(by_length[at : at + micro_batch_size])


class TokenBudget(Counted):
    """Micro-batches of up to so many tokens, as lists of examples; long ones stay alone."""

    drops = False

    def loader(self, examples: list[Tensor], micro_batch_size: int) -> Iterator[list[Tensor]]:
        budget, longest, held = 15 * micro_batch_size, max(map(len, examples)), []
        for row in examples:
            if self.drops and len(row) == longest:
                continue
            if held and sum(map(len, held)) + len(row) > budget:
                yield held
                held = []
            held.append(row)
        yield held


class DropsTheLong(TokenBudget):
    drops = True


class Sampled(Counted):
    """A sampler with a fixed seed, by torch's own loader."""

    replacement = False

    def loader(self, examples: list[Tensor], micro_batch_size: int) -> Any:
        draw = torch.Generator().manual_seed(1)
        sampler = RandomSampler(examples, self.replacement, generator=draw)
        return DataLoader(examples, micro_batch_size, sampler=sampler, collate_fn=collate)


class SampledWithReplacement(Sampled):
    replacement = True


class FillsTheLast(Counted):
    """Repeats the first examples so that all micro-batches are of one size."""

    def loader(self, examples: list[Tensor], micro_batch_size: int) -> Iterator[list[Tensor]]:
        filled = [*examples, *examples[: -len(examples) % micro_batch_size]]
        for at in range(0, len(filled), micro_batch_size):
            yield filled[at : at + micro_batch_size]


class OwnLoader(Trainer):
    """A sampler of its own, as sentence-transformers has."""

    replacement = False

    def get_train_dataloader(self) -> Any:
        draw = torch.Generator().manual_seed(self.args.seed)
        rows = self.train_dataset
        sampler = RandomSampler(rows, self.replacement, generator=draw)
        loader: Any = DataLoader(
            rows,
            self.args.per_device_train_batch_size,
            sampler=sampler,
            collate_fn=self.data_collator,
        )
        return self.accelerator.prepare(loader)


class WithReplacement(OwnLoader):
    replacement = True


class Budgeted(Trainer):
    """Batches of up to so many tokens."""

    def get_train_dataloader(self) -> Any:
        batches: list[list[int]] = [[]]
        for index, row in enumerate(self.train_dataset):
            held = sum(len(self.train_dataset[each]["input_ids"]) for each in batches[-1])
            if batches[-1] and held + len(row["input_ids"]) > 30:
                batches.append([])
            batches[-1].append(index)
        loader: Any = DataLoader(
            self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator
        )
        return self.accelerator.prepare(loader)


def trainer(kind: type[Trainer] = Trainer, **options: Any) -> Any:
    return lambda seed: factory(
        kind=kind, data=trainer_rows(seed), compute_loss_func=over_items, arguments=options
    )


def dealt(name: str, loop: Any, cause: str | None = None, **more: Any) -> Case:
    return Case(name, loop, cause, **{"axis": "loader", "axes": ("micro-batch", "loader"), **more})


def case(name: str, loop: Any, cause: str | None = None, **more: Any) -> Case:
    return Case(name, loop, cause, **{"axis": "knobs", "axes": AXES, **more})


CASES = [
    case("loss in chunks of tokens", TokenChunks),
    case("loss in chunks of rows", RowChunks),
    case("recomputation", Recomputes),
    case("cached contrast", Contrast),
    dealt("neighbours in length", Dealt),
    dealt("token budget", TokenBudget),
    dealt("sampler", Sampled),
    dealt("trainer that groups by length",
          trainer(train_sampling_strategy="group_by_length"), axes=LOADER),
    dealt("trainer with a sampler of its own", trainer(OwnLoader), axes=LOADER),
    dealt("trainer with a token budget", trainer(Budgeted), axes=LOADER),
    dealt("token budget that drops the long", DropsTheLong, "dropped-examples"),
    dealt("sampler with replacement", SampledWithReplacement, "duplicated-examples"),
    dealt("last micro-batch filled", FillsTheLast, "duplicated-examples"),
    dealt("trainer with replacement", trainer(WithReplacement), "duplicated-examples",
          axes=LOADER),
    dealt("trainer that drops the last", trainer(dataloader_drop_last=True), "dropped-examples",
          axes=LOADER),
    case("mean of chunks of tokens", MeanOfTokenChunks, "knob-dependent"),
    case("chunks lose the remainder", LostRemainder, "knob-dependent"),
    case("mean of chunks of rows", MeanOfRowChunks, "mean-of-means"),
    case("recomputation cuts the graph", LosesTheEmbedding, "weights-left-out"),
    case("statistic moves at each recomputation", StatisticTwice, "state-per-micro-batch"),
    case("contrast of mini-batches", UncachedContrast, "batch-coupled-term"),
]  # fmt: skip
