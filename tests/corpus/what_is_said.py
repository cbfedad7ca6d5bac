"""What is said, and of what a gradient is: fused losses, penalties, padding, masks drawn again."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from kit import Case, Tiny, nll, targets, tokens
from pairs import Convolved, Recurrent, Vectors, on_vectors, pair, points
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


class Squares(torch.autograd.Function):
    """Squared errors with weights; the backward forgets the weights, or not."""

    @staticmethod
    def forward(ctx: Any, errors: Tensor, weights: Tensor, right: bool) -> Tensor:
        ctx.save_for_backward(errors, weights)
        ctx.right = right
        return (errors.square() * weights).sum()

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, None, None]:
        errors, weights = ctx.saved_tensors
        return given * 2 * errors * (weights if ctx.right else 1.0), None, None


def fused_squares(right: bool) -> Any:
    def step(model: nn.Module, micros: list[Any]) -> float:
        logged = 0.0
        for micro in micros:
            errors = model(micro["x"])[:, 0] - micro["value"]
            loss = Squares.apply(errors, micro["weight"], right) / points(micros)
            loss.backward()
            logged += loss.item()
        return logged

    return on_vectors(step)


class Smoothed(torch.autograd.Function):
    """Cross entropy with smoothing; the backward is that of plain cross entropy, or right."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, right: bool) -> Tensor:
        log = logits.log_softmax(-1)
        ctx.save_for_backward(log.exp(), labels)
        ctx.right = right
        own = -log.gather(1, labels[:, None])[:, 0]
        return (0.9 * own - 0.1 * log.mean(-1)).sum()

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, None, None]:
        p, labels = ctx.saved_tensors
        wanted = functional.one_hot(labels, p.shape[1]).to(p.dtype)
        if ctx.right:
            wanted = 0.9 * wanted + 0.1 / p.shape[1]
        return given * (p - wanted), None, None


def fused_smoothing(right: bool) -> Any:
    def step(model: nn.Module, micros: list[Any]) -> float:
        logged = 0.0
        for micro in micros:
            real = micro["labels"][:, 1:] != -100
            logits = model(micro["input_ids"])[:, :-1][real]
            loss = Smoothed.apply(logits, micro["labels"][:, 1:][real], right) / targets(micros)
            loss.backward()
            logged += loss.item()
        return logged

    return tokens(step, model=Recurrent)


class SoftCap(torch.autograd.Function):
    """A soft cap of logits, whose backward is that of no cap, or right."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, right: bool) -> Tensor:
        capped = 0.5 * torch.tanh(logits / 0.5)
        ctx.save_for_backward(capped)
        ctx.right = right
        return capped

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, None]:
        (capped,) = ctx.saved_tensors
        return given * (1 - (capped / 0.5).square() if ctx.right else 1.0), None


def capped(right: bool) -> Any:
    def step(model: nn.Module, micros: list[Any]) -> float:
        logged = 0.0
        for micro in micros:
            loss = nll(lambda ids: SoftCap.apply(model(ids), right), micro) / targets(micros)
            loss.backward()
            logged += float(loss.detach())
        return logged

    return tokens(step, model=Convolved)


def penalised(
    right: bool, losses: Callable[[nn.Module, Any], tuple[Tensor, Tensor]], **names: Any
) -> Callable[[nn.Module, list[Any]], float]:
    """Optimises two sums; reports the first alone, or both."""

    def step(model: nn.Module, micros: list[Any]) -> float:
        logged = 0.0
        for micro in micros:
            main, other = losses(model, micro)
            (main + other).div(names["count"](micros)).backward()
            logged += float((main + other if right else main).detach()) / names["count"](micros)
        return logged

    return step


def sparse_states(right: bool) -> Any:
    def losses(model: Recurrent, micro: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        states = model.states(micro["input_ids"])[micro["labels"] != -100]
        return nll(model, micro), 0.05 * states.abs().sum()

    return tokens(penalised(right, losses, count=targets), model=Recurrent)


def near_a_prior(right: bool) -> Any:
    def losses(model: Vectors, micro: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        mean, spread, *_ = model(micro["x"]).T
        main = (mean - micro["value"]).square().sum()
        return main, 0.5 * (mean.square() + spread.exp() - spread - 1).sum()

    return on_vectors(penalised(right, losses, count=points))


def entropy_beside(right: bool) -> Any:
    def losses(model: Vectors, micro: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        log = model(micro["x"]).log_softmax(-1)
        chosen = log.gather(1, micro["kind"][:, None])[:, 0]
        return -(chosen * micro["weight"]).sum(), 0.1 * (log.exp() * log).sum()

    return on_vectors(penalised(right, losses, count=points))


def sound(model: nn.Module, micros: list[Any]) -> float:
    logged = 0.0
    for micro in micros:
        loss = nll(model, micro) / targets(micros)
        loss.backward()
        logged += loss.item()
    return logged


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    model.eval()
    with torch.no_grad():
        yield
    model.train()


def hits(model: nn.Module, batch: dict[str, Tensor], right: bool) -> tuple[int, int]:
    """Next tokens among the ten best guesses; of padding too, or not."""
    wanted = batch["input_ids"][:, 1:]
    found = (model(batch["input_ids"])[:, :-1].topk(10).indices == wanted[..., None]).any(-1)
    kept = wanted != 0 if right else torch.ones_like(found)
    return int((found & kept).sum()), int(kept.sum())


def accuracy_of_places(right: bool) -> Any:
    def evaluate(model: nn.Module, batches: list[Any]) -> dict[str, float]:
        with evaluating(model):
            counts = [hits(model, batch, right) for batch in batches]
        return {"accuracy": sum(own for own, _ in counts) / sum(number for _, number in counts)}

    return tokens(sound, model=Convolved, evaluate=evaluate)


def perplexity_of_padding(right: bool) -> Any:
    """Padding is a label like any other in the evaluation."""

    def evaluate(model: nn.Module, batches: list[Any]) -> dict[str, float]:
        total = count = 0.0
        with evaluating(model):
            for batch in batches:
                logits, wanted = model(batch["input_ids"])[:, :-1], batch["input_ids"][:, 1:]
                ignored = 0 if right else -100
                total += float(
                    functional.cross_entropy(
                        logits.transpose(1, 2), wanted, reduction="sum", ignore_index=ignored
                    )
                )
                count += float((wanted != ignored).sum())
        return {"eval_loss": total / count}

    return tokens(sound, model=Recurrent, evaluate=evaluate)


def errors_over_places(right: bool) -> Any:
    """Edits of a sequence over its padded length: of the batch, or its own."""

    def evaluate(model: nn.Module, batches: list[Any]) -> dict[str, float]:
        rates: list[float] = []
        with evaluating(model):
            for batch in batches:
                wanted, real = batch["input_ids"][:, 1:], batch["labels"][:, 1:] != -100
                wrong = (model(batch["input_ids"])[:, :-1].argmax(-1) != wanted) & real
                long = real.sum(1) if right else torch.full((len(real),), real.shape[1])
                rates += (wrong.sum(1) / long).tolist()
        return {"error_rate": sum(rates) / len(rates)}

    return tokens(sound, evaluate=evaluate)


def logged_accuracy(right: bool) -> Any:
    """The accuracy that training logs."""

    def step(model: nn.Module, micros: list[Any]) -> dict[str, float]:
        with torch.no_grad():
            counts = [hits(model, micro, right) for micro in micros]
        shown = sum(own for own, _ in counts) / sum(number for _, number in counts)
        return {"loss": sound(model, micros), "accuracy": shown}

    return tokens(step, model=Recurrent)


class Again(torch.autograd.Function):
    """A checkpoint by hand: runs a function again in the backward, from another state or not."""

    @staticmethod
    def forward(ctx: Any, run: Any, right: bool, given: Tensor, *weights: Tensor) -> Tensor:
        ctx.run, ctx.right, ctx.state = run, right, torch.get_rng_state()
        ctx.save_for_backward(given, *weights)
        with torch.no_grad():
            return run(given)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        given, *weights = ctx.saved_tensors
        after = torch.get_rng_state()
        if ctx.right:
            torch.set_rng_state(ctx.state)
        with torch.enable_grad():
            given = given.detach().requires_grad_()
            made = ctx.run(given)
        if ctx.right:
            torch.set_rng_state(after)
        return None, None, *torch.autograd.grad(made, [given, *weights], upstream)


class ByHand(Tiny):
    def __init__(self, right: bool) -> None:
        super().__init__()
        self.right = right

    def forward(self, ids: Tensor) -> Tensor:
        def run(hidden: Tensor) -> Tensor:
            return functional.dropout(torch.tanh(self.hidden(hidden)), 0.25, self.training)

        weights = (self.hidden.weight, self.hidden.bias)
        return self.head(Again.apply(run, self.right, self.embed(ids), *weights).cumsum(1))


def checkpointed_by_hand(right: bool) -> Any:
    return tokens(sound, model=lambda: ByHand(right))


class Deep(Vectors):
    """Two blocks with dropout, each computed again."""

    def __init__(self, right: bool) -> None:
        super().__init__()
        self.right, self.drop = right, nn.Dropout(0.3)
        self.more = nn.ModuleList(nn.Linear(11, 11) for _ in range(2))

    def states(self, x: Tensor) -> Tensor:
        hidden = super().states(x)
        for layer in self.more:

            def block(given: Tensor, layer: nn.Module = layer) -> Tensor:
                return given + self.drop(torch.relu(layer(given)))

            hidden = checkpoint(
                block, hidden, use_reentrant=not self.right, preserve_rng_state=self.right
            )
        return hidden


def blocks_again(right: bool) -> Any:
    def step(model: nn.Module, micros: list[Any]) -> float:
        logged = 0.0
        for micro in micros:
            errors = (model(micro["x"])[:, 0] - micro["value"]).square()
            loss = (errors * micro["weight"]).sum() / points(micros)
            loss.backward()
            logged += loss.item()
        return logged

    return on_vectors(step, model=lambda: Deep(right))


class Dropping(Convolved):
    def states(self, ids: Tensor) -> Tensor:
        return functional.dropout(super().states(ids), 0.2, self.training)


def second_pass(right: bool) -> Any:
    """Cached vectors, made once more for their gradients: with other masks, or the same."""

    def step(model: Dropping, micros: list[Any]) -> float:
        held, states = [], []
        for micro in micros:
            states.append(torch.get_rng_state())
            with torch.no_grad():
                held.append(model.states(micro["input_ids"])[:, 1])
        held = [each.requires_grad_() for each in held]
        loss = (torch.cat(held) - 0.1).pow(4).sum() / sum(map(len, held))
        loss.backward()
        for micro, each, state in zip(micros, held, states, strict=True):
            if right:
                torch.set_rng_state(state)
            (model.states(micro["input_ids"])[:, 1] * each.grad).sum().backward()
        return loss.item()

    return tokens(step, model=Dropping)


SAID, SCORED, AGAIN = "reported-not-optimised", "padding-scored", "recomputed-differently"

CASES: list[Case] = [
    *pair("fused squares forget weights", fused_squares, SAID, "reported"),
    *pair("fused smoothing is forgotten", fused_smoothing, SAID, "reported"),
    *pair("a soft cap without a slope", capped, SAID, "reported"),
    *pair("sparse states, not said", sparse_states, SAID, "reported"),
    *pair("near a prior, not said", near_a_prior, SAID, "reported"),
    *pair("entropy, not said", entropy_beside, SAID, "reported"),
    *pair("accuracy of places", accuracy_of_places, SCORED, "evaluation-batch"),
    *pair("perplexity of padding", perplexity_of_padding, SCORED, "evaluation-batch"),
    *pair("error rate over padded length", errors_over_places, SCORED, "evaluation-batch"),
    *pair("logged accuracy of places", logged_accuracy, SCORED, "reported"),
    *pair("a checkpoint by hand", checkpointed_by_hand, AGAIN, "dropout", axes=("dropout",)),
    *pair("blocks computed again", blocks_again, AGAIN, "dropout", axes=("dropout",)),
    *pair("a second pass with masks", second_pass, AGAIN, "dropout", axes=("dropout",)),
]
