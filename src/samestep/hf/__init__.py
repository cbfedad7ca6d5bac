"""`transformers.Trainer`, and TRL's trainers derived from it, with an exact step: `exact`."""

from samestep.utils.extras import MissingExtraError

try:
    from samestep.hf.exact_trainer import Exact, exact
except ModuleNotFoundError as error:
    if error.name not in ("transformers", "accelerate"):
        raise
    raise MissingExtraError(
        f"samestep.hf makes trainers of transformers exact, and {error.name} is not installed "
        "here: pip install 'transformers[torch]'"
    ) from error

__all__ = ["Exact", "exact"]
