"""Losses: pure tensor functions that sum and never divide."""

from samestep.losses.cross_entropy import logits_cross_entropy, module_cross_entropy
from samestep.losses.linear_cross_entropy import CrossEntropySums, linear_cross_entropy

__all__ = [
    "CrossEntropySums",
    "linear_cross_entropy",
    "logits_cross_entropy",
    "module_cross_entropy",
]
