"""Policy gradients from given rollouts: one number a token."""

from typing import NamedTuple

import torch
from torch import Tensor


class Clip(NamedTuple):
    """How far the ratio of new to old policy may go before its gradient ends.

    Attributes:
        low: Below 1 by this.
        high: Above 1 by this.
    """

    low: float = 0.2
    high: float = 0.2


def clipped_losses(log_ratio: Tensor, advantages: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    """PPO's surrogate, arXiv:1707.06347 eq. 7: -min(q A, clip(q, 1 - low, 1 + high) A).

    Args:
        log_ratio: log q = log p - log p_old, of tokens or of sequences [any].
        advantages: A [any].
        clip: The bounds.

    Returns:
        Losses [any], and whether the bound was what counted [any], detached.
    """
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - clip.low, 1 + clip.high)
    losses = -torch.minimum(ratio * advantages, bounded * advantages)
    return losses, (bounded * advantages < ratio * advantages).to(losses).detach()


def kl_estimates(log_p: Tensor, reference: Tensor) -> Tensor:
    """KL of policy to reference at sampled tokens, never below 0 ("k3"): exp(d) - d - 1.

    http://joschu.net/blog/kl-approx.html, with d = log p_reference - log p.

    Args:
        log_p: [any].
        reference: [any].

    Returns:
        [any].
    """
    difference = reference - log_p
    return difference.exp() - difference - 1


def dft_losses(nll: Tensor) -> Tensor:
    """Dynamic fine-tuning, arXiv:2508.05629: p x nll of each target, p without a gradient.

    Args:
        nll: Negative log likelihood of each target [any].

    Returns:
        [any].
    """
    return (-nll).exp().detach() * nll
