"""Losses: pure tensor functions that sum and never divide."""

from samestep.losses.cross_entropy import logits_cross_entropy, module_cross_entropy
from samestep.losses.likelihood import (
    Likelihoods,
    linear_likelihoods,
    logits_likelihoods,
    module_likelihoods,
)
from samestep.losses.linear_cross_entropy import CrossEntropySums, linear_cross_entropy

__all__ = [
    "CrossEntropySums",
    "Likelihoods",
    "linear_cross_entropy",
    "linear_likelihoods",
    "logits_cross_entropy",
    "logits_likelihoods",
    "module_cross_entropy",
    "module_likelihoods",
]
