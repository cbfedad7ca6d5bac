"""Progress in a notebook: one display, drawn anew in its place, however many steps there are."""

import html
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

NOTEBOOK_WIDTH = 110
"""Characters of a line."""

_PAUSE = 0.2
"""Seconds between two drawings at least: each is a message to the browser."""


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, such as Jupyter's or Colab's."""
    ipython: Any = sys.modules.get("IPython")  # a kernel has imported it
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


class NotebookBar:
    """A bar and a line of text under a cell. It needs no widgets.

    Args:
        total: Steps of the whole run.
        done: Steps already done.
        clock: Seconds.
    """

    def __init__(
        self, *, total: int, done: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total, self._done, self._state = total, done, "starting"
        self._clock, self._drawn = clock, clock()
        self._handle: Any = None

    def start(self) -> None:
        """Show it; once more, and it shows where that was."""
        if self._handle is None:
            self._handle = import_module("IPython.display").display(
                self._content(), raw=True, display_id=True
            )

    def update(self, *, completed: int, state: str) -> None:
        """Show how far the run is, unless that was shown a moment ago.

        Args:
            completed: Steps done.
            state: The text beside the bar.
        """
        self._done, self._state = completed, state
        if self._clock() - self._drawn >= _PAUSE:
            self._draw()

    def stop(self) -> None:
        """Show how far it came."""
        self._draw()

    def _draw(self) -> None:
        self._drawn = self._clock()
        if self._handle is not None:
            self._handle.update(self._content(), raw=True)

    def _content(self) -> dict[str, str]:
        """As HTML, and as text for what shows none."""
        text = f"step {self._done}/{self._total}  {self._state}"
        bar = f'<progress value="{self._done}" max="{self._total}"></progress>'
        return {"text/plain": text, "text/html": f"<pre>{bar} {html.escape(text)}</pre>"}
