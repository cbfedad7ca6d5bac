"""A class before a LightningModule's own that makes its step exact under automatic optimisation.

A micro-batch's mean loss is multiplied by its count of units; when the window is complete, before
Lightning clips, the gradients are divided by the count of the window over all ranks. Lightning's
own divisions, by the accumulation and by the ranks, are undone there.
"""

from typing import Any

import torch
from torch import Tensor

from samestep.engine.collectives import gather_results
from samestep.errors import ConfigError, StepError
from samestep.loops.units import Unit, check_unit, count_units


class Exact:
    """Put it before a module's class, ``class MyExact(Exact, MyModule)``, and set its unit.

    Attributes:
        samestep_unit: What the loss that ``training_step`` returns is a mean over: see `exact`.
    """

    samestep_unit: Unit | None = None
    _samestep_count: float = 0.0

    def training_step(self, batch: Any, *args: Any, **options: Any) -> Any:
        """The module's own; its loss is multiplied by the units of the micro-batch."""
        module: Any = self
        parent: Any = super()
        _check(module)
        count = count_units(batch, type(module).samestep_unit or "")
        result = parent.training_step(batch, *args, **options)
        if result is None:
            return None  # a micro-batch that is left out, and not counted
        loss = result["loss"] if isinstance(result, dict) else result
        scaled = loss * count if count else _zero(loss, module)
        self._samestep_count += count
        return {**result, "loss": scaled} if isinstance(result, dict) else scaled

    def on_before_optimizer_step(self, optimizer: Any, *args: Any, **options: Any) -> None:
        """Divide what has been summed by the units of the window, then the module's own hook."""
        module: Any = self
        parent: Any = super()
        count, self._samestep_count = self._samestep_count, 0.0
        total = sum(gather_results(lambda: count))
        trainer = module.trainer
        scale = trainer.accumulate_grad_batches * trainer.world_size / total if total else 0.0
        with torch.no_grad():
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    if weight.grad is not None:
                        weight.grad.mul_(scale)
        parent.on_before_optimizer_step(optimizer, *args, **options)


def exact(module: Any, *, unit: Unit) -> Any:
    """Make the step of a LightningModule under automatic optimisation exact.

    Args:
        module: Before its training; its class is changed in place.
        unit: What the loss of its ``training_step`` is a mean over: ``labels`` (those that are not
            -100), ``shifted-labels`` (next tokens), ``rows``, or a function that counts it in a
            micro-batch.

    Returns:
        The same module.

    Raises:
        ConfigError: The unit is unknown, or the module is none of Lightning, or optimises by hand.

    Example:
        >>> from samestep.loops.lightning import exact
        >>> exact("no module", unit="rows")
        Traceback (most recent call last):
        samestep.errors.ConfigError: exact() takes a LightningModule, not str
    """
    check_unit(unit)
    if not hasattr(module, "on_before_optimizer_step"):
        raise ConfigError(f"exact() takes a LightningModule, not {type(module).__name__}")
    kind: Any = type(module)
    if not isinstance(module, Exact):
        kind = type(kind.__name__, (Exact, kind), {"__module__": __name__})
        module.__class__ = kind
    kind.samestep_unit = staticmethod(unit) if callable(unit) else unit
    _check(module)
    return module


def _check(module: Any) -> None:
    """Refuse a module whose gradients this does not reach."""
    if type(module).samestep_unit is None:
        raise ConfigError(f"{type(module).__name__}: set samestep_unit, such as 'labels'")
    if not module.automatic_optimization:
        raise ConfigError(
            f"{type(module).__name__} optimises by hand: in a loop of your own use samestep.step"
        )


def _zero(loss: Tensor, module: Any) -> Tensor:
    """A zero with a graph, whatever a mean over nothing is."""
    if bool(torch.isfinite(loss)):
        return loss * 0.0
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    if not weights:
        raise StepError("the module has no weight to train")
    return torch.stack([(weight * 0.0).sum() for weight in weights]).sum()
