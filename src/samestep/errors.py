"""The errors that samestep raises on purpose.

    SamestepError
    ├── ConfigError                    a setting or an argument is wrong
    ├── DataError                      data cannot be used
    ├── StepError                      a step cannot be exact or finite
    │   ├── NotFiniteError             ... its loss or gradient is not finite
    │   └── OutOfMemoryError           ... a micro-batch does not fit into memory
    │       └── SequenceTooLargeError  ... nor does a sequence by itself
    ├── StopRequestedError             a run was asked to stop within a step
    ├── RolloutError                   rollouts cannot be generated or rewarded
    ├── RankError                      another rank died or does not answer
    ├── CheckError                     a loop cannot be audited
    │   └── DeadlockError              ... its ranks wait for each other for ever
    └── CheckpointError                a checkpoint cannot be written or read

    KeyboardInterrupt
    └── Interrupted                    a run that was asked to stop has saved, and ends

Every message says what is wrong, where, the value, and how to mend it. After a `StepError` the
weights are those of before the step, and no gradient is left behind.

An ``assert`` in this code base marks a broken invariant of our own, never a user's mistake.
"""


class SamestepError(Exception):
    """Base of all errors that samestep raises on purpose.

    Example:
        >>> import samestep
        >>> try:
        ...     samestep.constant(0)
        ... except samestep.SamestepError as error:
        ...     print(error)
        constant(0.0): the divisor must be finite and above 0
    """


class ConfigError(SamestepError):
    """A setting or an argument is wrong: names it, its value and the accepted ones.

    Example:
        >>> import samestep
        >>> samestep.CausalLMLoss(label_smoothing=2)
        Traceback (most recent call last):
        samestep.errors.ConfigError: label_smoothing=2: from 0 up to, not with, 1
    """


class DataError(SamestepError):
    """Data cannot be used: names the file, the row and the field.

    Example:
        >>> import samestep, torch
        >>> samestep.evaluate(torch.nn.Linear(2, 1), [], samestep.CausalLMLoss())
        Traceback (most recent call last):
        samestep.errors.DataError: nothing to evaluate: there is no micro-batch
    """


class StepError(SamestepError):
    """A step cannot be exact or finite: names the loss term at fault.

    Example:
        A loss that returns a number cannot be normalised: nobody knows what it is a sum over.

        >>> import samestep, torch
        >>> def loss_fn(model, micro):
        ...     return model(micro["x"]).sum()
        >>> micro = {"x": torch.ones(3, 2), "labels": torch.tensor([0, 1, 0])}
        >>> samestep.backward(torch.nn.Linear(2, 1), [micro], loss_fn)
        Traceback (most recent call last):
        samestep.errors.StepError: the loss returned Tensor: return a Term(total, unit) or ...
    """


class NotFiniteError(StepError):
    """The loss or its gradient is not finite: names the term or the weight; nothing was updated.

    Example:
        >>> import samestep, torch
        >>> def loss_fn(model, micro):
        ...     return samestep.Term(model(micro["x"]).sum() / 0, unit="example")
        >>> micro = {"x": torch.ones(3, 2), "labels": torch.tensor([0, 1, 0])}
        >>> samestep.backward(torch.nn.Linear(2, 1), [micro], loss_fn)
        Traceback (most recent call last):
        samestep.errors.NotFiniteError: ... term 'loss' is ...inf in micro-batch 0. ...
    """


class OutOfMemoryError(StepError):
    """A micro-batch does not fit into memory: a smaller one may; nothing was updated.

    It keeps nothing of the failed attempt in memory, also while it is handled.

    Attributes:
        after_backward: Memory ran out in clipping or in the update: smaller micro-batches leave
            more free, but need not be enough.

    Example:
        A loop of one's own halves what does not fit; the result cannot change.

        >>> import samestep
        >>> def step_that_fits(run_step, examples, size):
        ...     while True:
        ...         cut = [examples[i : i + size] for i in range(0, len(examples), size)]
        ...         try:
        ...             return run_step(cut)
        ...         except samestep.OutOfMemoryError:
        ...             if size == 1:
        ...                 raise
        ...             size //= 2
        >>> def run_step(cut):
        ...     if len(cut[0]) > 2:
        ...         raise samestep.OutOfMemoryError(f"{len(cut[0])} examples do not fit")
        ...     return cut
        >>> step_that_fits(run_step, ["a", "b", "c", "d", "e"], size=5)
        [['a', 'b'], ['c', 'd'], ['e']]
    """

    after_backward = False


class SequenceTooLargeError(OutOfMemoryError):
    """One sequence by itself does not fit into memory: names its row and length."""


class StopRequestedError(SamestepError):
    """The run was asked to stop while a step was under way; nothing was updated."""


class RolloutError(SamestepError):
    """Rollouts cannot be generated or rewarded: names the row; nothing was updated."""


class RankError(SamestepError):
    """Another rank died or does not answer: names it."""


class Interrupted(KeyboardInterrupt):
    """A run that was asked to stop has saved and ends.

    Args:
        number: The signal's number.
        step: Steps done and saved; None if nothing was saved.
        out: The folder of the run.
    """

    def __init__(self, number: int, *, step: int | None = None, out: str | None = None) -> None:
        super().__init__(number)
        self.number = number
        self.step = step
        self.out = out


class CheckError(SamestepError):
    """A loop cannot be audited: says what it lacks, or shows its own error.

    Example:
        >>> import samestep
        >>> samestep.check("no_such_loop.py")
        Traceback (most recent call last):
        samestep.errors.CheckError: ...no_such_loop.py...
    """


class DeadlockError(CheckError):
    """The ranks of a subject wait for each other for ever."""


class CheckpointError(SamestepError):
    """A checkpoint cannot be written or read: names the path and what survives.

    Example:
        The run's settings are not at fault, so a launcher may tell the two apart.

        >>> import samestep
        >>> error = samestep.CheckpointError("step-00000050 is damaged; step-00000040 is intact")
        >>> isinstance(error, samestep.ConfigError)
        False
    """


def is_no_fault_of_input(error: BaseException) -> bool:
    """Whether an error says something else than that a library tripped over what it was given.

    Args:
        error: Any.

    Returns:
        Whether it is one of samestep's own, memory that ran out, or a broken invariant of ours.
        Libraries assert what inputs must be, too.

    Example:
        >>> from samestep.errors import ConfigError, is_no_fault_of_input
        >>> is_no_fault_of_input(ConfigError("steps")), is_no_fault_of_input(KeyError("text"))
        (True, False)
    """
    if isinstance(error, AssertionError):
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        file = "" if trace is None else trace.tb_frame.f_code.co_filename
        return file.startswith(__file__.removesuffix("errors.py"))
    return isinstance(error, SamestepError | MemoryError)
