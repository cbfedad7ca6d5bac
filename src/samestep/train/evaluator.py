"""Evaluations of a run: when they are due, every set by itself, and what a set is."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch

from samestep.data.records import Records
from samestep.engine.collectives import on_rank_0
from samestep.engine.evaluate import EvalReport, evaluate
from samestep.engine.modes import eval_mode
from samestep.engine.parallel import is_sharded, prepare_for_step
from samestep.engine.terms import LossFn, Objective, named_terms
from samestep.errors import ConfigError
from samestep.train.answers import (
    Answer,
    answer_rows,
    as_lines,
    check_questions,
    rows_to_answer,
    with_exact_match,
)
from samestep.train.choice import check_best
from samestep.train.ema import WeightAverage
from samestep.train.metrics import finished
from samestep.train.micro_batches import MicroBatches
from samestep.train.precision import one_step, products
from samestep.train.reporter import RunReporter
from samestep.train.rollouts import EVALUATION, RolloutMaker
from samestep.train.settings.base import TrainSettings
from samestep.train.settings.evaluation import split_best
from samestep.train.step_rollouts import StepRollouts
from samestep.train.watchdog import Watchdog


@dataclass(frozen=True)
class EvaluationSet:
    """Records to evaluate on.

    Attributes:
        records: All of them.
        micro_batches: Cuts them.
        rollouts: What generates what is evaluated, if the records are prompts.
    """

    records: Records
    micro_batches: MicroBatches
    rollouts: RolloutMaker | None = None

    def generated(self, beat: Callable[[str], None], *, first: bool = False) -> StepRollouts | None:
        """Generate to all prompts, or to the first, where the records are prompts.

        Args:
            beat: Told of each batch.
            first: To one alone.

        Returns:
            What `micro_batches` cuts from here on; None: the records themselves.
        """
        if self.rollouts is None:
            return None
        prompts = range(1 if first else len(self.records))
        made = self.rollouts.of_step(prompts, EVALUATION, beat=beat)
        self.micro_batches.put(made.records, made.names())
        return made


class _Watch(Protocol):
    def __call__(self, loss_fn: LossFn, *, number: int) -> LossFn: ...


class _Retry(Protocol):
    def __call__(
        self,
        work: Callable[[], EvalReport],
        micro_batches: MicroBatches,
        *,
        indices: Sequence[int],
    ) -> EvalReport: ...


@dataclass(kw_only=True)
class Evaluator:
    """Evaluates the sets of a run.

    Attributes:
        model: The model.
        objective: What is evaluated: the run's terms, and those of its metrics.
        sets: By name, in order; the name of one that has none is empty.
        settings: ``eval_every``, ``metrics``.
        steps: Of the whole run.
        reporter: Writes the reports down; `evaluate` needs none.
        watched: Makes of the loss one that looks at signals before each micro-batch.
        retry: Repeats an evaluation that did not fit into memory.
        tokenizer: Of the model, to generate.
        beat: Called before each answer.
        average: Evaluated in the place of the weights, if there is one.
        bitwise: Whether sums have the same bits on any ranks.
        watchdog: Is told what begins, if there is one.
        history: The reports of this call by set, in order.
    """

    model: torch.nn.Module
    objective: Objective
    sets: Mapping[str, EvaluationSet]
    settings: TrainSettings
    steps: int
    watched: _Watch
    retry: _Retry
    reporter: RunReporter | None = None
    tokenizer: Any = None
    beat: Callable[..., None] = lambda name, phase="evaluation": None
    average: WeightAverage | None = None
    bitwise: bool = False
    watchdog: Watchdog | None = None
    history: list[dict[str, EvalReport]] = field(default_factory=list)

    def is_due(self, step: int) -> bool:
        """Before the first step, every ``eval_every`` and at the end; each time once."""
        every = self.settings.eval_every
        assert self.reporter is not None
        due = step in (0, self.steps) or (every is not None and step % every == 0)
        return due and bool(self.sets) and step not in self.reporter.evaluated

    def run(self, step: int) -> dict[str, EvalReport]:
        """Evaluate every set, then write all reports down.

        Args:
            step: Steps done.

        Returns:
            The reports by set, the same on all ranks.
        """
        reports, answers = self.evaluate()
        if self.watchdog is not None:
            self.watchdog.begin("log", f"evaluation after step {step}, writing the log")
        on_rank_0(lambda: self._write(reports, answers, step))
        self.history.append(reports)
        assert self.reporter is not None
        self.reporter.evaluated.add(step)
        return reports

    def evaluate(self) -> tuple[dict[str, EvalReport], dict[str, list[Answer]]]:
        """Evaluate every set, and write nothing.

        Returns:
            Reports and answers by set, the same on all ranks.
        """
        with self.average.in_place() if self.average else contextlib.nullcontext():
            reports = {name: self._evaluate(each) for name, each in self.sets.items()}
            answers = {name: self._answers(each) for name, each in self.sets.items()}
        reports = {
            name: with_exact_match(report, answers[name], self.settings)
            for name, report in reports.items()
        }
        return reports, answers

    def _write(
        self, reports: Mapping[str, EvalReport], answers: Mapping[str, list[Answer]], step: int
    ) -> None:
        assert self.reporter is not None
        for name, report in reports.items():
            lines = as_lines(answers[name], step=step, of=name, settings=self.settings)
            self.reporter.samples(lines)
            self.reporter.evaluation(report, step=step, of=name)

    def _answers(self, each: EvaluationSet) -> list[Answer]:
        if not rows_to_answer(each.records, self.settings):
            return []
        with one_step(each.micro_batches.device), products(self.model, self.settings):
            return answer_rows(
                self.model,
                each.records,
                tokenizer=self.tokenizer,
                settings=self.settings,
                beat=self.beat,
            )

    def _evaluate(self, each: EvaluationSet) -> EvalReport:
        made = each.generated(partial(self.beat, phase="generation"))
        everything = range(len(each.records if made is None else made.records))
        micro_batches = each.micro_batches

        def attempt() -> EvalReport:
            if self.watchdog is not None:
                self.watchdog.begin("evaluation", "evaluation, starting")
            micros = micro_batches.of_this_rank(everything, 0)
            if self.watchdog is not None:
                micros = self.watchdog.each(micros, "evaluation", "evaluation, collating")
            with one_step(micro_batches.device):
                return evaluate(
                    self.model,
                    micros,
                    self.watched(self.objective.loss_fn, number=micro_batches.count(everything)),
                    counters=self.objective.counters,
                    bitwise=self.bitwise,
                )

        report = finished(
            self.retry(attempt, micro_batches, indices=everything), self.settings.metrics
        )
        return report if made is None else made.added_to(report)

    def losses(self, at: int) -> float | dict[str, float] | None:
        """The loss of one of the evaluations of this call, by set if they have names."""
        if not self.history:
            return None
        found = {name: report.loss for name, report in self.history[at].items()}
        return found.get("", found)


@torch.no_grad()
def check_choice(
    model: torch.nn.Module,
    objective: Objective,
    *,
    sets: Mapping[str, EvaluationSet],
    settings: TrainSettings,
    tokenizer: Any = None,
) -> None:
    """Refuse a ``best`` that evaluations will not have, and questions without an answer.

    Args:
        model: Run on one record of the set that ``best`` names.
        objective: What is evaluated.
        sets: By name.
        settings: ``best``, and what `check_questions` looks at.
        tokenizer: Of the model.

    Raises:
        ConfigError: There is no such number.
        DataError: As for `check_questions`.
    """
    if is_sharded(model) and (settings.samples or "exact_match" in settings.metrics):
        raise ConfigError("exact_match, samples: not under parallel fsdp2, whose ranks go together")
    for name, held in sets.items():
        check_questions(held.records, tokenizer, name=name, settings=settings)
    if settings.best is None:
        return
    each = sets[split_best(settings.best)[0]]
    made = each.generated(lambda name: None, first=True)
    micro = next(each.micro_batches.batches([0], 0))
    with eval_mode(model), one_step(each.micro_batches.device):
        terms = named_terms(objective.loss_fn(model, micro))
    prepare_for_step(model)
    generated = () if made is None else made.terms
    check_best(settings, dict.fromkeys(("loss", *terms, *generated, *settings.metrics)))
