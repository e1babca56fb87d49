"""Cost: time and bytes of one thing, as pure vectorised functions."""

from moesim.cost.model import CostModel, LayerTimes, Weights
from moesim.cost.traffic import Traffic, dispatch_table, route
from moesim.cost.transport import TRANSPORTS

__all__ = ["TRANSPORTS", "CostModel", "LayerTimes", "Traffic", "Weights", "dispatch_table", "route"]
