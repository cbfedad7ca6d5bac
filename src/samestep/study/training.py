"""One run of one arm: `samestep.train` with the arm's loss, measured by the same metrics.

The only module of a study that uses the trainer.
"""

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
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
from samestep.study.arms import Arm
from samestep.study.normalisation import COUNTERS, apply_normalisation
from samestep.study.results import Evaluations, Gradients, NoiseSums, Run, Steps
from samestep.study.spec import StudySpec
from samestep.study.statistics import estimate_signal_and_variance, record_micro_batch_norms
from samestep.train.forward import with_keyed_dropout
from samestep.train.micro_batches import MicroBatches
from samestep.train.optim import learning_rate, set_learning_rate
from samestep.train.run_data import step_plans
from samestep.train.settings.base import TrainSettings, finalize
from samestep.train.settings.language import CausalLMSettings
from samestep.train.setup import set_up
from samestep.utils.memory import peak_memory_since_reset, reset_peak_memory

_DIVERGED = 2.0
"""A run whose token loss exceeds its first by this factor has diverged."""

_SHARED_FIELDS = (
    *("init", "steps", "optimizer", "schedule", "warmup", "weight_decay", "max_grad_norm"),
    *("precision", "device"),
)
"""Fields that a study hands on to the trainer as they are."""

_PLACES = {"model", "data", "eval_data", "tokenizer", "out", "device", "resume", "overwrite"}
"""Settings that name places; what stands there counts by its content."""


@dataclass(frozen=True)
class Task:
    """One arm with one seed: everything that its run depends on, and where its files go.

    Attributes:
        arm: The arm.
        seed: The seed.
        settings: Of the trainer.
        gradient_steps: After how many updates to compare gradients; empty for the reference.
        eval_every: Steps between evaluations.
        key: Of all that the run depends on.
        folder: Where the files go.
    """

    arm: Arm
    seed: int
    settings: TrainSettings
    gradient_steps: tuple[int, ...]
    eval_every: int
    key: str
    folder: Path

    @property
    def result_file(self) -> Path:
        """Where the finished run is kept."""
        return self.folder / f"{self.key}.json"

    @property
    def weights_file(self) -> Path:
        """Where the final weights are kept."""
        return self.folder / f"{self.key}.safetensors"


def train_settings(
    spec: StudySpec, arm: Arm, *, seed: int, model: str, rows: tuple[Path, Path], out: Path
) -> TrainSettings:
    """The settings of the trainer for one arm with one seed.

    Args:
        spec: The study.
        arm: The arm.
        seed: The seed.
        model: What `samestep.models.load.resolve_source` made of the spec's model.
        rows: The prepared training rows and evaluation rows.
        out: The study's folder.

    Returns:
        The settings, checked.

    Raises:
        ConfigError: They contradict each other.
    """
    data, eval_data = map(str, rows)
    return finalize(
        CausalLMSettings(
            model=model,
            tokenizer=spec.tokenizer,
            data=data,
            eval_data=eval_data,
            out=str(out),
            batch_size=arm.batch,
            micro_batch=arm.micro_batch,
            padding=arm.padding,
            lr=arm.lr,
            seed=seed,
            **{name: getattr(spec, name) for name in _SHARED_FIELDS},
        )
    )


def settings_content(settings: TrainSettings) -> dict[str, Any]:
    """The settings that a run depends on, as plain values, without those that name places.

    Args:
        settings: Of `train_settings`.

    Returns:
        Values by field.
    """
    return settings.model_dump(mode="json", exclude=_PLACES, exclude_unset=True)


def train_arm(task: Task) -> Run:
    """Train one arm with one seed.

    Args:
        task: What to run.

    Returns:
        What was measured; a run that diverges ends there, and says so.

    Raises:
        SamestepError: The model or the data cannot be used.
    """
    return _ArmTraining(task).run()


class _ArmTraining:
    """A run in progress."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.setup = set_up(task.settings)
        self.model: nn.Module = self.setup.model
        self.device = next(self.model.parameters()).device
        self.exact_loss_fn = self.setup.objective.loss_fn
        self.loss_fn = apply_normalisation(self.exact_loss_fn, task.arm.normalisation)
        self.initial = [weight.detach().cpu().clone() for weight in self.model.parameters()]
        self.steps, self.evaluations = Steps(), Evaluations()
        self.gradients, self.noise = Gradients(), NoiseSums()
        self.peaks: list[int] = []

    def run(self) -> Run:
        diverged = self._train()
        final = {name: w.detach().cpu() for name, w in self.model.named_parameters()}
        if diverged is None:
            weights = {name: weight.contiguous() for name, weight in final.items()}
            save_file(weights, self.task.weights_file)
        speeds = [t / s for t, s in zip(self.steps.tokens, self.steps.seconds, strict=True)]
        return Run(
            seed=self.task.seed,
            key=self.task.key,
            padding=self._padding(),
            steps=self.steps,
            evaluations=self.evaluations,
            gradients=self.gradients,
            noise=self.noise,
            distance_from_init=distance(zip(final.values(), self.initial, strict=True)),
            tokens_per_second=statistics.median(speeds[1:] or speeds or [0.0]),
            peak_bytes=max(self.peaks, default=None),
            diverged=diverged,
        )

    def _train(self) -> str | None:
        """Train to the end, or to where the run diverges; returns why and when it did."""
        reset_peak_memory(self.device)
        plans = step_plans(self.setup.train, self.task.settings)
        for plan in itertools.islice(plans, self.setup.steps):
            if plan.step % self.task.eval_every == 0:
                self._evaluate(plan.step)
            try:
                if plan.step in self.task.gradient_steps:
                    self._compare_gradients(plan)
                self._step(plan)
            except StepError as error:
                return f"after {plan.step} updates: {error}"
            first, last = self.steps.loss[0], self.steps.loss[-1]
            if last > _DIVERGED * first:
                return (
                    f"after {plan.step} updates: token loss {last:.4g}, from {first:.4g} at first"
                )
        self._evaluate(self.setup.steps)
        return None

    def _step(self, plan: StepPlan) -> None:
        settings = self.task.settings
        lr = learning_rate(plan.step, total=self.setup.steps, settings=settings)
        set_learning_rate(self.setup.optimizer, lr)
        micro_batches = list(self.setup.micro_batches.batches(plan.examples, plan.step))
        loss_fn = self._with_keyed_dropout(self.loss_fn, plan)
        measures_noise = self.task.arm.normalisation == "exact" and len(micro_batches) > 1
        with record_micro_batch_norms(self.model) if measures_noise else nullcontext() as norms:
            report = step(
                self.model,
                self.setup.optimizer,
                micro_batches,
                loss_fn if norms is None else norms.wrap_loss(loss_fn),
                max_grad_norm=settings.max_grad_norm,
                counters=COUNTERS,
                check_sums=False,  # arms are wrong on purpose, and each call of the loss counts
            )
        self._record(report)
        if norms is not None:
            targets = [count_units([micro_batch])["token"] for micro_batch in micro_batches]
            signal, variance = estimate_signal_and_variance(
                norms.squares(), targets, norm=report.grad_norm
            )
            self.noise.signal.append(signal)
            self.noise.variance.append(variance)

    def _record(self, report: StepReport) -> None:
        if (peak := peak_memory_since_reset(self.device)) is not None:
            self.peaks.append(peak)
        self.steps.loss.append(report.terms["nll"])
        self.steps.objective.append(report.loss)
        self.steps.grad_norm.append(report.grad_norm)
        self.steps.targets.append(int(report.counts["token"]))
        self.steps.seconds.append(report.seconds)
        self.steps.tokens.append(report.tokens)

    def _evaluate(self, updates: int) -> None:
        examples = self.setup.evaluations[""].records
        # Cut by tokens in every arm: the metric must not depend on the split that it measures.
        micro_batches = self._micro_batches(examples, None).batches(range(len(examples)), 0)
        report = evaluate(self.model, micro_batches, self.exact_loss_fn)
        reset_peak_memory(self.device)
        self.evaluations.step.append(updates)
        self.evaluations.loss.append(report.terms["nll"])

    def _compare_gradients(self, plan: StepPlan) -> None:
        """The arm's gradient beside that of the undivided batch, at the same weights."""
        micro_batches = list(self.setup.micro_batches.batches(plan.examples, plan.step))
        loss_fn = self._with_keyed_dropout(self.loss_fn, plan)
        backward(self.model, micro_batches, loss_fn, counters=COUNTERS)
        gradient = [_gradient(weight).clone() for weight in self.model.parameters()]
        cut = self._micro_batches(self.setup.train, len(plan.examples))
        undivided = list(cut.batches(plan.examples, plan.step))
        backward(self.model, undivided, self._with_keyed_dropout(self.exact_loss_fn, plan))
        reference = [_gradient(weight) for weight in self.model.parameters()]
        difference, cosine, ratio = compare_gradients(gradient, reference)
        self.model.zero_grad()
        del gradient, reference, undivided, micro_batches
        reset_peak_memory(self.device)
        self.gradients.step.append(plan.step)
        self.gradients.relative_difference.append(difference)
        self.gradients.cosine.append(cosine)
        self.gradients.ratio.append(ratio)

    def _micro_batches(self, records: Records, size: int | None) -> MicroBatches:
        """Cuts records into micro-batches of another size, or by tokens, in the arm's layout."""
        return MicroBatches(
            records,
            self.setup.collate,
            micro_batch=size,
            padded=self._padding() != "none",
            device=self.device,
        )

    def _padding(self) -> Any:
        """The padding in use; "auto" was settled for this model when it was set up."""
        if self.task.settings.padding != "auto":
            return self.task.settings.padding
        first = next(iter(self.setup.micro_batches.batches([0], 0)))
        return "right" if "attention_mask" in first else "none"

    def _with_keyed_dropout(self, loss_fn: LossFn, plan: StepPlan) -> LossFn:
        return with_keyed_dropout(loss_fn, seed=self.task.seed, step=plan.step)


def _gradient(weight: nn.Parameter) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad.detach()


def compare_gradients(
    gradient: Sequence[Tensor], reference: Sequence[Tensor]
) -> tuple[float, float, float]:
    """How two gradients differ, all weights taken as one vector; in float64.

    Args:
        gradient: The arm's gradient, by weight.
        reference: The reference's.

    Returns:
        Norm of the difference over the norm of ``reference``, the cosine, and norm over norm.
    """
    dot = sum(_dot(a, b) for a, b in zip(gradient, reference, strict=True))
    norm = math.sqrt(sum(_dot(part, part) for part in gradient))
    reference_norm = math.sqrt(sum(_dot(part, part) for part in reference))
    if not norm or not reference_norm:
        return math.nan, math.nan, math.nan
    difference = distance(zip(gradient, reference, strict=True))
    return difference / reference_norm, dot / norm / reference_norm, norm / reference_norm


def distance(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The 2-norm of the difference of two lists of tensors, in float64.

    Args:
        pairs: A tensor of each list; those of a pair have the same shape.

    Returns:
        The norm.
    """
    total = 0.0
    for a, b in pairs:
        difference = a.double() - b.double()
        total += _dot(difference, difference)
    return math.sqrt(total)


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.flatten().double(), b.flatten().double()))
