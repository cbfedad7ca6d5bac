"""What a run shows and writes down while it goes: rank 0 alone does it."""

from types import TracebackType

from samestep.engine.collectives import gather_results, rank
from samestep.engine.evaluate import EvalReport
from samestep.engine.step import StepReport
from samestep.errors import CheckpointError
from samestep.train.config import TrainConfig
from samestep.train.console import RunConsole
from samestep.train.log import Journal
from samestep.train.run_folder import RunFolder


class Recorder:
    """The journal and the console of a run, on rank 0; silent on the others.

    Args:
        folder: The run's folder, open for writing.
        config: The settings.
        total: Steps of the whole run.
        done: Steps already done.

    Raises:
        ConfigError: The package of a tracker is not installed.
        CheckpointError: The logs cannot be written.
    """

    def __init__(self, folder: RunFolder, config: TrainConfig, *, total: int, done: int) -> None:
        self._console = RunConsole(total=total, done=done, quiet=rank() > 0)
        self._folder = folder
        self._journal: Journal | None = None

        def start() -> list[int]:
            if rank() > 0:
                return []
            try:
                self._journal = Journal(folder, config, done=done)
            except OSError as error:
                raise self._unwritable(error) from error
            return sorted(self._journal.evaluated)

        self.evaluated = set(gather_results(start)[0])

    def __enter__(self) -> "Recorder":
        """Start the bar."""
        self._console.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the bar, and close the files."""
        self._console.__exit__(kind, error, trace)
        if self._journal is not None:
            self._journal.close()

    def say(self, text: str) -> None:
        """Show a line."""
        self._console.say(text)

    def step(self, report: StepReport, *, step: int, epoch: float, lr: float) -> None:
        """Write a step down, and show it.

        Raises:
            CheckpointError: The log cannot be written.
        """
        if self._journal is None:
            return
        try:
            self._journal.step(report, step=step, epoch=epoch, lr=lr)
        except OSError as error:
            raise self._unwritable(error) from error
        self._console.step(report, lr=lr)

    def evaluation(self, report: EvalReport, *, step: int) -> None:
        """Write an evaluation down, and show it.

        Raises:
            CheckpointError: The log cannot be written.
        """
        if self._journal is None:
            return
        try:
            self._journal.evaluation(report, step=step)
        except OSError as error:
            raise self._unwritable(error) from error
        self._console.evaluation(report, step=step)

    def _unwritable(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"the logs in {self._folder.root} cannot be written ({error}): the run stops here. "
            "Mend that, and continue from the last checkpoint with --resume"
        )
