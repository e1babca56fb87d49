"""Problem and Solution: what a placement solver gets and returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moesim.cost import CostModel, Weights
from moesim.errors import PlanError
from moesim.hardware import Cluster
from moesim.model import ModelSpec
from moesim.optimize.constraints import Constraints, conflict
from moesim.plan import Placement, slots_per_device
from moesim.trace import Trace, TraceStats
from moesim.trace.schema import PHASES
from moesim.units import human

if TYPE_CHECKING:
    from moesim.interop import Loads

SAMPLE_TOKENS = 1 << 15  # more tokens than this change a plan less than the seed does
Progress = Callable[[float, str], None]  # share done 0..1, what is being done


class Capability(StrEnum):
    """What a solver can do; shown by `moesim solvers`, checked before it is asked."""

    REPLICATION = "replication"  # more slots than experts
    HETEROGENEOUS = "heterogeneous"  # unequal slots per device
    FANOUT = "fan-out"  # looks at which experts are chosen together, not at loads alone
    NODES = "nodes"  # knows that links inside a node are faster
    RULES = "rules"  # keeps pins and experts apart
    MOVES = "moves"  # plans from the live placement: looks for gains that few moves buy
    SCENARIOS = "scenarios"  # guards against kinds of traffic one by one
    LOADS = "loads"  # needs loads alone, no tokens
    ANYTIME = "anytime"  # better answers with more time
    EXACT = "exact"  # proves its answer optimal, or by how much it may miss
    CAUSAL = "causal"  # decides each interval from what was seen before it


class Status(StrEnum):
    """How a solve ended. Only `infeasible` comes without a placement."""

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"
    TIME_LIMIT = "time-limit"
    INFEASIBLE = "infeasible"


@dataclass(frozen=True, kw_only=True, eq=False)
class Scenario:
    """One kind of traffic: experts_TLK uint16, a sample of at most 32,768 of its tokens; weights are relative to each other."""

    name: str
    weight: float
    experts_TLK: NDArray[np.uint16]

    @classmethod
    def of(cls, trace: Trace, name: str, weight: float) -> Scenario:
        """The tokens of a domain or phase of a trace, narrowed to the same range (in shares) as the trace; PlanError unless the weight is
        finite and above 0."""
        if not (np.isfinite(weight) and weight > 0):
            raise PlanError(f"scenario {name!r}: weight {weight} must be finite and above 0")
        whole = replace(trace, tokens_range=":")  # a range of tokens is of what is selected before it
        part = whole.select(phase=name) if name in PHASES else whole.select(domain=name)
        part = part.select(tokens=trace.tokens_range) if trace.tokens_range != ":" else part
        return cls(name=name, weight=weight, experts_TLK=part.experts(limit=SAMPLE_TOKENS))


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """Place the experts of `model` on the devices of `cluster`, given how tokens chose.

    experts_TLK   uint16, the tokens to learn from (a sample of at most 32,768; 65535 = no selection)
    stats         loads, co-activation and transitions of *all* tokens to learn from
    slots_G       int32, slots each device offers per layer (together at least one per expert)
    constraints   pins, experts apart, memory, the live plan and what moving from it may cost
    scenarios     kinds of traffic (domains, phases) with their weights, for solvers that guard against each of them
    tail          share of their weight, the dearest first, whose mean counts (CVaR at 1 - tail): 1 all, near 0 the worst alone
    """

    model: ModelSpec
    cluster: Cluster
    cost: CostModel
    stats: TraceStats
    experts_TLK: NDArray[np.uint16]
    slots_G: NDArray[np.int32]
    dispatch: str = "even"
    tokens_per_device: int = 4096
    constraints: Constraints = field(default_factory=Constraints)
    scenarios: tuple[Scenario, ...] = ()
    tail: float = 0.25

    def __post_init__(self) -> None:
        if len(self.slots_G) != self.cluster.size:
            raise PlanError(f"slots for {len(self.slots_G)} devices, but cluster {self.cluster.name!r} has {self.cluster.size}")
        if not 0 < self.tail <= 1:
            raise PlanError(f"tail {self.tail} must be above 0 and at most 1; 1 is the mean, a small share the worst scenario")
        self.constraints.check(self.model.moe_layers, self.model.experts, self.cluster.size)

    @classmethod
    def of(
        cls,
        trace: Trace,
        cluster: Cluster,
        *,
        slots: int | Sequence[int] | None = None,
        dispatch: str = "even",
        tokens_per_device: int = 4096,
        cost: CostModel | None = None,
        constraints: Constraints | None = None,
        scenarios: Mapping[str, float] | None = None,
        tail: float = 0.25,
    ) -> Problem:
        """Problem of a trace's selected tokens; `slots` per layer over all devices (default: one per expert), or of each device.

        `scenarios` names domains or phases of the trace with their weights; solvers that look at scenarios guard against each.
        Raises PlanError when the slots do not divide over the devices, TraceError when a scenario has no tokens.
        """
        return cls(
            model=trace.model,
            cluster=cluster,
            cost=cost or CostModel.of(cluster, trace.model),
            stats=TraceStats.of(trace),
            experts_TLK=trace.experts(limit=SAMPLE_TOKENS),
            slots_G=_slots(slots, trace.model, cluster),
            dispatch=dispatch,
            tokens_per_device=tokens_per_device,
            constraints=constraints or Constraints(),
            scenarios=tuple(Scenario.of(trace, name, weight) for name, weight in (scenarios or {}).items()),
            tail=tail,
        )

    @classmethod
    def of_loads(cls, loads: Loads, model: ModelSpec, cluster: Cluster, **options: Any) -> Problem:
        """Problem of counts per expert alone, as engines dump them: for solvers with the capability `loads`.

        `options` are those of `of`, but scenarios. Raises PlanError when the counts are of another model. Where the number of tokens is not
        known it is taken from the counts.
        """
        if (loads.layers, loads.experts) != (model.moe_layers, model.experts):
            raise PlanError(
                f"{loads.source}: counts of {len(loads.layers)} layers x {loads.experts} experts, {model.name!r} has "
                f"{len(model.moe_layers)} x {model.experts}; give the model they were taken from"
            )
        tokens = loads.tokens or -(-int(loads.load_LE.sum(axis=1).max()) // model.top_k)
        return cls(
            model=model,
            cluster=cluster,
            cost=options.pop("cost", None) or CostModel.of(cluster, model),
            stats=replace(TraceStats.empty(model), tokens=tokens, load_LE=loads.load_LE),
            experts_TLK=np.zeros((0, len(model.moe_layers), model.top_k), np.uint16),
            slots_G=_slots(options.pop("slots", None), model, cluster),
            constraints=options.pop("constraints", None) or Constraints(),
            **options,
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
        experts, rules = self.model.experts, self.constraints
        if self.slots < experts:
            return f"{self.slots} slots cannot hold {experts} experts; give at least {experts} slots"
        if rules.memory_B_G is not None:
            each_B = self.model.expert_B * len(self.model.moe_layers)
            for device in np.flatnonzero(self.slots_G * each_B > rules.memory_B_G):
                fits = int(rules.memory_B_G[device] // each_B)
                return (
                    f"device {device}: {self.slots_G[device]} slots in each of {len(self.model.moe_layers)} layers take "
                    f"{human(float(self.slots_G[device] * each_B), 'B')} of {human(float(rules.memory_B_G[device]), 'B')}; at most {fits} fit"
                )
        for wanted, layers in rules.by_rules(self.model.moe_layers).items():
            if reason := conflict(wanted, self.slots_G, experts):
                return f"{'every layer' if len(layers) == len(self.model.moe_layers) else f'layer {layers[0]}'}: {reason}"
        return None


def _slots(slots: int | Sequence[int] | None, model: ModelSpec, cluster: Cluster) -> NDArray[np.int32]:
    """Slots of each device, from a total that divides or as given."""
    total = model.experts if slots is None else slots
    return slots_per_device(total, cluster.size) if isinstance(total, int) else np.asarray(total, np.int32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """How a solve ended, whatever was decided. `objective` and `bound` are in the solver's own terms; `optimize` scores again."""

    status: Status
    objective: float | None = None
    bound: float | None = None  # no answer can have a lower objective
    seconds: float = 0.0
    seed: int = 0
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def gap(self) -> float | None:
        """(objective - bound) / objective, if both are known."""
        if self.objective is None or self.bound is None or self.objective == 0:
            return None
        return (self.objective - self.bound) / abs(self.objective)

    def record(self) -> dict[str, Any]:
        """What a plan keeps of it, JSON-ready."""
        return {
            "status": str(self.status),
            "objective": self.objective,
            "bound": self.bound,
            "gap": self.gap,
            "seconds": round(self.seconds, 3),
            "notes": dict(self.notes),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution(Outcome):
    """A placement solver's answer; infeasible ones have no placement."""

    placement: Placement | None


class Solver(Protocol):
    """What the entry-point group `moesim.solvers` holds: a class made without arguments."""

    name: str
    solves: str  # "placement"
    capabilities: frozenset[Capability]
    requires: tuple[str, ...]  # modules beside the core dependencies

    def solve(self, problem: Problem, *, seed: int, time_limit_s: float, progress: Progress) -> Solution:
        """Solve within the time limit; infeasible and out of time are statuses, never exceptions."""
        ...
