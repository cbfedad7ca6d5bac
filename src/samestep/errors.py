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


class CheckError(SamestepError):
    """A subject cannot be audited: says what it lacks, or shows its own error."""


class HungError(CheckError):
    """The ranks of a subject wait for each other for ever."""


class CheckpointError(SamestepError):
    """A checkpoint cannot be written or read: names the path and what survives."""
