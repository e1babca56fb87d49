"""What a process has opened: traces, clusters, costs and plans, each once, by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from moesim.model import ModelSpec, load_model
from moesim.trace import Trace, TraceBatch, load_trace

if TYPE_CHECKING:
    from moesim.cost import CostModel
    from moesim.hardware import Cluster
    from moesim.optimize import Problem, Solution
    from moesim.plan import Plan
    from moesim.serving import Arrivals

HELD_B = 64 * 2**20  # selections up to this size are decoded once per process; larger ones are streamed each time
_ROWS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class HeldTrace(Trace):
    """A selection of a trace whose expert ids stay in memory, if they are few."""

    def batches(
        self, *, rows: int = _ROWS, layers: Any = None, weights: bool = False, logits: bool = False, columns: Any = ()
    ) -> Iterator[TraceBatch]:
        """As `Trace.batches`; expert ids of a small selection are served from memory."""
        small = self.tokens * len(self.model.moe_layers) * self.info.top_k * 2 <= HELD_B
        if layers is not None or weights or logits or columns or not small:
            yield from super().batches(rows=rows, layers=layers, weights=weights, logits=logits, columns=columns)
            return
        for batch in self._held:
            for start in range(0, len(batch), rows):
                yield TraceBatch(experts_TLK=batch.experts_TLK[start : start + rows], weights_TLK=None, columns={})

    @cached_property
    def _held(self) -> tuple[TraceBatch, ...]:
        return tuple(super().batches(rows=_ROWS))


@lru_cache(16)
def whole(path: str) -> Trace:
    """The trace at a path."""
    return load_trace(path)


@lru_cache(16)
def selected(path: str, domain: str | None, phase: str | None, tokens: str) -> Trace:
    """A part of a trace, decoded once where it is small."""
    trace = whole(path)
    held = HeldTrace(path=trace.path, parts=trace.parts, info=trace.info)
    return held.select(domain=domain, phase=phase).select(tokens=tokens)


@lru_cache(64)
def cluster(name: str, bandwidth: float = 1.0) -> Cluster:
    """A cluster whose links between devices and nodes carry `bandwidth` times what its file says."""
    from moesim.hardware import load_cluster

    found = load_cluster(name)
    return found if bandwidth == 1.0 else faster(found, bandwidth)


def faster(where: Cluster, times: float) -> Cluster:
    """The same devices on links of `times` the bandwidth; the name says so."""

    def link(one: Any) -> Any:
        return replace(one, bandwidth_Bps=one.bandwidth_Bps * times)

    return replace(
        where,
        name=f"{where.name}, links ×{times:g}",
        intra_G=tuple(map(link, where.intra_G)),
        network=link(where.network) if where.network else None,
        own_nics={g: link(nic) for g, nic in where.own_nics.items()},
        edges=tuple((a, b, link(edge)) for a, b, edge in where.edges),
    )


@lru_cache(64)
def costs(name: str, bandwidth: float, trace: str, transport: str | None) -> CostModel:
    """Cost model of a cluster for the model of a trace."""
    from moesim.cost import CostModel

    return CostModel.of(cluster(name, bandwidth), whole(trace).model, transport=transport)


@lru_cache(64)
def model(name: str) -> ModelSpec:
    """A model by preset or by the path of its config.json."""
    return load_model(name)


@lru_cache(8)
def arrivals(text: str, seed: int) -> Arrivals:
    """Requests of a file, or of a process by its numbers."""
    from moesim.serving.opening import open_arrivals

    return open_arrivals(text, seed=seed)


@lru_cache(64)
def plan_at(path: str) -> Plan:
    """The placement plan at a path."""
    from moesim.plan import load_plan

    return load_plan(path)


@lru_cache(8)
def problem(
    trace: str, domain: str | None, phase: str | None, learn: str, name: str, bandwidth: float, transport: str | None, slots: int,
    dispatch: str, tokens_per_device: int,
) -> Problem:  # fmt: skip
    """Placement problem of a part of a trace."""
    from moesim.optimize import Problem

    return Problem.of(
        selected(trace, domain, phase, learn),
        cluster(name, bandwidth),
        slots=slots,
        dispatch=dispatch,
        tokens_per_device=tokens_per_device,
        cost=costs(name, bandwidth, trace, transport),
    )


@lru_cache(64)
def placed(solver: str, seed: int, time_limit_s: float, *posed: Any) -> tuple[Plan | None, Solution]:
    """Plan of a solver for `problem(*posed)`, made once per process."""
    from moesim.optimize import place

    asked = problem(*posed)
    source = selected(*posed[:4])
    return place(asked, solver=solver, seed=seed, time_limit_s=time_limit_s, learnt_from=f"{source.digest} ({source.selection})")
