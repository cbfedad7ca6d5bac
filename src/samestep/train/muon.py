"""Muon for the matrices of layers and AdamW for all other weights, as one optimizer."""

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Muon, Optimizer

from samestep.errors import ConfigError
from samestep.train.optim import OptimizerSettings


class _MuonAndAdamW(Optimizer):
    """PyTorch's Muon and AdamW over the same groups and state.

    Args:
        groups: Parameter groups; "hidden" says of each which of both it goes to.
        lr: Of both: Muon's updates are scaled to the size of AdamW's (arXiv:2502.16982).
        momentum: Muon's.
        betas: AdamW's.
        eps: AdamW's.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        *,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        muon = [group for group in self.param_groups if group["hidden"]]
        others = [group for group in self.param_groups if not group["hidden"]]
        self._parts: list[Optimizer] = []
        if muon:
            scaling = "match_rms_adamw"
            self._parts.append(Muon(muon, lr=lr, momentum=momentum, adjust_lr_fn=scaling))
        if others:
            self._parts.append(AdamW(others, lr=lr, betas=betas, eps=eps, fused=True))
        self._share()

    def _share(self) -> None:
        """Let both work on the groups and the state of this optimizer."""
        for part, hidden in zip(self._parts, self._kinds(), strict=True):
            part.param_groups = [g for g in self.param_groups if g["hidden"] is hidden]
            part.state = self.state

    def _kinds(self) -> list[bool]:
        return [isinstance(part, Muon) for part in self._parts]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of every optimizer."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of all weights."""
        for part in self._parts:
            part.step()


def muon(groups: list[dict[str, Any]], settings: OptimizerSettings) -> Optimizer:
    """The optimizer of ``optimizer: muon``.

    Args:
        groups: Parameter groups of `samestep.train.optim.build_optimizer`.
        settings: ``lr``, ``momentum``, ``betas``, ``eps``.

    Returns:
        The optimizer.

    Raises:
        ConfigError: Weights are in shards: Muon needs whole matrices.
    """
    if any(isinstance(weight, DTensor) for group in groups for weight in group["params"]):
        raise ConfigError("optimizer: muon needs whole matrices: not under parallel fsdp2")
    return _MuonAndAdamW(
        groups,
        settings.lr,
        momentum=0.95 if settings.momentum is None else settings.momentum,
        betas=settings.betas or (0.9, 0.999),
        eps=settings.eps or 1e-8,
    )
