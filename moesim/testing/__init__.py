"""Conformance kit: a solver is tested by inheriting a suite and supplying one fixture.

    class TestMine(PlacementSolverSuite):
        solver = staticmethod(MySolver)          # anything that makes one when called without arguments

pytest collects the tests of the suite. For determinism across processes the solver must be importable by name.
"""

from moesim.testing.caching import CachingSolverSuite
from moesim.testing.placement import PlacementSolverSuite
from moesim.testing.policies import PolicySuite
from moesim.testing.routing import MODEL, clustered_routing, problem_of
from moesim.testing.scaling import ScalingSolverSuite

__all__ = ["MODEL", "CachingSolverSuite", "PlacementSolverSuite", "PolicySuite", "ScalingSolverSuite", "clustered_routing", "problem_of"]
