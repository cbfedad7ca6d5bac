"""samestep: the optimizer step is a function of the effective batch alone.

Importing this package is cheap: PyTorch is loaded when the first name that needs it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from samestep.errors import (
    CheckError,
    CheckpointError,
    ConfigError,
    DataError,
    SamestepError,
    StepError,
)

if TYPE_CHECKING:
    from samestep.audit.api import assert_same_step as assert_same_step
    from samestep.audit.api import check as check
    from samestep.audit.check import CheckReport as CheckReport
    from samestep.causal_lm import CausalLMLoss as CausalLMLoss
    from samestep.coupled import Coupled as Coupled
    from samestep.evaluation import EvalReport as EvalReport
    from samestep.evaluation import evaluate as evaluate
    from samestep.lm_head import model_inputs as model_inputs
    from samestep.losses.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
    from samestep.objective import Objective as Objective
    from samestep.terms import Term as Term
    from samestep.terms import constant as constant
    from samestep.terms import target_weights as target_weights
    from samestep.train_step import StepReport as StepReport
    from samestep.train_step import backward as backward
    from samestep.train_step import step as step
    from samestep.two_pass import TwoPass as TwoPass

__version__ = "0.1.0"

_HOME = {
    "CausalLMLoss": "samestep.causal_lm",
    "CheckReport": "samestep.audit.check",
    "Coupled": "samestep.coupled",
    "EvalReport": "samestep.evaluation",
    "Objective": "samestep.objective",
    "StepReport": "samestep.train_step",
    "Term": "samestep.terms",
    "TwoPass": "samestep.two_pass",
    "assert_same_step": "samestep.audit.api",
    "backward": "samestep.train_step",
    "check": "samestep.audit.api",
    "constant": "samestep.terms",
    "evaluate": "samestep.evaluation",
    "linear_cross_entropy": "samestep.losses.linear_cross_entropy",
    "model_inputs": "samestep.lm_head",
    "step": "samestep.train_step",
    "target_weights": "samestep.terms",
}

__all__ = [
    "CausalLMLoss",
    "CheckError",
    "CheckReport",
    "CheckpointError",
    "ConfigError",
    "Coupled",
    "DataError",
    "EvalReport",
    "Objective",
    "SamestepError",
    "StepError",
    "StepReport",
    "Term",
    "TwoPass",
    "__version__",
    "assert_same_step",
    "backward",
    "check",
    "constant",
    "evaluate",
    "linear_cross_entropy",
    "model_inputs",
    "step",
    "target_weights",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'samestep' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
