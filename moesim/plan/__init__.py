"""Plans: what a solver decided."""

from moesim.plan.placement import DISPATCH_RULES, Migration, Placement, slots_per_device
from moesim.plan.plan import Plan, load_plan

__all__ = ["DISPATCH_RULES", "Migration", "Placement", "Plan", "load_plan", "slots_per_device"]
