"""Serving: requests, batches and key-value memory over time."""

from moesim.serving.arrivals import Arrivals, Prefixes
from moesim.serving.changes import Change
from moesim.serving.deployment import Deployment
from moesim.serving.formats import load_arrivals
from moesim.serving.generate import generate, lognormal
from moesim.serving.layout import even_placement, first_devices, parse_layout
from moesim.serving.result import ServingResult
from moesim.serving.routing import Routing
from moesim.serving.serve import serve
from moesim.serving.slo import Slo
from moesim.serving.steps import StepLaw

__all__ = [
    "Arrivals",
    "Change",
    "Deployment",
    "Prefixes",
    "Routing",
    "ServingResult",
    "Slo",
    "StepLaw",
    "even_placement",
    "first_devices",
    "generate",
    "load_arrivals",
    "lognormal",
    "parse_layout",
    "serve",
]
