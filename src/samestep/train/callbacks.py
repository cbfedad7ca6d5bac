"""What a user's own code is told of a run while it goes. It sees the run, and cannot change it."""

from typing import Any


class Callback:
    """Told of what happens in a run; on rank 0 alone. Override what is of interest.

    What a method gets is a copy: nothing that it does to it reaches the run. An error that it
    raises ends the run, which can be resumed from its last checkpoint.

    Example:
        >>> import samestep
        >>> class Losses(samestep.Callback):
        ...     def __init__(self):
        ...         self.values = []
        ...     def on_step(self, record):
        ...         self.values.append(record["loss"])
        >>> losses = Losses()
        >>> losses.on_step({"step": 1, "loss": 2.5})
        >>> losses.values
        [2.5]
    """

    def on_step(self, record: dict[str, Any]) -> None:
        """After a step.

        Args:
            record: Its line of ``log.jsonl``.
        """

    def on_evaluation(self, record: dict[str, Any]) -> None:
        """After an evaluation of a set.

        Args:
            record: Its line of ``eval.jsonl``.
        """

    def on_save(self, record: dict[str, Any]) -> None:
        """After a checkpoint was written.

        Args:
            record: "step" and "path".
        """

    def on_end(self, record: dict[str, Any]) -> None:
        """After the model was written.

        Args:
            record: What ``summary.json`` holds.
        """
