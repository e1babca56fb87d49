"""moesim: where should the experts of a Mixture-of-Experts model live, and was the answer right on the real hardware?

Names are loaded when first used, so that `import moesim` is quick and needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "load_trace": "moesim.trace",
    "Trace": "moesim.trace",
    "TraceStats": "moesim.trace",
    "TraceWriter": "moesim.trace",
    "load_model": "moesim.model",
    "ModelSpec": "moesim.model",
    "load_cluster": "moesim.hardware",
    "load_device": "moesim.hardware",
    "Cluster": "moesim.hardware",
    "Placement": "moesim.plan",
    "load_plan": "moesim.plan",
    "load_scaling_plan": "moesim.plan",
    "load_cache_plan": "moesim.plan",
    "plan_cache": "moesim.optimize.caching",
    "place": "moesim.optimize",
    "score": "moesim.optimize",
    "simulate": "moesim.sim",
    "simulate_event": "moesim.sim.event",
    "serve": "moesim.serving",
    "load_arrivals": "moesim.serving",
    "capture": "moesim.capture",
    "validate": "moesim.validate",
}

if TYPE_CHECKING:
    from moesim.capture import capture as capture
    from moesim.hardware import Cluster as Cluster
    from moesim.hardware import load_cluster as load_cluster
    from moesim.hardware import load_device as load_device
    from moesim.model import ModelSpec as ModelSpec
    from moesim.model import load_model as load_model
    from moesim.optimize import place as place
    from moesim.optimize import score as score
    from moesim.optimize.caching import plan_cache as plan_cache
    from moesim.plan import Placement as Placement
    from moesim.plan import load_cache_plan as load_cache_plan
    from moesim.plan import load_plan as load_plan
    from moesim.plan import load_scaling_plan as load_scaling_plan
    from moesim.serving import load_arrivals as load_arrivals
    from moesim.serving import serve as serve
    from moesim.sim import simulate as simulate
    from moesim.sim.event import simulate_event as simulate_event
    from moesim.trace import Trace as Trace
    from moesim.trace import TraceStats as TraceStats
    from moesim.trace import TraceWriter as TraceWriter
    from moesim.trace import load_trace as load_trace
    from moesim.validate import validate as validate

__all__ = ["__version__", *sorted(_WHERE)]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'moesim' has no attribute {name!r}")
    module = import_module(_WHERE[name])
    return module if callable(module) else getattr(module, name)  # capture and validate: the package is the function


def __dir__() -> list[str]:
    return __all__
