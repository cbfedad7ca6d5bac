"""What moves between micro-batches: averages, rates, weights, buffers; right if once a step."""

from typing import Any

import torch
from kit import Case, Tiny, nll, targets, tokens, trained
from pairs import Convolved, Recurrent, Vectors, on_vectors, pair, points
from torch import Tensor, nn
from torch.nn import functional


class Followed(Recurrent):
    """With a frozen copy that follows."""

    def __init__(self) -> None:
        super().__init__()
        self.shadow = Recurrent().requires_grad_(False)

    def follow(self) -> None:
        for own, other in zip(self.shadow.parameters(), self.parameters(), strict=False):
            own.data.mul_(0.95).add_(other.data, alpha=0.05)


def averages(right: bool) -> Any:
    def train(model: Followed, micros: list[Any]) -> None:
        optimizer = torch.optim.AdamW(list(model.parameters())[:7], lr=0.02)
        for micro in micros:
            (nll(model, micro) / targets(micros)).backward()
            if not right:
                model.follow()
        optimizer.step()
        if right:
            model.follow()

    return trained(train, model=Followed)


class Averaged(Vectors):
    """With the average of its last layer in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(4, 11))


def averages_in_a_buffer(right: bool) -> Any:
    def step(model: Averaged, micros: list[Any]) -> None:
        for at, micro in enumerate(micros):
            errors = (model(micro["x"])[:, 0] - micro["value"]).square()
            (errors.sum() / points(micros)).backward()
            if not right or at == 0:
                model.average.lerp_(model.two.weight.detach(), 0.2)

    return on_vectors(step, model=Averaged)


def mean_teacher(right: bool) -> Any:
    """The copy is a teacher: what it says changes as it follows."""

    def step(model: Followed, micros: list[Any]) -> None:
        for micro in micros:
            real = micro["labels"] != -100
            wanted = model.shadow.states(micro["input_ids"])[real]
            apart = (model.states(micro["input_ids"])[real] - wanted).square().sum()
            (apart / sum(int((one["labels"] != -100).sum()) for one in micros)).backward()
            if not right:
                model.follow()
        if right:
            model.follow()

    return tokens(step, model=Followed)


def one_cycle(right: bool) -> Any:
    def train(model: nn.Module, micros: list[Any]) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=40)
        for micro in micros:
            (nll(model, micro) / targets(micros)).backward()
            if not right:
                optimizer._opt_called = True  # as after an earlier step
                schedule.step()
        optimizer.step()
        if right:
            schedule.step()

    return trained(train, model=Convolved)


def warms_up_by_hand(right: bool) -> Any:
    """The rate follows a count: of micro-batches, or of steps."""

    def train(model: nn.Module, micros: list[Any]) -> None:
        optimizer, count = torch.optim.SGD(model.parameters(), lr=0.0), 0
        for micro in micros:
            losses = functional.cross_entropy(model(micro["x"]), micro["kind"], reduction="sum")
            (losses / points(micros)).backward()
            count += not right
        optimizer.param_groups[0]["lr"] = 0.02 * (count + right)
        optimizer.step()

    return on_vectors(train, train=train)


def halves_its_rate(right: bool) -> Any:
    """A schedule of the head alone."""

    def train(model: Recurrent, micros: list[Any]) -> None:
        body = [*model.embed.parameters(), *model.read.parameters()]
        optimizer = torch.optim.SGD([{"params": body}, {"params": model.head.parameters()}], lr=0.1)
        rows = sum(len(micro["labels"]) for micro in micros)
        for micro in micros:
            (nll(model, micro) / rows).backward()
            if not right:
                optimizer.param_groups[1]["lr"] *= 0.5
        optimizer.step()
        if right:
            optimizer.param_groups[1]["lr"] *= 0.5

    return trained(train, model=Recurrent)


def decays_matrices(right: bool) -> Any:
    def train(model: nn.Module, micros: list[Any]) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
        for at, micro in enumerate(micros):
            (nll(model, micro) / targets(micros)).backward()
            if not right or at == len(micros) - 1:
                for weight in model.parameters():
                    if weight.dim() > 1:
                        weight.data.mul_(0.98)
        optimizer.step()

    return trained(train, model=Convolved)


def projects_rows(right: bool) -> Any:
    """Embeddings are brought to unit length."""

    def train(model: Tiny, micros: list[Any]) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def project() -> None:
            model.embed.weight.data = functional.normalize(model.embed.weight.data, dim=-1)

        for micro in micros:
            (nll(model, micro) / targets(micros)).backward()
            if not right:
                project()
        optimizer.step()
        project()

    return trained(train)


def clamps_weights(right: bool) -> Any:
    """As a critic's are."""

    def train(model: Vectors, micros: list[Any]) -> None:
        optimizer = torch.optim.RMSprop(model.parameters(), lr=0.01)
        for micro in micros:
            score = model(micro["x"])[:, 0] * (2 * micro["group"] - 1)
            (score.sum() / points(micros)).backward()
            if not right:
                for weight in model.parameters():
                    weight.data.clamp_(-0.15, 0.15)
        optimizer.step()
        for weight in model.parameters():
            weight.data.clamp_(-0.15, 0.15)

    return on_vectors(train, train=train)


class Scaled(Vectors):
    """Values are predicted in units of their running size."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("size", torch.ones(()))


def running_size(right: bool) -> Any:
    def step(model: Scaled, micros: list[Any]) -> None:
        sizes = []
        for micro in micros:
            sizes.append(micro["value"].abs())
            if not right:
                model.size.lerp_(sizes[-1].mean().to(model.size.dtype), 0.3)
            errors = model(micro["x"])[:, 0] - micro["value"] / model.size
            (functional.huber_loss(errors, torch.zeros_like(errors), reduction="sum")
             / points(micros)).backward()  # fmt: skip
        if right:
            model.size.lerp_(torch.cat(sizes).mean().to(model.size.dtype), 0.3)

    return on_vectors(step, model=Scaled)


class Cooling(Recurrent):
    """The temperature of its softmax falls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("temperature", torch.tensor(1.5))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.states(ids)) / self.temperature


def cools(right: bool) -> Any:
    def step(model: Cooling, micros: list[Any]) -> None:
        for micro in micros:
            (nll(model, micro) / targets(micros)).backward()
            if not right:
                model.temperature.copy_(model.temperature * 0.97)
        if right:
            model.temperature.copy_(model.temperature * 0.97)

    return tokens(step, model=Cooling)


class Biased(Tiny):
    """Experts that are chosen by scores and biases; a bias has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(12, 4), nn.Parameter(torch.randn(4, 12) * 0.3)
        self.register_buffer("bias", torch.zeros(4))

    def chosen(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.hidden(self.embed(ids)).cumsum(1))
        p = self.router(hidden).softmax(-1)
        one = functional.one_hot((p + self.bias).argmax(-1), 4).to(p.dtype)
        return self.head(hidden + (one * p) @ self.experts), one


def balances_by_biases(right: bool) -> Any:
    """Biases rise where few tokens went: at every micro-batch, or once by all of them."""

    def step(model: Biased, micros: list[Any]) -> None:
        load = torch.zeros_like(model.bias)
        for micro in micros:
            logits, one = model.chosen(micro["input_ids"])
            (nll(lambda _, given=logits: given, micro) / targets(micros)).backward()
            load += one[micro["labels"] != -100].sum(0)
            if not right:
                model.bias.add_(torch.sign(load.mean() - load), alpha=0.1)
        if right:
            model.bias.add_(torch.sign(load.mean() - load), alpha=0.1)

    return tokens(step, model=Biased)


STATE = "state-per-micro-batch"

CASES: list[Case] = [
    *pair("a copy follows each time", averages, STATE),
    *pair("an average in a buffer", averages_in_a_buffer, STATE),
    *pair("a teacher follows each time", mean_teacher, STATE),
    *pair("one cycle, each time", one_cycle, STATE),
    *pair("warms up by micro-batches", warms_up_by_hand, STATE),
    *pair("the head's rate halves each time", halves_its_rate, STATE),
    *pair("matrices decay each time", decays_matrices, STATE),
    *pair("embeddings projected each time", projects_rows, STATE),
    *pair("a critic clamped each time", clamps_weights, STATE),
    *pair("values in their running size", running_size, STATE),
    *pair("a temperature falls each time", cools, STATE),
    *pair("experts' biases move each time", balances_by_biases, STATE),
]
