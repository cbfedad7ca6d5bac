"""SIGINT and SIGTERM: between two micro-batches where a run can save, at once elsewhere."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from samestep.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """What SIGINT and SIGTERM have asked for.

    A first signal inside `between_micro_batches` is noted, and the loop asks for it; so is one that
    comes after an error has left that block, since launchers send one to the ranks that remain
    while they still find out which one was lost. Any other raises `Interrupted` at once.
    """

    def __init__(self) -> None:
        self.at_once = 0
        """The number of the signal that ends the run where it is; 0 before there is one."""
        self._noted = 0
        self._announce: Callable[[str], None] | None = None
        self._failed = False

    def number(self) -> int:
        """The number of the signal that asked to stop, or 0.

        Raises:
            Interrupted: A signal was to end the run at once, and a library has swallowed it.
        """
        if self.at_once:
            raise Interrupted(self.at_once)
        return self._noted

    @contextmanager
    def between_micro_batches(self, announce: Callable[[str], None]) -> Iterator[None]:
        """Note a first signal while the block runs, instead of raising.

        Args:
            announce: Called with one line when the signal comes.

        Yields:
            Nothing.
        """
        self._announce = announce
        try:
            yield
        except BaseException:
            self._failed = True
            raise
        finally:
            self._announce = None

    def receive(self, number: int, _: FrameType | None = None) -> None:
        """Handle a signal.

        Raises:
            Interrupted: It ends the run at once.
        """
        if self._noted or (self._announce is None and not self._failed):
            self.at_once = number
            raise Interrupted(number)
        self._noted = number
        if self._announce is None:
            return
        name = signal.Signals(number).name
        text = f"{name}: stopping after this micro-batch, then saving; again stops at once"
        try:
            self._announce(text)
        except Exception:
            # Whatever was interrupted may be half done, such as an import of what is needed here.
            with suppress(OSError):
                os.write(2, f"{text}\n".encode())


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Handle SIGINT and SIGTERM while the block runs.

    Yields:
        What they ask for.

    Raises:
        Interrupted: A signal ended the block at once. Libraries wrap what is raised inside of
            them into errors of their own: after such a signal every error means that it came.
    """
    signals = StopSignals()
    if threading.current_thread() is not threading.main_thread():
        yield signals  # signals reach the main thread only
        return
    before = {number: signal.signal(number, signals.receive) for number in _SIGNALS}
    try:
        yield signals
    except Interrupted:
        raise
    except BaseException as error:
        if signals.at_once:
            raise Interrupted(signals.at_once) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
