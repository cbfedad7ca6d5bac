"""Live progress: a bar on a terminal, plain lines elsewhere."""

from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from samestep.engine.evaluate import EvalReport
from samestep.engine.step import StepReport
from samestep.utils.text import printable


class RunConsole:
    """Shows a run on stderr, so that stdout stays free for results.

    Args:
        total: Steps of the whole run.
        done: Steps already done before this call.
        quiet: Show nothing.
    """

    def __init__(self, *, total: int, done: int, quiet: bool = False) -> None:
        self._console = Console(stderr=True, highlight=False, markup=False, quiet=quiet)
        self._total, self._done = total, done
        self._seconds, self._steps, self._tokens = 0.0, 0, 0
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[state]}", markup=False),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=total, completed=done, state="starting")

    def __enter__(self) -> "RunConsole":
        """Start the bar."""
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the bar."""
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(printable(text), soft_wrap=True)

    def step(self, report: StepReport, *, lr: float) -> None:
        """Show a step that was done."""
        self._done += 1
        self._steps += 1
        self._seconds += report.seconds
        self._tokens += report.tokens
        left = (self._total - self._done) * self._seconds / self._steps
        state = (
            f"loss {report.loss:.4f}  grad norm {report.grad_norm:.3g}  lr {lr:.2e}  "
            f"{self._tokens / self._seconds:,.0f} tokens/s  "
            f"{report.micro_batches} micro-batches  eta {timedelta(seconds=round(left))}"
        )
        if report.skipped:
            state = f"skipped ({report.skipped})  " + state
        self._bar.update(self._task, completed=self._done, state=state)
        if self._bar.disable:
            self.say(f"step {self._done}/{self._total}  {state}")

    def evaluation(self, report: EvalReport, *, step: int) -> None:
        """Show an evaluation."""
        metrics = "  ".join(f"{name} {value:.4f}" for name, value in report.terms.items())
        targets = report.counts.get("token", 0)
        self.say(
            f"evaluation after step {step}: loss {report.loss:.4f}  {metrics}  "
            f"({targets:,.0f} targets, {report.seconds:.1f} s)"
        )
