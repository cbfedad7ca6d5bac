"""samestep: the optimizer step is a function of the effective batch alone.

What this module exports is public: documented, with an example each, and kept stable. All other
modules are internal, except for what the pages "Adding a ..." of the documentation name.
Importing this package is cheap: PyTorch is loaded when the first name that needs it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from samestep.errors import (
    CheckError,
    CheckpointError,
    ConfigError,
    DataError,
    NotFiniteError,
    OutOfMemoryError,
    SamestepError,
    StepError,
)

if TYPE_CHECKING:
    from samestep.audit.axes.axis import Axis as Axis
    from samestep.audit.axes.axis import Measurement as Measurement
    from samestep.audit.causes import Cause as Cause
    from samestep.audit.causes import Diagnosis as Diagnosis
    from samestep.audit.check import CheckReport as CheckReport
    from samestep.audit.check import assert_same_step as assert_same_step
    from samestep.audit.check import check as check
    from samestep.engine.bitwise import Bitwise as Bitwise
    from samestep.engine.counts import target_weights as target_weights
    from samestep.engine.evaluate import EvalReport as EvalReport
    from samestep.engine.evaluate import evaluate as evaluate
    from samestep.engine.parallel import Idle as Idle
    from samestep.engine.step import StepReport as StepReport
    from samestep.engine.step import backward as backward
    from samestep.engine.step import step as step
    from samestep.engine.terms import Coupled as Coupled
    from samestep.engine.terms import Objective as Objective
    from samestep.engine.terms import Term as Term
    from samestep.engine.terms import constant as constant
    from samestep.engine.two_pass import TwoPass as TwoPass
    from samestep.loops.accelerate import windows as windows
    from samestep.losses.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
    from samestep.models.outputs import model_inputs as model_inputs
    from samestep.objectives.language import CausalLMLoss as CausalLMLoss
    from samestep.train.callbacks import Callback as Callback
    from samestep.train.fit import FitResult as FitResult
    from samestep.train.fit import fit as fit

__version__ = "0.2.0"

_HOME = {
    "Axis": "samestep.audit.axes.axis",
    "Bitwise": "samestep.engine.bitwise",
    "Callback": "samestep.train.callbacks",
    "CausalLMLoss": "samestep.objectives.language",
    "Cause": "samestep.audit.causes",
    "CheckReport": "samestep.audit.check",
    "Coupled": "samestep.engine.terms",
    "Diagnosis": "samestep.audit.causes",
    "EvalReport": "samestep.engine.evaluate",
    "FitResult": "samestep.train.fit",
    "Idle": "samestep.engine.parallel",
    "Measurement": "samestep.audit.axes.axis",
    "Objective": "samestep.engine.terms",
    "StepReport": "samestep.engine.step",
    "Term": "samestep.engine.terms",
    "TwoPass": "samestep.engine.two_pass",
    "assert_same_step": "samestep.audit.check",
    "backward": "samestep.engine.step",
    "check": "samestep.audit.check",
    "constant": "samestep.engine.terms",
    "evaluate": "samestep.engine.evaluate",
    "fit": "samestep.train.fit",
    "linear_cross_entropy": "samestep.losses.linear_cross_entropy",
    "model_inputs": "samestep.models.lm_head",
    "step": "samestep.engine.step",
    "target_weights": "samestep.engine.counts",
    "windows": "samestep.loops.accelerate",
}

__all__ = [
    "Axis",
    "Bitwise",
    "Callback",
    "CausalLMLoss",
    "Cause",
    "CheckError",
    "CheckReport",
    "CheckpointError",
    "ConfigError",
    "Coupled",
    "DataError",
    "Diagnosis",
    "EvalReport",
    "FitResult",
    "Idle",
    "Measurement",
    "NotFiniteError",
    "Objective",
    "OutOfMemoryError",
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
    "fit",
    "linear_cross_entropy",
    "model_inputs",
    "step",
    "target_weights",
    "windows",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'samestep' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
