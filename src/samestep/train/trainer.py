"""The training loop: plan, step, log, evaluate, save."""

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from samestep.data.batching import StepPlan
from samestep.engine.collectives import (
    all_gather_object,
    gather_results,
    on_rank_0,
    run_or_fail_together,
)
from samestep.engine.parallel import is_sharded
from samestep.engine.step import StepReport, step
from samestep.engine.terms import LossFn
from samestep.errors import Interrupted, NotFiniteError, RolloutError, StopRequestedError
from samestep.models.activations import ActivationOffload
from samestep.models.dropout import key_dropout
from samestep.train.bitwise import BitRun, choose_threads, fail_with_budget, log_threads, repeatable
from samestep.train.callbacks import Callback
from samestep.train.checkpoint_files import remove_checkpoints
from samestep.train.choice import judge
from samestep.train.decisions import decisions_before
from samestep.train.evaluator import Evaluator
from samestep.train.forward import find_nonfinite_rows, with_context
from samestep.train.launch import process_group
from samestep.train.micro_batches import MicroBatches, Report, retry_on_oom
from samestep.train.model_folder import save_model
from samestep.train.optim import learning_rate, set_learning_rate
from samestep.train.precision import choose_precision, one_step
from samestep.train.progress import Progress, skipped_step
from samestep.train.reporter import RunReporter
from samestep.train.resume import current_origin, first_progress, load_best
from samestep.train.rollouts import with_rollouts
from samestep.train.rounded_updates import UpdateWatch
from samestep.train.run_data import step_plans
from samestep.train.run_folder import RunFolder
from samestep.train.saver import Saver
from samestep.train.settings.base import TrainSettings
from samestep.train.setup import TrainingSetup, set_up
from samestep.train.signals import stop_signals
from samestep.train.summary import summarise, write_summary
from samestep.train.watchdog import Watchdog, watch_ranks
from samestep.utils.plugins import is_reference

log = logging.getLogger("samestep")


def train(settings: TrainSettings, *, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
    """Train a model into ``settings.out``; on several ranks under torchrun.

    Args:
        settings: As `samestep.train.command.read_settings` or `finalize` gives them.
        callbacks: Told of what happens, on rank 0.

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
        settings = choose_threads(settings, folder)
        on_rank_0(lambda: folder.hold(settings))
        with ExitStack() as at_end:
            at_end.callback(folder.close)
            at_end.enter_context(repeatable(settings))
            decided = decisions_before(settings, folder)
            setup = set_up(decided.put_into(settings), budget=decided.budget)
            origin = current_origin(setup, settings)
            bits = BitRun(setup, origin=origin) if settings.bitwise else None
            progress = first_progress(setup, settings, folder=folder, origin=origin, bits=bits)
            on_rank_0(lambda: folder.open(settings))
            if bits is not None:
                at_end.callback(bits.close)
                bits.open(folder, done=progress.step)
            log_threads()
            with (
                RunReporter(
                    *(folder, settings),
                    total=setup.steps,
                    progress=progress,
                    callbacks=callbacks,
                ) as reporter,
                signals.between_micro_batches(reporter.say),
                setup.micro_batches.made_ahead(),
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
                    bits=bits,
                )
                at_end.enter_context(trainer.saver.background)
                trainer.run()
            watchdog.begin("export", "saving the model")
            with trainer.saver.ending():
                load_best(trainer.progress, setup, settings=settings, folder=folder)
                if setup.average is not None:
                    setup.average.put_in_place()
                on_rank_0(folder.check_held)
                save_model(setup.model, setup.tokenizer, folder=folder.model, merge=settings.merge)
                trainer.saver.finish()
                summary = summarise(setup, trainer.progress, settings, evaluator=trainer.evaluator)
                summary["model"] = str(folder.model)
                on_rank_0(lambda: write_summary(summary, folder))
            if settings.keep == 0:  # the model is what remains
                on_rank_0(lambda: remove_checkpoints(folder.checkpoints))
            on_rank_0(lambda: reporter.ended(summary))
        return summary


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
        bits: Under ``bitwise``: what carries and writes them.
        evaluator: Evaluates its sets.
        clock: Seconds, for ``save_minutes``.
        saver: Writes its checkpoints.
    """

    settings: TrainSettings
    folder: RunFolder
    setup: TrainingSetup
    reporter: RunReporter
    stop_signal: Callable[[], int]
    watchdog: Watchdog
    progress: Progress
    origin: dict[str, Any]
    bits: BitRun | None = None
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        # Before any evaluation: a forward may leave whole weights in the place of shards.
        self._updates = UpdateWatch(self.setup.model)
        self.saver = Saver(
            settings=self.settings,
            folder=self.folder,
            setup=self.setup,
            reporter=self.reporter,
            watchdog=self.watchdog,
            origin=self.origin,
            bits=self.bits,
            clock=self.clock,
        )
        self.evaluator = Evaluator(
            model=self.setup.model,
            objective=self.setup.evaluated,
            sets=self.setup.evaluations,
            settings=self.settings,
            steps=self.setup.steps,
            reporter=self.reporter,
            watched=self._watched,
            retry=self._retry_on_oom,
            tokenizer=self.setup.tokenizer,
            watchdog=self.watchdog,
            beat=self._beat,
            average=self.setup.average,
            bitwise=self.bits is not None,
        )

    def _beat(self, name: str, phase: str = "evaluation") -> None:
        if self.stop_signal():
            raise StopRequestedError("asked to stop")
        self.watchdog.begin(phase, name)

    def run(self) -> None:
        """Train to the last step.

        Raises:
            Interrupted: A signal came; the run is saved.
        """
        self.saver.start()
        try:
            if self._evaluate_if_due():
                self._save(before="step")
            for step_number in self.steps(self.setup.steps):
                better = self._evaluate_if_due()
                last = self._is_over()
                # Every rank must do the same: rank 0's clock and anybody's signal count.
                asked = all_gather_object([self.saver.is_due(step_number), self.stop_signal()])
                stopped = not last and any(signal for _, signal in asked)
                if last or ((asked[0][0] or better) and not stopped):
                    self._save(before="export" if last else "step")
                if stopped:
                    raise StopRequestedError
        except RolloutError as error:
            self._save(before="stop")
            saved = f"The run is saved after step {self.progress.step}: go on with --resume"
            raise RolloutError(f"{error}\n{saved}") from error
        except StopRequestedError:
            number = max(all_gather_object(self.stop_signal()))
            self._save(before="stop")
            raise Interrupted(number, step=self.progress.step, out=self.settings.out) from None

    def steps(self, last: int) -> Iterator[int]:
        """Take the steps up to one, and no more than that; yields each that is done."""
        for plan in self._plans(last):
            if self._is_over():
                return
            self.saver.check()
            self._step(plan)
            yield self.progress.step

    def _plans(self, last: int) -> Iterator[StepPlan]:
        """The steps up to one; as each begins, the micro-batches of the next one are begun."""
        all_plans = step_plans(self.setup.train, self.settings, start=self.progress.step)
        plans = itertools.takewhile(lambda plan: plan.step < last, all_plans)
        for plan, following in itertools.pairwise(itertools.chain(plans, [None])):
            assert plan is not None
            if following is not None and self.setup.rollouts is None:
                self.setup.micro_batches.prepare(following.examples, following.step)
            yield plan

    def _step(self, plan: StepPlan) -> None:
        lr = learning_rate(plan.step, total=self.setup.steps, settings=self.settings)
        set_learning_rate(self.setup.optimizer, lr)
        started = time.perf_counter()
        beat = partial(self._beat, phase="generation")
        plan, made = with_rollouts(
            plan, self.setup.rollouts, micro_batches=self.setup.micro_batches, beat=beat
        )
        self._updates.before_step()
        try:
            report = self._optimizer_step(plan)
        except NotFiniteError as error:
            problem = f"{error}{self._nonfinite_rows(plan)}"
            if self.settings.not_finite == "stop":
                raise NotFiniteError(problem) from None
            log.warning("step skipped: %s", problem)
            report = skipped_step(problem, seconds=time.perf_counter() - started)
        report = report if made is None else made.added_to(report)
        last = self.progress.step + 1 == self.setup.steps
        self._updates.after_step(report, lr=lr, last=last)
        after = self.setup.objective.after_step
        if after is not None:
            after(self.setup.model, report.skipped is None)
        if self.setup.average is not None and report.skipped is None:
            self.setup.average.update()
        self.progress = self.progress.after(report, self.setup.train, plan.examples)
        done = self.progress.step
        self.watchdog.begin("log", f"step {done}, writing the log")
        lines = made.lines(done) if made is not None else ()
        on_rank_0(lambda: self.reporter.step(report, lines, step=done, epoch=plan.progress, lr=lr))
        if self.bits is not None:
            self.bits.after_step(done)

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
                    bitwise=None if self.bits is None else self.bits.sums,
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
                name_of=micro_batches.name_of,
            )
        )
        rows = [line for lines in by_rank for line in lines]
        return f". At fault: {'; '.join(rows)}" if rows else ""

    def _evaluate_if_due(self) -> bool:
        """Evaluate; whether that was better than all before."""
        done = self.progress.step
        if not self.evaluator.is_due(done):
            return False
        before = self.progress.choice
        choice = judge(before, self.evaluator.run(done), step=done, settings=self.settings)
        self.progress = replace(self.progress, choice=choice)
        return choice.step != before.step

    def _is_over(self) -> bool:
        """Whether the run is at its last step, or has waited long enough for a better model."""
        patience, choice = self.settings.patience, self.progress.choice
        waited = patience is not None and choice.worse >= patience
        return waited or self.progress.step == self.setup.steps

    def _save(self, *, before: Literal["step", "export", "stop"]) -> None:
        stops = before == "step" and self.stop_signal()
        self.saver.save(self.progress, before="stop" if stops else before)

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
        if self.bits is not None:
            return fail_with_budget(
                work, setup=self.setup, micro_batches=micro_batches, indices=indices
            )
        model = self.setup.model
        return retry_on_oom(
            model,
            work,
            micro_batches=micro_batches,
            indices=indices,
            recompute_activations=partial(self.setup.recipe.recompute_activations, model),
        )
