"""Statistics of the batch inside a model: with them a step depends on how its batch was split."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from samestep.errors import ConfigError


def check_batch_norm(model: nn.Module) -> None:
    """Refuse modules that normalise by the statistics of the micro-batch that they see.

    Args:
        model: The model, in the mode in which it is to run.

    Raises:
        ConfigError: There are such modules: any BatchNorm in train mode, or without running
            statistics.
    """
    found = [
        (name, module) for name, module in model.named_modules() if _uses_batch_statistics(module)
    ]
    if not found:
        return
    name, first = found[0]
    others = f" and {len(found) - 1} more" if len(found) > 1 else ""
    reason, mend = (
        (
            "in train mode",
            "freeze it: call .eval() on it after every model.train()",
        )
        if first.training
        else ("without running statistics", "give it track_running_stats=True")
    )
    raise ConfigError(
        f"{type(first).__name__} {name!r}{others}: {reason} it normalises by the mean and variance "
        "of its micro-batch, so the step would depend on how the batch is split. Use GroupNorm or "
        f"LayerNorm in its place, or {mend}"
    )


def _uses_batch_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


class BufferWatch:
    """The floating-point buffers of a model, to see which of them a forward changes.

    Args:
        model: The model. A copy of its buffers is held until the watch is dropped.
    """

    def __init__(self, model: nn.Module) -> None:
        self._before = [
            (name, module, key, buffer, buffer.clone())
            for name, module in model.named_modules()
            for key, buffer in module._buffers.items()
            if buffer is not None and buffer.is_floating_point()
        ]

    def __bool__(self) -> bool:
        """Whether there is anything to watch."""
        return bool(self._before)

    def changed(self) -> list[str]:
        """The names of the buffers that hold other values of the same shape than before.

        One that has grown or changed its type is a cache (of positions, of a mask).
        """
        return [name for name, before, now in self._pairs() if not _same(before, now)]

    def values(self, names: list[str]) -> list[Tensor]:
        """Copies of what some buffers hold now."""
        found = {name: now for name, _, now in self._pairs()}
        return [found[name].clone() for name in names]

    @torch.no_grad()
    def restore(self) -> None:
        """Put the values of before back."""
        for _, module, key, buffer, copy in self._before:
            buffer.copy_(copy)
            module._buffers[key] = buffer

    def _pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        for name, module, key, _, copy in self._before:
            now = module._buffers.get(key)
            if now is not None and now.shape == copy.shape and now.dtype == copy.dtype:
                yield f"{name}.{key}".lstrip("."), copy, now


def _same(before: Tensor, now: Tensor) -> bool:
    return bool(((before == now) | (before.isnan() & now.isnan())).all())
