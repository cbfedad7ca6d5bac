"""One run of one arm: train, and measure by the yardstick that all arms share."""

import itertools
import math
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from samestep.data.batching import StepPlan
from samestep.data.records import Records
from samestep.engine.counts import count_units
from samestep.engine.evaluate import evaluate
from samestep.engine.step import StepReport, backward, step
from samestep.engine.terms import LossFn
from samestep.errors import StepError
from samestep.study.memory import peak_bytes, reset_peak
from samestep.study.noise import estimates, micro_norms
from samestep.study.normalisation import COUNTERS, normalised
from samestep.study.results import Evaluations, Gradients, NoiseSums, Run, Steps
from samestep.study.spec import Normalisation
from samestep.train.batches import MicroBatches
from samestep.train.config import TrainConfig
from samestep.train.keyed import keyed
from samestep.train.optim import learning_rate, set_learning_rate
from samestep.train.setup import plans_of, set_up

DIVERGED = 2.0
"""A run whose token loss exceeds its first by this factor has diverged."""


@dataclass(frozen=True)
class Job:
    """Everything that a run depends on, and where it puts its weights.

    Attributes:
        key: Of the run in the cache.
        config: Model, data, batch, micro-batch, optimizer, seed, for `samestep.train`.
        normalisation: How the arm divides.
        gradient_steps: After how many updates to compare gradients; empty for the reference.
        eval_every: Steps between evaluations.
        weights: Where to write the final weights.
    """

    key: str
    config: TrainConfig
    normalisation: Normalisation
    gradient_steps: tuple[int, ...]
    eval_every: int
    weights: Path


def run_arm(job: Job) -> Run:
    """Train one arm with one seed.

    Args:
        job: What to run.

    Returns:
        What was measured; a run that diverges ends there, and says so.

    Raises:
        SamestepError: The model or the data cannot be used.
    """
    return _Trial(job).run()


class _Trial:
    """A run in progress."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.run_ = set_up(job.config)
        self.model: nn.Module = self.run_.model
        self.device = next(self.model.parameters()).device
        self.loss_fn = normalised(self.run_.objective.loss_fn, job.normalisation)
        self.initial = [weight.detach().cpu().clone() for weight in self.model.parameters()]
        self.steps, self.evaluations = Steps(), Evaluations()
        self.gradients, self.noise = Gradients(), NoiseSums()
        self.peaks: list[int] = []

    def run(self) -> Run:
        diverged = self._train()
        final = {name: w.detach().cpu() for name, w in self.model.named_parameters()}
        if diverged is None:
            save_file({name: w.contiguous() for name, w in final.items()}, self.job.weights)
        pace = [t / s for t, s in zip(self.steps.tokens, self.steps.seconds, strict=True)]
        return Run(
            seed=self.job.config.seed,
            key=self.job.key,
            padding=self._layout(),
            steps=self.steps,
            evaluations=self.evaluations,
            gradients=self.gradients,
            noise=self.noise,
            travelled=_distance(list(final.values()), self.initial),
            tokens_per_second=statistics.median(pace[1:] or pace or [0.0]),
            peak_bytes=max(self.peaks, default=None),
            diverged=diverged,
        )

    def _train(self) -> str | None:
        config = self.job.config
        reset_peak(self.device)
        for plan in itertools.islice(plans_of(self.run_.train, config), self.run_.steps):
            if plan.step % self.job.eval_every == 0:
                self._evaluate(plan.step)
            try:
                if plan.step in self.job.gradient_steps:
                    self._compare_gradients(plan)
                self._step(plan)
            except StepError as error:
                return f"after {plan.step} updates: {error}"
            first, last = self.steps.loss[0], self.steps.loss[-1]
            if last > DIVERGED * first:
                return (
                    f"after {plan.step} updates: token loss {last:.4g}, from {first:.4g} at first"
                )
        self._evaluate(self.run_.steps)
        return None

    def _step(self, plan: StepPlan) -> None:
        config = self.job.config
        lr = learning_rate(plan.step, total=self.run_.steps, config=config)
        set_learning_rate(self.run_.optimizer, lr)
        micros = list(self.run_.micro_batches.of(plan.examples, plan.step))
        loss_fn = self._keyed(self.loss_fn, plan)
        noisy = self.job.normalisation == "exact" and len(micros) > 1
        with micro_norms(self.model) if noisy else nullcontext() as norms:
            report = step(
                self.model,
                self.run_.optimizer,
                micros,
                loss_fn if norms is None else norms.watch(loss_fn),
                max_grad_norm=config.max_grad_norm,
                counters=COUNTERS,
            )
        self._record(report)
        if norms is not None:
            targets = [count_units([micro])["token"] for micro in micros]
            signal, variance = estimates(norms.read(), targets, norm=report.grad_norm)
            self.noise.signal.append(signal)
            self.noise.variance.append(variance)

    def _record(self, report: StepReport) -> None:
        if (peak := peak_bytes(self.device)) is not None:
            self.peaks.append(peak)
        self.steps.loss.append(report.terms["nll"])
        self.steps.objective.append(report.loss)
        self.steps.grad_norm.append(report.grad_norm)
        self.steps.targets.append(int(report.counts["token"]))
        self.steps.seconds.append(report.seconds)
        self.steps.tokens.append(report.tokens)

    def _evaluate(self, done: int) -> None:
        assert self.run_.evaluation is not None
        # Cut in the same way in every arm: the yardstick is not to be a part of what it measures.
        everything = range(len(self.run_.evaluation))
        micros = self._micro_batches(self.run_.evaluation, None).of(everything, 0)
        report = evaluate(self.model, micros, self.run_.objective.loss_fn)
        reset_peak(self.device)
        self.evaluations.step.append(done)
        self.evaluations.loss.append(report.terms["nll"])

    def _compare_gradients(self, plan: StepPlan) -> None:
        """The arm's gradient beside that of the undivided batch, at the same weights."""
        micros = list(self.run_.micro_batches.of(plan.examples, plan.step))
        backward(self.model, micros, self._keyed(self.loss_fn, plan), counters=COUNTERS)
        found = [_gradient(weight).clone() for weight in self.model.parameters()]
        undivided = self._micro_batches(self.run_.train, len(plan.examples))
        whole = list(undivided.of(plan.examples, plan.step))
        backward(self.model, whole, self._keyed(self.run_.objective.loss_fn, plan))
        wanted = [_gradient(weight) for weight in self.model.parameters()]
        difference, cosine, ratio = compared(found, wanted)
        self.model.zero_grad()
        del found, wanted, whole, micros
        reset_peak(self.device)
        self.gradients.step.append(plan.step)
        self.gradients.relative_difference.append(difference)
        self.gradients.cosine.append(cosine)
        self.gradients.ratio.append(ratio)

    def _micro_batches(self, records: Records, size: int | None) -> MicroBatches:
        """Cuts records into micro-batches of another size, or by tokens, in the arm's layout."""
        return MicroBatches(
            records,
            self.job.config.model_copy(update={"micro_batch": size}),
            padding=self._layout(),
            pad_id=self.run_.tokenizer.pad_token_id or 0,
            device=self.device,
        )

    def _layout(self) -> Any:
        """The layout in use: "auto" was settled when the model was asked."""
        if self.job.config.padding != "auto":
            return self.job.config.padding
        first = next(iter(self.run_.micro_batches.of([0], 0)))
        return "right" if "attention_mask" in first else "none"

    def _keyed(self, loss_fn: LossFn, plan: StepPlan) -> LossFn:
        return keyed(loss_fn, seed=self.job.config.seed, step=plan.step)


def _gradient(weight: nn.Parameter) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad.detach()


def compared(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> tuple[float, float, float]:
    """How two gradients differ, all weights taken as one vector; in float64.

    Args:
        found: The arm's gradient, by weight.
        wanted: The reference's.

    Returns:
        Norm of the difference over the norm of ``wanted``, the cosine, and norm over norm.
    """
    dot = sum(_dot(one, other) for one, other in zip(found, wanted, strict=True))
    norm_found = math.sqrt(sum(_dot(one, one) for one in found))
    norm_wanted = math.sqrt(sum(_dot(one, one) for one in wanted))
    if not norm_found or not norm_wanted:
        return math.nan, math.nan, math.nan
    apart = _distance(found, wanted)
    return apart / norm_wanted, dot / norm_found / norm_wanted, norm_found / norm_wanted


def _dot(one: Tensor, other: Tensor) -> float:
    return float(torch.dot(one.flatten().double(), other.flatten().double()))


def _distance(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """The 2-norm of the difference of two lists of tensors."""
    total = 0.0
    for one, other in zip(some, others, strict=True):
        apart = one.double() - other.double()
        total += _dot(apart, apart)
    return math.sqrt(total)
