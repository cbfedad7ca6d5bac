"""The errors that samestep raises on purpose.

Every message says what is wrong, where, the value found, and how to mend it.
An ``assert`` in this code base marks a broken invariant of our own, never a
user's mistake.
"""


class SamestepError(Exception):
    """Base of all errors that samestep raises on purpose."""


class ConfigError(SamestepError):
    """A setting is wrong: names the field, its value and the accepted ones."""


class DataError(SamestepError):
    """Data cannot be used: names the file, the row and the field."""


class StepError(SamestepError):
    """A step cannot be exact or finite: names the loss term at fault."""


class NotFiniteError(StepError):
    """The loss or its gradient is not finite: names the term or the weight; nothing was updated."""


class OutOfMemoryError(StepError):
    """A micro-batch does not fit into memory: a smaller one may; nothing was updated."""


class SequenceTooLargeError(OutOfMemoryError):
    """One sequence by itself does not fit into memory: names its row and length."""


class StopAskedError(SamestepError):
    """The run was asked to stop while a step was under way; nothing was updated."""


class RankError(SamestepError):
    """Another rank died or does not answer: names it."""


class Interrupted(KeyboardInterrupt):
    """A run that was asked to stop has saved and ends.

    Args:
        number: The signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class CheckError(SamestepError):
    """A subject cannot be audited: says what it lacks, or shows its own error."""


class HungError(CheckError):
    """The ranks of a subject wait for each other for ever."""


class CheckpointError(SamestepError):
    """A checkpoint cannot be written or read: names the path and what survives."""
