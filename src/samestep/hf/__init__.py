"""`transformers.Trainer`, and TRL's trainers derived from it, with an exact step: `exact`."""

from samestep.hf.exact_trainer import Exact, exact

__all__ = ["Exact", "exact"]
