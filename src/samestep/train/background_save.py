"""Writing checkpoints while the run goes on, from a copy of what they hold.

On an accelerator the weights and moments are copied into the CPU's memory, and a thread writes the
copy as `samestep.train.checkpoint.save` always does: whole or not at all. One is written at a time.
Whatever goes wrong ends the run before its next step, and every exit waits for what is being
written; a process that is killed leaves the checkpoint before it.

On a CPU the copy would double what a run takes, and on several ranks the writing talks to the other
ranks, which a thread beside the steps must not: there the run waits while it saves.
"""

import logging
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from samestep.engine.collectives import world_size
from samestep.errors import CheckpointError

log = logging.getLogger("samestep")


class BackgroundSave:
    """One save at a time, on a thread; used as a context, it waits at the end of the block."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> "BackgroundSave":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait; if the block failed by itself, a failed save is said beside that."""
        try:
            self.wait()
        except CheckpointError as failed:
            if error is None:
                raise
            log.error("%s", failed)

    @property
    def busy(self) -> bool:
        """Whether something is being saved, or its end was not looked at yet."""
        return self._thread is not None

    def begin(self, save: Callable[[], Any]) -> None:
        """Save in the background, after what is being saved.

        Args:
            save: Reads nothing that the steps change.

        Raises:
            Exception: What the save before it raised.
        """
        self.wait()
        # A daemon: a process that must not wait any longer ends as if it were killed.
        self._thread = threading.Thread(
            target=self._run, args=(save,), name="samestep-save", daemon=True
        )
        self._thread.start()

    def check(self) -> None:
        """Raise what the last save raised, if it has ended; without waiting."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for what is being saved.

        Raises:
            Exception: What it raised, once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, save: Callable[[], Any]) -> None:
        try:
            save()
        except BaseException as error:
            self._error = error


def saves_in_background(device: torch.device) -> bool:
    """Whether checkpoints of a run are written while it goes on.

    Args:
        device: Of the model.

    Returns:
        Whether: on one accelerator.
    """
    return device.type != "cpu" and world_size() == 1


def snapshot(model: nn.Module, optimizer: Optimizer) -> tuple[Any, Any]:
    """Copies, in the CPU's memory, of what a checkpoint holds.

    Args:
        model: The model.
        optimizer: Its optimizer.

    Returns:
        What `samestep.train.checkpoint.save` asks of a model, and of an optimizer.
    """
    return _Weights(model), _Moments(optimizer)


def copied(tensors: Any) -> Any:
    """Copies in the CPU's memory of all tensors of a nest; the rest as it is.

    Args:
        tensors: Dicts and lists of tensors and others.

    Returns:
        The same nest.
    """
    return tree_map_only(Tensor, _copied, tensors)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


class _Weights:
    """A model's weights that train, its buffers, and the names of its state."""

    def __init__(self, model: nn.Module) -> None:
        self._names = dict.fromkeys(model.state_dict())
        self._weights = [
            (name, nn.Parameter(_copied(weight)))
            for name, weight in model.named_parameters()
            if weight.requires_grad
        ]
        kept = [(name, one) for name, one in model.named_buffers() if name in self._names]
        self._buffers = [(name, _copied(buffer)) for name, buffer in kept]

    def state_dict(self) -> dict[str, None]:
        """The names alone."""
        return self._names

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Those that train."""
        return self._weights

    def named_buffers(self) -> list[tuple[str, Tensor]]:
        """Those that are part of the state."""
        return self._buffers


class _Moments:
    """An optimizer's state."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._state = copied(optimizer.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """As of the optimizer."""
        state: dict[str, Any] = self._state
        return state
