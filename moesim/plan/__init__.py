"""Plans: what a solver decided."""

from moesim.plan.cache import TIERS, CachePlan, load_cache_plan
from moesim.plan.placement import DISPATCH_RULES, FIXED_RULES, Migration, Placement, slots_per_device
from moesim.plan.plan import Plan, load_plan
from moesim.plan.scaling import Resizing, ScalingPlan, load_scaling_plan

__all__ = [
    "DISPATCH_RULES", "FIXED_RULES", "TIERS", "CachePlan", "Migration", "Placement", "Plan", "Resizing", "ScalingPlan",
    "load_cache_plan", "load_plan", "load_scaling_plan", "slots_per_device",
]  # fmt: skip
