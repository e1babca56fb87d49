"""The live hardware: execute the real MoE layer under a plan and score the prediction.

The package can be called: `moesim.validate(trace, plans)` is `moesim.validate.validate.validate(trace, plans)`.
"""

import sys
from types import ModuleType

from moesim.validate.calibrate import Calibration, calibrate
from moesim.validate.layer import ExpertWeights, moe_layer
from moesim.validate.validate import calibrate_for, validate

__all__ = ["Calibration", "ExpertWeights", "calibrate", "calibrate_for", "moe_layer", "validate"]


class _Callable(ModuleType):
    __call__ = staticmethod(validate)


sys.modules[__name__].__class__ = _Callable
