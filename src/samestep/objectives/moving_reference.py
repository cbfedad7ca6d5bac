"""A reference that follows the policy, once every few steps: TR-DPO."""

from typing import Any

import torch
from torch import Tensor, nn

from samestep.errors import ConfigError
from samestep.objectives.log_probs import Reference


class MovingReference(Reference):
    """A reference that moves towards the policy after a number of steps (arXiv:2404.09656).

    reference <- share x policy + (1 - share) x reference: after a step of the optimizer, never
    within one, so that every micro-batch of a step compares with the same reference.

    Args:
        model: The reference's own model, which is changed in place.
        policy: The model that trains.
        share: The policy's share of each move; 1 takes its weights as they are.
        every: Steps from one move to the next.

    Attributes:
        state: What a resumed run needs: the reference's weights by name, and "steps", how many
            steps it has seen.

    Raises:
        ConfigError: The models do not have the same weights.

    Examples:
        >>> policy, model = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
        >>> _ = policy.weight.data.fill_(1.0), model.weight.data.fill_(0.0)
        >>> reference = MovingReference(model, policy, share=0.75, every=2)
        >>> for _ in range(4):
        ...     reference.after_step(policy, True)
        >>> model.weight.item()
        0.9375
    """

    def __init__(self, model: nn.Module, policy: nn.Module, *, share: float, every: int) -> None:
        super().__init__(model)
        own, theirs = _shapes(model), _shapes(policy)
        if own != theirs:
            names = sorted(name for name in own | theirs if own.get(name) != theirs.get(name))
            raise ConfigError(
                f"sync_ref_model: the reference and the model differ in {len(names)} weights "
                f"({', '.join(names[:3])}), so that one cannot follow the other"
            )
        self._share, self._every = share, every
        self._weights = {name: weight.detach() for name, weight in model.named_parameters()}
        self._steps = torch.zeros((), dtype=torch.int64)
        self.state: dict[str, Tensor] = {**self._weights, "steps": self._steps}

    @torch.no_grad()
    def after_step(self, policy: Any, moved: bool) -> None:
        """Count a step, and move if it is time.

        Args:
            policy: The model that trains.
            moved: Whether its weights did; a step that was skipped does not count.
        """
        if not moved:
            return
        self._steps += 1
        if int(self._steps) % self._every == 0:
            for name, weight in policy.named_parameters():
                own = self._weights[name]
                own.lerp_(weight.detach().to(own.dtype), self._share)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in model.named_parameters()}
