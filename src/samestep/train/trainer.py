"""The training loop: plan, step, log, evaluate, save."""

import contextlib
import itertools
import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import samestep
from samestep.data.batching import StepPlan
from samestep.engine.collectives import all_gather_object, gather_results, on_rank_0
from samestep.engine.evaluate import EvalReport, evaluate
from samestep.engine.parallel import is_sharded
from samestep.engine.step import StepReport, step
from samestep.engine.terms import LossFn, LossResult
from samestep.engine.two_pass import TwoPass
from samestep.errors import ConfigError, Interrupted, NotFiniteError, StopRequestedError
from samestep.models.activations import ActivationOffload
from samestep.models.dropout import key_dropout
from samestep.train import checkpoint
from samestep.train.batches import MicroBatches
from samestep.train.checkpoint import Progress
from samestep.train.config import TrainConfig
from samestep.train.culprits import culprits
from samestep.train.data_print import DataPrint
from samestep.train.export import save_model
from samestep.train.group import process_group
from samestep.train.interrupt import interruptible
from samestep.train.optim import learning_rate, set_learning_rate
from samestep.train.recorder import Recorder
from samestep.train.replan import Report, within_memory
from samestep.train.run_folder import RunFolder
from samestep.train.setup import Run, plans_of, set_up
from samestep.train.watch import Watch, watched
from samestep.utils.files import write_atomically

log = logging.getLogger("samestep")


def train(config: TrainConfig) -> dict[str, Any]:
    """Train a model as configured, into ``config.out``; on several ranks under torchrun.

    Args:
        config: The settings, as `samestep.train.arguments.read_config` or `checked` gives them.

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
    with process_group():
        folder = RunFolder(Path(config.out))
        on_rank_0(lambda: folder.check(config))
        run = set_up(config)
        on_rank_0(lambda: folder.open(config))
        try:
            progress = _first_progress(run, config, folder)
            with (
                Recorder(folder, config, total=run.steps, done=progress.step) as recorder,
                interruptible(recorder.say) as stop_asked,
                watched(config.rank_timeout) as watch,
            ):
                loop = Loop(config, folder, run, recorder, stop_asked, watch, progress)
                loop.run_to_the_end()
            save_model(run.model, run.tokenizer, folder.model, merge=config.merge)
            summary = _summary(run, folder, loop)
            text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
            on_rank_0(lambda: write_atomically(folder.summary, text))
        finally:
            folder.close()
        return summary


def _first_progress(run: Run, config: TrainConfig, folder: RunFolder) -> Progress:
    """Where the run starts: at its last whole checkpoint if it is resumed, else at step 0."""
    data = DataPrint.of(run.train)
    found = checkpoint.newest_whole(folder.checkpoints) if config.resume else None
    if found is None:
        if config.resume:
            log.warning("resume: there is no checkpoint in %s: starting at step 0", folder.root)
        return Progress(step=0, tokens=0, seconds=0.0, skipped=0, data=data)
    progress = checkpoint.load(found, run.model, run.optimizer)
    difference = progress.data.difference(data)
    if difference:
        raise ConfigError(
            f"resume: the training rows are not those of {found}: {config.data} or the tokenizer "
            f"has changed since ({difference}). Restore it, or start anew with --overwrite"
        )
    log.info("resuming after step %d, from %s", progress.step, found)
    return progress


@dataclass
class Loop:
    """A run under way, on one rank.

    Attributes:
        config: The settings.
        folder: Where the run writes.
        run: The model, the data, the optimizer.
        recorder: Logs and shows.
        stop_asked: The number of the signal that asked to stop, or 0.
        watch: Told where this rank is.
        progress: How far the run is.
        evaluations: Those of this call, in order.
    """

    config: TrainConfig
    folder: RunFolder
    run: Run
    recorder: Recorder
    stop_asked: Callable[[], int]
    watch: Watch
    progress: Progress
    evaluations: list[EvalReport] = field(default_factory=list)

    def run_to_the_end(self) -> None:
        """Train to the last step, or until a signal; then save and raise `Interrupted`."""
        try:
            self._evaluate_if_due()
            for plan in self._plans():
                self._one_step(plan)
                last = self.progress.step == self.run.steps
                self._evaluate_if_due()
                if last or _due(self.config.save_every, self.progress.step):
                    self._save()
                if not last and any(all_gather_object(self.stop_asked())):
                    raise StopRequestedError
        except StopRequestedError:
            number = max(all_gather_object(self.stop_asked()))
            self._save()
            raise Interrupted(number) from None

    def _plans(self) -> Iterator[StepPlan]:
        plans = plans_of(self.run.train, self.config, start=self.progress.step)
        return itertools.takewhile(lambda plan: plan.step < self.run.steps, plans)

    def _one_step(self, plan: StepPlan) -> None:
        lr = learning_rate(plan.step, total=self.run.steps, config=self.config)
        set_learning_rate(self.run.optimizer, lr)
        started = time.perf_counter()
        try:
            report = self._step(plan)
        except NotFiniteError as error:
            problem = f"{error}{self._culprits(plan)}"
            if self.config.not_finite == "stop":
                raise NotFiniteError(problem) from None
            report = _skipped(problem, seconds=time.perf_counter() - started)
        after = self.run.objective.after_step
        if after is not None:
            after(self.run.model, report.skipped is None)
        self.progress = _after(self.progress, report)
        done = self.progress.step
        on_rank_0(lambda: self.recorder.step(report, step=done, epoch=plan.progress, lr=lr))

    def _step(self, plan: StepPlan) -> StepReport:
        objective, micro_batches = self.run.objective, self.run.micro_batches

        def attempt() -> StepReport:
            return step(
                self.run.model,
                self.run.optimizer,
                micro_batches.of_this_rank(plan.examples, plan.step),
                self._looked_after(objective.loss_fn, step_number=plan.step),
                max_grad_norm=self.config.max_grad_norm,
                counters=objective.counters,
            )

        return self._within_memory(micro_batches, plan.examples, attempt)

    def _culprits(self, plan: StepPlan) -> str:
        """The rows at fault, found by running each by itself; not under FSDP2, rank by rank."""
        if is_sharded(self.run.model):
            return ""
        objective, batches = self.run.objective, self.run.micro_batches
        found = gather_results(
            lambda: culprits(
                self.run.model,
                lambda index: next(batches.of([index], plan.step)),
                batches.hand(plan.examples),
                self._looked_after(objective.loss_fn, step_number=plan.step),
                counters=objective.counters,
            )
        )
        rows = [line for of_rank in found for line in of_rank]
        return f". At fault: {'; '.join(rows)}" if rows else ""

    def _evaluate_if_due(self) -> None:
        """Evaluate before the first step, every ``eval_every`` and at the end; each time once."""
        done, batches = self.progress.step, self.run.eval_micro_batches
        due = done in (0, self.run.steps) or _due(self.config.eval_every, done)
        if batches is None or not due or done in self.recorder.evaluated:
            return
        assert self.run.evaluation is not None
        everything, objective = range(len(self.run.evaluation)), self.run.objective
        report = self._within_memory(
            batches,
            everything,
            lambda: evaluate(
                self.run.model,
                batches.of_this_rank(everything, 0),
                self._looked_after(objective.loss_fn),
                counters=objective.counters,
            ),
        )
        self.evaluations.append(report)
        on_rank_0(lambda: self.recorder.evaluation(report, step=done))
        self.recorder.evaluated.add(done)

    def _save(self) -> None:
        self.watch.moves("saving", hurried=False)
        checkpoint.save(
            self.folder.checkpoints,
            self.run.model,
            self.run.optimizer,
            self.progress,
            keep=self.config.keep,
        )

    def _looked_after(self, loss_fn: LossFn, *, step_number: int | None = None) -> LossFn:
        """The loss, after a look at whether to stop; dropout keyed to the step if it has one."""
        # Under FSDP2 a rank must not leave a step alone: there a signal waits for the step's end.
        may_stop = not is_sharded(self.run.model)
        numbers = itertools.count()
        what = "evaluation" if step_number is None else f"step {step_number + 1}"

        def looked_after(model: Any, micro: Any) -> LossResult:
            if may_stop and self.stop_asked():
                raise StopRequestedError("asked to stop")
            self.watch.moves(f"{what}, micro-batch {next(numbers) + 1}")
            if step_number is not None:
                key_dropout(model, micro, seed=self.config.seed, step=step_number)
            with (
                ActivationOffload(model)
                if self.config.activation_offload
                else contextlib.nullcontext()
            ):
                return loss_fn(model, micro)

        return TwoPass(looked_after) if isinstance(loss_fn, TwoPass) else looked_after

    def _within_memory(
        self, micro_batches: MicroBatches, indices: Sequence[int], work: Callable[[], Report]
    ) -> Report:
        model = self.run.model
        keep_less = partial(self.config.recompute, model)
        return within_memory(model, micro_batches, indices, work, recompute=keep_less)


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


def _after(progress: Progress, report: StepReport) -> Progress:
    return replace(
        progress,
        step=progress.step + 1,
        tokens=progress.tokens + report.tokens,
        seconds=progress.seconds + report.seconds,
        skipped=progress.skipped + (report.skipped is not None),
    )


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _summary(run: Run, folder: RunFolder, loop: Loop) -> dict[str, Any]:
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
    own_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    peaks = gather_results(lambda: own_peak)
    progress, evaluations = loop.progress, loop.evaluations
    return {
        "steps": progress.step,
        "skipped": progress.skipped,
        "examples": len(run.train),
        "dropped": run.train.dropped,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "evaluation_before": evaluations[0].loss if len(evaluations) > 1 else None,
        "evaluation_after": evaluations[-1].loss if evaluations else None,
        "trainable_parameters": sum(
            weight.numel() for weight in run.model.parameters() if weight.requires_grad
        ),
        "ranks": len(peaks),
        "peak_resident_bytes": max(peaks),
        "model": str(folder.model),
        "samestep": samestep.__version__,
        "torch": torch.__version__,
    }
