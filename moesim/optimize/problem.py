"""Problem and Solution: what a placement solver gets and returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moesim.cost import CostModel, Weights
from moesim.errors import PlanError
from moesim.hardware import Cluster
from moesim.model import ModelSpec
from moesim.plan import Placement, slots_per_device
from moesim.trace import Trace, TraceStats

SAMPLE_TOKENS = 1 << 15  # more tokens than this change a plan less than the seed does
Progress = Callable[[float, str], None]  # share done 0..1, what is being done


class Capability(StrEnum):
    """What a solver can do; shown by `moesim solvers`, checked before it is asked."""

    REPLICATION = "replication"  # more slots than experts
    HETEROGENEOUS = "heterogeneous"  # unequal slots per device
    FANOUT = "fan-out"  # looks at which experts are chosen together, not at loads alone
    NODES = "nodes"  # knows that links inside a node are faster
    ANYTIME = "anytime"  # better answers with more time
    EXACT = "exact"  # proves its answer optimal, or by how much it may miss


class Status(StrEnum):
    """How a solve ended. Only `infeasible` comes without a placement."""

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"
    TIME_LIMIT = "time-limit"
    INFEASIBLE = "infeasible"


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """Place the experts of `model` on the devices of `cluster`, given how tokens chose.

    experts_TLK   uint16, the tokens to learn from (a sample of at most 32,768; 65535 = no selection)
    stats         loads, co-activation and transitions of *all* tokens to learn from
    slots_G       int32, slots each device offers per layer (each at least... together at least one per expert)
    """

    model: ModelSpec
    cluster: Cluster
    cost: CostModel
    stats: TraceStats
    experts_TLK: NDArray[np.uint16]
    slots_G: NDArray[np.int32]
    dispatch: str = "even"
    tokens_per_device: int = 4096

    def __post_init__(self) -> None:
        if len(self.slots_G) != self.cluster.size:
            raise PlanError(f"slots for {len(self.slots_G)} devices, but cluster {self.cluster.name!r} has {self.cluster.size}")

    @classmethod
    def of(
        cls,
        trace: Trace,
        cluster: Cluster,
        *,
        slots: int | None = None,
        dispatch: str = "even",
        tokens_per_device: int = 4096,
        cost: CostModel | None = None,
    ) -> Problem:
        """Problem of a trace's selected tokens; `slots` per layer over all devices (default: one per expert).

        Raises PlanError when the slots do not divide over the devices.
        """
        total = trace.model.experts if slots is None else slots
        return cls(
            model=trace.model,
            cluster=cluster,
            cost=cost or CostModel.of(cluster, trace.model),
            stats=TraceStats.of(trace),
            experts_TLK=trace.experts(limit=SAMPLE_TOKENS),
            slots_G=slots_per_device(total, cluster.size),
            dispatch=dispatch,
            tokens_per_device=tokens_per_device,
        )

    @property
    def slots(self) -> int:
        """Physical slots per layer, P."""
        return int(self.slots_G.sum())

    @property
    def load_LE(self) -> NDArray[np.float64]:
        """Selections of each expert."""
        return self.stats.load_LE.astype(np.float64)

    @cached_property
    def weights(self) -> Weights:
        """Seconds per layer that one unit of load ratio, device fan-out and node fan-out cost, from the cost model."""
        return self.cost.weights(tokens_per_device=self.tokens_per_device)

    def placement(self, slots_LP: NDArray[np.integer]) -> Placement:
        """Placement of this problem from a solver's slots; raises PlanError when it is invalid."""
        return Placement(
            slots_LP=np.asarray(slots_LP, np.int32),
            slots_G=self.slots_G,
            experts=self.model.experts,
            layers=self.model.moe_layers,
            dispatch=self.dispatch,
        )

    def infeasible(self) -> str | None:
        """Why no placement can exist, or None."""
        if self.slots < self.model.experts:
            return f"{self.slots} slots cannot hold {self.model.experts} experts; give at least {self.model.experts} slots"
        return None


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """A solver's answer. `objective` and `bound` are in the solver's own terms; `optimize` re-scores the placement."""

    status: Status
    placement: Placement | None
    objective: float | None = None
    bound: float | None = None  # no placement can have a lower objective
    seconds: float = 0.0
    seed: int = 0
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def gap(self) -> float | None:
        """(objective - bound) / objective, if both are known."""
        if self.objective is None or self.bound is None or self.objective == 0:
            return None
        return (self.objective - self.bound) / abs(self.objective)


class Solver(Protocol):
    """What the entry-point group `moesim.solvers` holds: a class made without arguments."""

    name: str
    solves: str  # "placement"
    capabilities: frozenset[Capability]
    requires: tuple[str, ...]  # modules beside the core dependencies

    def solve(self, problem: Problem, *, seed: int, time_limit_s: float, progress: Progress) -> Solution:
        """Solve within the time limit; infeasible and out of time are statuses, never exceptions."""
        ...
