"""The training loop: plan, step, log, evaluate, save."""

import itertools
import json
import logging
import resource
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import samestep
from samestep.data.plan import StepPlan, plan_steps
from samestep.errors import ConfigError
from samestep.evaluation import EvalReport, evaluate
from samestep.files import write_atomically
from samestep.models.dropout import key_dropout
from samestep.terms import LossResult
from samestep.train import checkpoint
from samestep.train.checkpoint import Progress
from samestep.train.config import TrainConfig
from samestep.train.console import RunConsole
from samestep.train.export import save_model
from samestep.train.interrupt import interruptible
from samestep.train.log import Journal
from samestep.train.optim import learning_rate, set_learning_rate
from samestep.train.run_folder import RunFolder
from samestep.train.setup import Run, set_up
from samestep.train_step import StepReport, step
from samestep.two_pass import TwoPass

log = logging.getLogger("samestep")


def train(config: TrainConfig) -> dict[str, Any]:
    """Train a model as configured, into ``config.out``.

    Args:
        config: The settings, as `samestep.train.arguments.read_config` or `checked` gives them.

    Returns:
        What ``summary.json`` holds.

    Raises:
        ConfigError: A setting is wrong; nothing was written.
        DataError: The data cannot be used; nothing was written.
        StepError: A step was not finite; the weights before it are in the last checkpoint.
        CheckpointError: A checkpoint could not be written or read.
        KeyboardInterrupt: Stopped by Ctrl-C; the run can be resumed.
    """
    folder = RunFolder(Path(config.out))
    folder.check(config)
    run = set_up(config)
    progress = _first_progress(run, config, folder)
    folder.open(config)
    journal = Journal(folder, config, done=progress.step)
    evaluations: list[EvalReport] = []
    try:
        with (
            RunConsole(total=run.steps, done=progress.step) as console,
            interruptible(console.say) as stop_asked,
        ):

            def evaluate_now() -> None:
                if run.evaluation is not None:
                    report = _evaluate(run)
                    journal.evaluation(report, step=progress.step)
                    console.evaluation(report, step=progress.step)
                    evaluations.append(report)

            def save_now() -> None:
                checkpoint.save(
                    folder.checkpoints, run.model, run.optimizer, progress, keep=config.keep
                )

            if progress.step == 0:
                evaluate_now()
            for plan in _plans(run, config, start=progress.step):
                lr = learning_rate(plan.step, total=run.steps, config=config)
                report = _step(run, config, plan, lr=lr)
                progress = _after(progress, report)
                journal.step(report, step=progress.step, epoch=plan.progress, lr=lr)
                console.step(report, lr=lr)
                last = progress.step == run.steps
                if last or _due(config.eval_every, progress.step):
                    evaluate_now()
                if last or stop_asked() or _due(config.save_every, progress.step):
                    save_now()
                if stop_asked() and not last:
                    raise KeyboardInterrupt
    finally:
        journal.close()
    save_model(run.model, run.tokenizer, folder.model, merge=config.merge)
    summary = _summary(run, folder, progress, evaluations)
    write_atomically(folder.summary, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    return summary


def _first_progress(run: Run, config: TrainConfig, folder: RunFolder) -> Progress:
    """Where the run starts: at its last checkpoint if it is resumed, else at step 0."""
    data = run.train.fingerprint()
    found = checkpoint.latest(folder.checkpoints) if config.resume else None
    if found is None:
        if config.resume:
            log.warning("resume: there is no checkpoint in %s: starting at step 0", folder.root)
        return Progress(step=0, tokens=0, seconds=0.0, skipped=0, data=data)
    progress = checkpoint.load(found, run.model, run.optimizer)
    if progress.data != data:
        raise ConfigError(
            f"resume: the training rows are not those of {found}: {config.data} or the tokenizer "
            "has changed since. Restore it, or start anew with --overwrite"
        )
    log.info("resuming after step %d, from %s", progress.step, found)
    return progress


def _plans(run: Run, config: TrainConfig, *, start: int) -> Iterator[StepPlan]:
    plans = plan_steps(
        run.train.lengths,
        seed=config.seed,
        batch_size=config.batch_size,
        batch_tokens=config.batch_tokens,
        start=start,
    )
    return itertools.takewhile(lambda plan: plan.step < run.steps, plans)


def _step(run: Run, config: TrainConfig, plan: StepPlan, *, lr: float) -> StepReport:
    def keyed(model: Any, micro: dict[str, Any]) -> LossResult:
        key_dropout(model, micro, seed=config.seed, step=plan.step)
        return run.objective.loss_fn(model, micro)

    set_learning_rate(run.optimizer, lr)
    report = step(
        run.model,
        run.optimizer,
        run.micro_batches(plan.examples, plan.step),
        TwoPass(keyed) if isinstance(run.objective.loss_fn, TwoPass) else keyed,
        max_grad_norm=config.max_grad_norm,
        counters=run.objective.counters,
    )
    if run.objective.after_step is not None:
        run.objective.after_step(run.model, report.skipped is None)
    return report


def _evaluate(run: Run) -> EvalReport:
    assert run.evaluation is not None
    assert run.eval_micro_batches is not None
    everything = range(len(run.evaluation))
    return evaluate(
        run.model,
        run.eval_micro_batches(everything, 0),
        run.objective.loss_fn,
        counters=run.objective.counters,
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


def _summary(
    run: Run, folder: RunFolder, progress: Progress, evaluations: list[EvalReport]
) -> dict[str, Any]:
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
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
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "model": str(folder.model),
        "samestep": samestep.__version__,
        "torch": torch.__version__,
    }
