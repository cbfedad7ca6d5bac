"""The training loop: plan, step, log, evaluate, save."""

import contextlib
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import samestep
from samestep.data.batching import StepPlan
from samestep.engine.collectives import (
    all_gather_object,
    gather_results,
    on_rank_0,
    run_or_fail_together,
)
from samestep.engine.evaluate import EvalReport, evaluate
from samestep.engine.parallel import is_sharded
from samestep.engine.step import StepReport, step
from samestep.engine.terms import LossFn
from samestep.errors import CheckpointError, Interrupted, NotFiniteError, StopRequestedError
from samestep.models.activations import ActivationOffload
from samestep.models.dropout import key_dropout
from samestep.train import checkpoint
from samestep.train.checkpoint_files import remove_checkpoints
from samestep.train.forward import find_nonfinite_rows, with_context
from samestep.train.launch import process_group
from samestep.train.micro_batches import MicroBatches, Report, retry_on_oom
from samestep.train.model_folder import save_model
from samestep.train.optim import learning_rate, set_learning_rate
from samestep.train.precision import choose_precision, one_step
from samestep.train.progress import Progress
from samestep.train.reporter import RunReporter
from samestep.train.resume import current_origin, first_progress
from samestep.train.rounded_updates import UpdateWatch
from samestep.train.run_folder import RunFolder
from samestep.train.settings.base import TrainSettings
from samestep.train.setup import TrainingSetup, set_up, step_plans
from samestep.train.signals import stop_signals
from samestep.train.watchdog import Watchdog, watch_ranks
from samestep.utils.files import write_atomically
from samestep.utils.memory import device_peak, process_peak
from samestep.utils.plugins import is_reference

log = logging.getLogger("samestep")

_KEPT_ON_THE_WAY = 2
"""Checkpoints kept while a run goes on, unless the settings say another number."""


def train(settings: TrainSettings) -> dict[str, Any]:
    """Train a model into ``settings.out``; on several ranks under torchrun.

    Args:
        settings: As `samestep.train.command.read_settings` or `finalize` gives them.

    Returns:
        What ``summary.json`` holds.

    Raises:
        ConfigError: A setting is wrong; nothing was written.
        DataError: The data cannot be used; nothing was written.
        StepError: A step was not finite, or did not fit into memory; the weights before it are in
            the last checkpoint.
        CheckpointError: A checkpoint or a log could not be written or read.
        RankError: Another rank died or hangs.
        Interrupted: Stopped by SIGINT or SIGTERM; the run is saved and can be resumed.
    """
    with (
        process_group(),
        stop_signals() as signals,
        watch_ranks(settings.rank_timeout) as watchdog,
    ):
        watchdog.begin("loading", "loading")
        settings = run_or_fail_together(lambda: choose_precision(settings))
        folder = RunFolder(Path(settings.out))
        on_rank_0(lambda: folder.hold(settings))
        try:
            setup = set_up(settings)
            origin = current_origin(setup, settings)
            progress = first_progress(setup, settings, folder=folder, origin=origin)
            on_rank_0(lambda: folder.open(settings))
            log.info(
                "threads: %d; wait policy %s",
                torch.get_num_threads(),
                os.environ.get("OMP_WAIT_POLICY", "of the OpenMP library").lower(),
            )
            with (
                RunReporter(folder, settings, total=setup.steps, done=progress.step) as reporter,
                signals.between_micro_batches(reporter.say),
            ):
                trainer = Trainer(
                    settings=settings,
                    folder=folder,
                    setup=setup,
                    reporter=reporter,
                    stop_signal=signals.number,
                    watchdog=watchdog,
                    progress=progress,
                    origin=origin,
                )
                trainer.run()
            watchdog.begin("export", "saving the model")
            on_rank_0(folder.check_held)
            save_model(setup.model, setup.tokenizer, folder=folder.model, merge=settings.merge)
            summary = _summary(trainer)
            on_rank_0(lambda: _write_summary(summary, folder))
            if settings.keep == 0:  # the model is what remains
                on_rank_0(lambda: remove_checkpoints(folder.checkpoints))
        finally:
            folder.close()
        return summary


def _write_summary(summary: dict[str, Any], folder: RunFolder) -> None:
    try:
        text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
        write_atomically(folder.summary, text)
    except OSError as error:
        raise CheckpointError(
            f"{folder.summary} could not be written ({error}); the model in {folder.model} is whole"
        ) from error


@dataclass(kw_only=True)
class Trainer:
    """A run under way, on one rank.

    Attributes:
        settings: The settings.
        folder: Where the run writes.
        setup: The model, the data, the optimizer.
        reporter: Logs and shows.
        stop_signal: Gives the number of the signal that asked to stop, or 0.
        watchdog: Is told what begins.
        progress: How far the run is.
        origin: What checkpoints keep of what the run depends on.
        evaluations: Those of this call, in order.
        clock: Seconds, for ``save_minutes``.
    """

    settings: TrainSettings
    folder: RunFolder
    setup: TrainingSetup
    reporter: RunReporter
    stop_signal: Callable[[], int]
    watchdog: Watchdog
    progress: Progress
    origin: dict[str, Any]
    evaluations: list[EvalReport] = field(default_factory=list)
    clock: Callable[[], float] = time.monotonic

    def run(self) -> None:
        """Train to the last step.

        Raises:
            Interrupted: A signal came; the run is saved.
        """
        self._saved = self.clock()
        self._updates = UpdateWatch(self.setup.model)
        try:
            self._evaluate_if_due()
            for plan in self._plans():
                self._step(plan)
                last = self.progress.step == self.setup.steps
                self._evaluate_if_due()
                # Every rank must do the same: rank 0's clock and anybody's signal count.
                asked = all_gather_object([self._overdue(), self.stop_signal()])
                due = asked[0][0] or _is_due(self.settings.save_every, self.progress.step)
                stopped = not last and any(signal for _, signal in asked)
                if last or (due and not stopped):
                    self._save()
                if stopped:
                    raise StopRequestedError
        except StopRequestedError:
            number = max(all_gather_object(self.stop_signal()))
            self._save()
            raise Interrupted(number, step=self.progress.step, out=self.settings.out) from None

    def _overdue(self) -> bool:
        """Whether the last checkpoint is ``save_minutes`` old."""
        minutes = self.settings.save_minutes
        return minutes is not None and self.clock() - self._saved >= 60 * minutes

    def _plans(self) -> Iterator[StepPlan]:
        plans = step_plans(self.setup.train, self.settings, start=self.progress.step)
        return itertools.takewhile(lambda plan: plan.step < self.setup.steps, plans)

    def _step(self, plan: StepPlan) -> None:
        lr = learning_rate(plan.step, total=self.setup.steps, settings=self.settings)
        set_learning_rate(self.setup.optimizer, lr)
        started = time.perf_counter()
        self._updates.before_step()
        try:
            report = self._optimizer_step(plan)
        except NotFiniteError as error:
            problem = f"{error}{self._nonfinite_rows(plan)}"
            if self.settings.not_finite == "stop":
                raise NotFiniteError(problem) from None
            report = _skipped(problem, seconds=time.perf_counter() - started)
        last = self.progress.step + 1 == self.setup.steps
        self._updates.after_step(report, lr=lr, last=last)
        after = self.setup.objective.after_step
        if after is not None:
            after(self.setup.model, report.skipped is None)
        self.progress = self.progress.after(report)
        done = self.progress.step
        self.watchdog.begin("log", f"step {done}, writing the log")
        on_rank_0(lambda: self.reporter.step(report, step=done, epoch=plan.progress, lr=lr))

    def _optimizer_step(self, plan: StepPlan) -> StepReport:
        setup = self.setup

        def attempt() -> StepReport:
            of_this_rank = setup.micro_batches.of_this_rank(plan.examples, plan.step)
            at = f"step {plan.step + 1}, collating micro-batch"
            with one_step(setup.micro_batches.device):
                return step(
                    setup.model,
                    setup.optimizer,
                    self.watchdog.each(of_this_rank, "micro-batch", at),
                    self._watched(
                        setup.objective.loss_fn,
                        step_number=plan.step,
                        number=setup.micro_batches.count(plan.examples),
                    ),
                    max_grad_norm=self.settings.max_grad_norm,
                    counters=setup.objective.counters,
                    # Only a loss of the user's own may be something else than a sum.
                    check_sums=is_reference(self.settings.objective),
                )

        return self._retry_on_oom(attempt, setup.micro_batches, indices=plan.examples)

    def _nonfinite_rows(self, plan: StepPlan) -> str:
        """The rows at fault, each run by itself, on every rank; nothing under FSDP2."""
        if is_sharded(self.setup.model):
            return ""
        objective, micro_batches = self.setup.objective, self.setup.micro_batches
        by_rank = gather_results(
            lambda: find_nonfinite_rows(
                self.setup.model,
                lambda index: next(micro_batches.batches([index], plan.step)),
                indices=micro_batches.rank_indices(plan.examples),
                loss_fn=self._watched(
                    objective.loss_fn, step_number=plan.step, number=len(plan.examples)
                ),
                counters=objective.counters,
            )
        )
        rows = [line for lines in by_rank for line in lines]
        return f". At fault: {'; '.join(rows)}" if rows else ""

    def _evaluate_if_due(self) -> None:
        """Evaluate before the first step, every ``eval_every`` and at the end; each time once."""
        done, micro_batches = self.progress.step, self.setup.eval_micro_batches
        due = done in (0, self.setup.steps) or _is_due(self.settings.eval_every, done)
        if micro_batches is None or not due or done in self.reporter.evaluated:
            return
        assert self.setup.evaluation is not None
        everything, objective = range(len(self.setup.evaluation)), self.setup.objective

        def attempt() -> EvalReport:
            of_this_rank = micro_batches.of_this_rank(everything, 0)
            at = f"evaluation after step {done}, collating micro-batch"
            with one_step(micro_batches.device):
                return evaluate(
                    self.setup.model,
                    self.watchdog.each(of_this_rank, "evaluation", at),
                    self._watched(objective.loss_fn, number=micro_batches.count(everything)),
                    counters=objective.counters,
                )

        report = self._retry_on_oom(attempt, micro_batches, indices=everything)
        self.evaluations.append(report)
        self.watchdog.begin("log", f"evaluation after step {done}, writing the log")
        on_rank_0(lambda: self.reporter.evaluation(report, step=done))
        self.reporter.evaluated.add(done)

    def _save(self) -> None:
        self.watchdog.begin("saving", f"saving step {self.progress.step}")
        on_rank_0(self.folder.check_held)
        checkpoint.save(
            self.folder.checkpoints,
            self.setup.model,
            optimizer=self.setup.optimizer,
            progress=self.progress,
            keep=self.settings.keep or _KEPT_ON_THE_WAY,
            origin=self.origin,
        )
        self._saved = self.clock()
        self.watchdog.begin("micro-batch", f"after saving step {self.progress.step}")

    def _watched(
        self, loss_fn: LossFn, *, step_number: int | None = None, number: int = 1
    ) -> LossFn:
        """The loss, each call after a look at signals, a heartbeat, and the keys of dropout.

        ``number`` says how many micro-batches there are.
        """
        # Under FSDP2 a rank must not leave a step alone: there a signal waits for the step's end.
        may_stop = not is_sharded(self.setup.model)
        numbers = itertools.count(1)
        phase = "evaluation" if step_number is None else "micro-batch"
        name = "evaluation" if step_number is None else f"step {step_number + 1}"

        @contextmanager
        def around_forward(model: Any, micro: Any) -> Iterator[None]:
            if may_stop and self.stop_signal():
                raise StopRequestedError("asked to stop")
            at = next(numbers)
            self.watchdog.begin(phase, f"{name}, micro-batch {at}")
            self.reporter.micro_batch(name, (at - 1) % number + 1, number)
            if step_number is not None:
                key_dropout(model, micro, seed=self.settings.seed, step=step_number)
            with (
                ActivationOffload(model)
                if self.settings.activation_offload
                else contextlib.nullcontext()
            ):
                yield

        return with_context(loss_fn, around_forward)

    def _retry_on_oom(
        self, work: Callable[[], Report], micro_batches: MicroBatches, *, indices: Sequence[int]
    ) -> Report:
        model = self.setup.model
        return retry_on_oom(
            model,
            work,
            micro_batches=micro_batches,
            indices=indices,
            recompute_activations=partial(self.setup.recipe.recompute_activations, model),
        )


def _skipped(reason: str, *, seconds: float) -> StepReport:
    log.warning("step skipped: %s", reason)
    return StepReport(
        loss=float("nan"),
        terms={},
        counts={},
        grad_norm=float("nan"),
        seconds=seconds,
        tokens=0,
        micro_batches=0,
        skipped=reason,
    )


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _summary(trainer: Trainer) -> dict[str, Any]:
    device = trainer.setup.micro_batches.device
    peaks, on_device = zip(
        *gather_results(lambda: (process_peak(), device_peak(device))), strict=True
    )
    known = [peak for peak in on_device if peak is not None]
    if known:
        log.info("%.1f GB of the device's memory at the peak", max(known) / 1e9)
    setup, progress, evaluations = trainer.setup, trainer.progress, trainer.evaluations
    return {
        "steps": progress.step,
        "skipped": progress.skipped,
        "examples": len(setup.train),
        "dropped": setup.train.dropped,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "evaluation_before": evaluations[0].loss if len(evaluations) > 1 else None,
        "evaluation_after": evaluations[-1].loss if evaluations else None,
        "trainable_parameters": sum(
            weight.numel() for weight in setup.model.parameters() if weight.requires_grad
        ),
        "ranks": len(peaks),
        "peak_resident_bytes": max(peaks),
        "peak_device_bytes": max(known, default=None),
        "model": str(trainer.folder.model),
        "samestep": samestep.__version__,
        "torch": torch.__version__,
    }
