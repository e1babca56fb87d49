"""The live hardware: execute the real MoE layer under a plan and score the prediction.

The package can be called: `moesim.validate(trace, plans)` is `moesim.validate.validate.validate(trace, plans)`. Names are
loaded when they are used, so that a process of one rank starts quickly.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesim.validate.calibrate import Calibration as Calibration
    from moesim.validate.calibrate import calibrate as calibrate
    from moesim.validate.layer import moe_layer as moe_layer
    from moesim.validate.validate import calibrate_for as calibrate_for
    from moesim.validate.validate import validate as validate
    from moesim.validate.weights import ExpertWeights as ExpertWeights

_WHERE = {
    "Calibration": "calibrate",
    "ExpertWeights": "weights",
    "calibrate": "calibrate",
    "calibrate_for": "validate",
    "moe_layer": "layer",
    "validate": "validate",
}
__all__ = ["Calibration", "ExpertWeights", "calibrate", "calibrate_for", "moe_layer", "validate"]


class _Callable(ModuleType):
    """The package as a function, and its names found in its rooms; a room of the same name as its function is the function."""

    def __call__(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        found: dict[str, Any] = import_module("moesim.validate.validate").validate(*arguments, **options)
        return found

    def __getattribute__(self, name: str) -> Any:
        if name in _WHERE:
            return getattr(import_module(f"moesim.validate.{_WHERE[name]}"), name)
        return super().__getattribute__(name)


sys.modules[__name__].__class__ = _Callable
