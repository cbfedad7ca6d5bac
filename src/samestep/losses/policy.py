"""Policy gradients from given rollouts: one number a token."""

from typing import NamedTuple

import torch
from torch import Tensor


class ClipRange(NamedTuple):
    """How far the ratio of new to old policy may go from 1 before its gradient is cut off.

    Attributes:
        low: The ratio is clipped below 1 - low.
        high: The ratio is clipped above 1 + high.
    """

    low: float = 0.2
    high: float = 0.2


def clipped_losses(
    log_ratio: Tensor, advantages: Tensor, *, clip: ClipRange
) -> tuple[Tensor, Tensor]:
    """PPO's surrogate, arXiv:1707.06347 eq. 7: -min(q A, clip(q, 1 - low, 1 + high) A).

    Args:
        log_ratio: log q = log p - log p_old, of tokens or of sequences [any].
        advantages: A [any].
        clip: The range of the ratio.

    Returns:
        Losses [any], and whether the clipped term was the minimum [any]: 1 or 0, detached.
    """
    ratio = log_ratio.exp()
    surrogate = ratio * advantages
    clipped = ratio.clamp(1 - clip.low, 1 + clip.high) * advantages
    losses = -torch.minimum(surrogate, clipped)
    return losses, (clipped < surrogate).to(losses).detach()


def kl_estimates(log_p: Tensor, log_p_reference: Tensor) -> Tensor:
    """KL of policy to reference at sampled tokens, never below 0 ("k3"): exp(d) - d - 1.

    http://joschu.net/blog/kl-approx.html, with d = log p_reference - log p.

    Args:
        log_p: Log probabilities of the tokens under the policy [any].
        log_p_reference: Those under the reference [any].

    Returns:
        [any].
    """
    difference = log_p_reference - log_p
    return difference.exp() - difference - 1


def dft_losses(nll: Tensor) -> Tensor:
    """Dynamic fine-tuning, arXiv:2508.05629: p x nll of each target, p without a gradient.

    Args:
        nll: Negative log likelihood of each target [any].

    Returns:
        [any].
    """
    return (-nll).exp().detach() * nll
