"""Simulation engines."""

from moesim.sim.lockstep import simulate

__all__ = ["simulate"]
