"""Event engine: per-device streams, collectives and shared links, on SimPy.

    attention → gate → dispatch → experts → combine        for every step and layer, as the system composes them

A task is work on one stream, of a device or of all; an event is what SimPy calls back for, nearly always the end of a task.
Exact: order, overlap, priorities, fluid sharing between groups. Grouped: the flows of one exchange move in proportion and
end together (their busiest port decides, as in the cost model), and collectives keep the devices' communication streams
in step. With a plain system and no contention a layer takes exactly what the lockstep engine says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from moesim.cost import CostModel
from moesim.cost.collectives import PORTS
from moesim.errors import InputError, SimulationError
from moesim.hardware import Cluster, load_links
from moesim.plan import Plan
from moesim.result import Result
from moesim.sim.copies import CopyUse, Fetcher
from moesim.sim.dense import MODES, NOTE, Mode, dense_times, gather_s
from moesim.sim.fabric import Fabric, Wiring, link_use
from moesim.sim.hops import LinkLoads
from moesim.sim.layers import Pass, encode_s, passes, sent_LGG, variants, without_oversubscription
from moesim.sim.ledger import Ledger
from moesim.sim.lockstep import CHUNK_COUNTS, CHUNK_TOKENS, inputs_of, step_chunks
from moesim.sim.program import Chunk, Program, Setting, tokens_by_slot
from moesim.sim.residency import settle
from moesim.sim.streams import Runner
from moesim.sim.tasks import ALL, Block
from moesim.sim.timeline import Timeline
from moesim.systems import SYSTEMS, System
from moesim.systems.routing import Routed, nested
from moesim.systems.slicing import Sliced, held_G
from moesim.systems.transforms import edit_of
from moesim.trace import Trace


@dataclass(frozen=True, kw_only=True, eq=False)
class EventResult(Result):
    """A Result whose layer times are elapsed times; dispatch, compute and combine are work, parts of which may overlap.

    moe_s_SL           from the end of a layer's gate to the end of its combine, forward plus backward
    step_s_S           whole steps, with attention and what else surrounds the experts
    critical_path_s    seconds of the longest chain by kind of task; they add up to the steps
    stall_s            seconds compute streams waited, all devices together, by what they waited for
    stream_use         busy share of every stream; link_use share of every link's capacity
    degrees            how often each pipeline degree was chosen, forward and backward; two batches are two parts
    exchanges          all-to-alls of one step that carried something
    gathered           experts gathered on every device, mean over steps and layers
    copies             what was copied to devices whose experts do not all stay on them; None: all do
    tasks, events      tasks that ended, and SimPy events it took: one for each of them, for each time that changed after it was
                       set (compute beside a collective, a copy that gives way), and for each alarm of the shared links
    """

    moe_s_SL: NDArray[np.float64]
    step_s_S: NDArray[np.float64]
    critical_path_s: Mapping[str, float]
    stall_s: Mapping[str, float]
    stream_use: Mapping[str, float]
    link_use: Mapping[str, float]
    degrees: Mapping[str, Mapping[int, int]]
    exchanges: float
    tasks: int
    events: int
    system: str
    gathered: float = field(default=0.0)
    copies: CopyUse | None = field(default=None)

    @cached_property
    def layer_s_SL(self) -> NDArray[np.float64]:
        """Elapsed time of each step's MoE layer."""
        return self.moe_s_SL

    def to_dict(self) -> dict[str, Any]:
        """As `Result.to_dict`, with an "event" section."""
        busiest = sorted(self.link_use.items(), key=lambda item: (-item[1], item[0]))[:32]
        section = {
            "system": self.system,
            "step_s": float(self.step_s_S.mean()),
            "critical_path_s": dict(self.critical_path_s),
            "stall_s": dict(self.stall_s),
            "stream_use": dict(self.stream_use),
            "busiest_links": dict(busiest),
            "degrees": {name: {str(r): n for r, n in counts.items()} for name, counts in self.degrees.items()},
            "exchanges_per_step": self.exchanges,
            "gathered_experts_per_layer": self.gathered,
            "tasks": self.tasks,
            "events": self.events,
        }
        if self.copies:
            section["copies"] = self.copies.to_dict()
        return super().to_dict() | {"event": section}


def simulate_event(
    trace: Trace,
    plan: Plan,
    cluster: Cluster,
    *,
    system: System | str = "plain",
    mode: Mode = "prefill",
    tokens_per_device: int = 4096,
    context: int = 4096,
    contention: bool = False,
    cost: CostModel | None = None,
    timeline: str | Path | None = None,
) -> EventResult:
    """Result of running a trace under a plan and a system, with everything that overlaps.

    Parameters
    ----------
    system : a `System` or the name of one of `moesim.systems.SYSTEMS`.
    mode : prefill, decode (every token attends to `context` tokens) or training (forward, backward, gradients, optimizer).
    contention : exchanges share the links of `cluster.graph`, whose spine is links of its own, and take at least the cost
        model's time at full NIC speed; otherwise they take exactly its time, and all traffic of one kind takes turns.
    timeline : gzipped Chrome trace to write, replacing what is there.

    Steps and tokens are as in `moesim.sim.simulate`. Memory does not grow with the steps beyond the result's arrays.
    Same inputs, same bytes. Raises PlanError, InputError; SimulationError when an invariant breaks.
    """
    chosen = _system(system, mode)
    batches = chosen.schedule.batches
    if tokens_per_device < 1 or context < 1:
        raise InputError(f"tokens_per_device={tokens_per_device}, context={context}: both must be >= 1")
    plan.check_fits(trace.model, cluster.size, place=f"plan {plan.name!r}")
    base = cost or CostModel.of(cluster, trace.model)
    ways = variants(base, chosen.exchange)
    costs = without_oversubscription(base) if contention else base
    dense = dense_times(costs, tokens=tokens_per_device / batches, context=context, mode=mode)
    wiring = Wiring.of(cluster)
    slices = next((each.slices for each in nested(chosen.routing) if isinstance(each, Sliced)), 1)
    held = held_G(plan.placement, cluster.node_G, slices)
    setting = Setting(
        cost=costs,
        variants=[without_oversubscription(way) for way in ways] if contention else ways,
        placement=plan.placement,
        system=chosen,
        dense=dense,
        held_G=held,
        encode_s_G=encode_s(costs, tokens_per_device / batches, chosen.exchange),
        fetch_s_G=_fetch_s(chosen, held * trace.model.expert_B, cluster),
        links=LinkLoads(wiring, cluster.node_G),
        contention=contention,
    )
    full = tokens_per_device * cluster.size
    steps = max(1, round(trace.tokens / full))
    most_steps = max(1, CHUNK_COUNTS // (len(plan.placement.layers) * cluster.size**2))

    def routes() -> Iterator[Routed]:
        router = chosen.routing.router(
            plan.placement,
            cluster.node_G,
            gatherable=_gatherable(costs, float(dense.attention_LG.min()), plan.placement.experts),
            selections=any(way.way.per_selection for way in ways),
        )
        for experts, ends_S in step_chunks(trace, steps, CHUNK_TOKENS, most_steps, edit=edit_of(chosen.routing)):
            yield router(experts, ends_S, float(full))

    if chosen.residency:
        setting = replace(setting, fetcher=Fetcher(settle(chosen.residency, costs, routes()), costs))
    totals, program = _Totals(setting, training=mode == "training"), Program(setting)
    ledger = Ledger(steps, len(plan.placement.layers))

    def blocks() -> Iterator[Block]:
        first = 0
        for routed in routes():
            schedule = chosen.schedule
            forward = _forward(setting, routed, first)
            backward = passes(setting.variants, routed, chosen.exchange, schedule, schedule.backward, backward=True) if totals.training else None
            chunk = Chunk(first=first, routed=routed, forward=forward, backward=backward)
            totals.add(chunk)
            yield from program.blocks(chunk)
            first += len(routed.gathered_SL)

    fabric = Fabric(simpy.Environment(), wiring.capacity_K)
    with nullcontext() if timeline is None else Timeline(Path(timeline), cluster) as track:
        runner = Runner(
            fabric,
            blocks(),
            on_wait=ledger.waited,
            on_block=ledger.block_ended,
            on_task=track.add if track else None,
        )
        runner.run()
    sent_K = totals.load_K + program.gathers_K
    if contention and not np.allclose(fabric.carried_K, sent_K, rtol=1e-9):
        k = int(np.argmax(np.abs(fabric.carried_K - sent_K)))
        raise SimulationError(f"link {wiring.names_K[k]} carried {fabric.carried_K[k]:g} B of {sent_K[k]:g} B sent; a flow was lost or made twice")
    seconds = float(ledger.end_S[-1])
    weight = full * steps / trace.tokens
    notes = [*(note for way in ways for note in way.notes), NOTE, *totals.notes(steps)]
    if not (chosen.residency or chosen.ring):  # which hold less than their placement says
        notes = [*costs.memory(plan.placement, tokens_per_device=tokens_per_device).notes(), *notes]
    if setting.fetcher:
        notes += setting.fetcher.stay.notes
    if weight > 2:
        notes.append(f"the trace holds fewer tokens than one step needs: every token stands for {weight:.3g}")
    return EventResult(
        **totals.result(steps),
        name=plan.name,
        engine="event",
        model=trace.model.name,
        cluster=cluster.name,
        layers=plan.placement.layers,
        tokens_per_step=float(full),
        notes=tuple(dict.fromkeys(notes)),
        inputs=inputs_of(trace, plan, costs, tokens_per_device, weight)
        | {"system": chosen.name, "mode": mode, "context": context, "contention": contention},
        moe_s_SL=ledger.layer_s_SL,
        step_s_S=np.diff(ledger.end_S, prepend=0.0),
        critical_path_s=dict(sorted(ledger.path_s.items())),
        stall_s=dict(sorted(ledger.stall_s.items())),
        stream_use={_title(*name): stream.busy_s / seconds if seconds else 0.0 for name, stream in sorted(runner.streams.items())},
        link_use=link_use(wiring.names_K, sent_K, wiring.capacity_K, seconds),
        exchanges=program.exchanges / steps,
        tasks=runner.tasks,
        events=runner.events,
        system=chosen.name,
        copies=setting.fetcher.use() if setting.fetcher else None,
    )


class _Totals:
    """Sums over the chunks of a run that the result reports."""

    def __init__(self, setting: Setting, *, training: bool) -> None:
        self.setting, self.training = setting, training
        self.load_K = np.zeros(len(setting.links.wiring.capacity_K))
        layers, devices = len(setting.placement.layers), setting.cost.cluster.size
        self._times: list[tuple[NDArray[np.float64], ...]] = []
        self._bytes_LGG = np.zeros((layers, devices, devices))
        self._fan_L, self._node_fan_L = np.zeros((2, layers))
        self._degrees: dict[str, dict[int, int]] = {"forward": {}, "backward": {}}
        self._busiest: Counter[str] = Counter()
        self._outside = self._gathered = 0

    def add(self, chunk: Chunk) -> None:
        """Add one chunk."""
        routed = chunk.routed
        traffic, steps = routed.traffic, len(chunk.forward.degree_SL)
        both = [chunk.forward, *([chunk.backward] if chunk.backward else [])]
        work = [tuple(p.degree_SL[..., None] * x for x in (p.there.whole_SL[..., None], p.compute_SLG, p.back.whole_SL[..., None])) for p in both]
        there, compute, back = (np.sum(parts, axis=0) for parts in zip(*work, strict=True))
        self._times.append((there[..., 0], compute, back[..., 0], traffic.device_tokens_SLG(routed.placement) / routed.slices))
        for p in both:
            for back in (False, True):  # the backward pass goes both ways reversed
                self._book_bytes(routed, p, returning=back, back=back == (p is chunk.forward))
        self._fan_L += traffic.fanout_devices_L * steps
        self._node_fan_L += traffic.fanout_nodes_L * steps
        self._outside += sum(p.outside for p in both)
        for port, times_seen in zip(*np.unique(chunk.forward.port_SL, return_counts=True), strict=True):
            self._busiest[PORTS[port] if port >= 0 else "nothing sent"] += int(times_seen)
        self._gathered += int(routed.gathered_SL.sum())
        for direction, p in zip(("forward", "backward"), both, strict=False):
            for r, n in zip(*np.unique(p.degree_SL, return_counts=True), strict=True):
                self._degrees[direction][int(r)] = self._degrees[direction].get(int(r), 0) + int(n)

    def _book_bytes(self, routed: Routed, times: Pass, *, returning: bool, back: bool) -> None:
        """Bytes of one exchange of all steps between devices and on the links; `back` is its direction."""
        setting = self.setting
        for index, cost in enumerate(setting.variants):
            at_SL = times.transport_SL == index
            if at_SL.any():
                copies = routed.copies(cost, back=returning)
                size_B = (cost.combine_B if returning else cost.dispatch_B) * setting.system.exchange.bytes_scale
                pairs_SLGG = copies.pairs_SLGG if at_SL.all() else np.where(at_SL[:, :, None, None], copies.pairs_SLGG, 0.0)
                moving = sent_LGG(pairs_SLGG, routed.slices) * size_B
                self._bytes_LGG += np.swapaxes(moving, 1, 2) if back else moving
                pairs, nodes = pairs_SLGG.sum(axis=(0, 1)), copies.nodes_SLGN[at_SL].sum(axis=0)
                self.load_K += size_B * setting.links.exchange(pairs, nodes, cost.algorithm, back=back, slices=routed.slices)[0]

    def notes(self, steps: int) -> list[str]:
        """What the reader must know."""
        layers = len(self._fan_L)
        total = 2 * steps * layers * (2 if self.training else 1)
        return (
            [f"extrapolated: {self._outside} of {total} layer computations and exchanges lie outside the calibrated range"] if self._outside else []
        )

    def result(self, steps: int) -> dict[str, Any]:
        """Fields of the result."""
        dispatch, compute, combine, tokens = (np.concatenate(arrays) for arrays in zip(*self._times, strict=True))
        return {
            "dispatch_s_SL": dispatch,
            "compute_s_SLG": compute,
            "combine_s_SL": combine,
            "tokens_SLG": tokens,
            "traffic_B_LGG": self._bytes_LGG / steps,
            "fanout_devices_L": self._fan_L / steps,
            "fanout_nodes_L": self._node_fan_L / steps,
            "bottlenecks": dict(self._busiest),
            "degrees": {name: dict(sorted(counts.items())) for name, counts in self._degrees.items() if counts},
            "gathered": self._gathered / (steps * len(self._fan_L)),
        }


def _system(system: System | str, mode: Mode) -> System:
    """The system, if there is one of that name and it can run in this mode."""
    if isinstance(system, str) and system not in SYSTEMS:
        raise InputError(f"system {system!r} is unknown; use one of {', '.join(sorted(SYSTEMS))}")
    chosen = SYSTEMS[system] if isinstance(system, str) else system
    if mode not in MODES:
        raise InputError(f"mode {mode!r} is unknown; use one of {', '.join(MODES)}")
    if mode == "training" and (chosen.ring or chosen.residency):
        raise InputError(f"system {chosen.name!r} copies experts from the host, which is modelled for inference only; use prefill or decode")
    if mode == "training" and chosen.schedule.batches > 1:
        raise InputError(f"system {chosen.name!r} overlaps two batches, which is modelled for inference only; use prefill or decode")
    return chosen


def _forward(setting: Setting, routed: Routed, first: int) -> Pass:
    """Forward pass of some steps from `first` on, with what a residency changes about computation."""
    schedule, fetcher = setting.system.schedule, setting.fetcher
    here = fetcher.stay.held(routed, first) if fetcher else routed
    degrees = tuple(r * schedule.batches for r in schedule.forward)  # a half is one of two equal parts
    forward = passes(setting.variants, here, setting.system.exchange, schedule, degrees, backward=False)
    if fetcher is None or setting.system.residency is None or setting.system.residency.order == "grouped":
        return forward
    compute = forward.compute_SLG.copy()
    for s, layer, g in np.ndindex(*compute.shape):
        compute[s, layer, g] = fetcher.experts_s(first + s, layer, g, tokens_by_slot(routed, s, layer, g))
    return replace(forward, compute_SLG=compute)


def _fetch_s(system: System, layer_B_G: NDArray[np.float64], cluster: Cluster) -> list[float]:
    """Seconds of copying one layer's experts from the host, per device; zeros without a ring."""
    if system.ring is None:
        return [0.0] * len(layer_B_G)
    name, links = system.ring.link, load_links()
    if name is not None and name not in links:
        raise InputError(f"ring link {name!r} is not known; known: {', '.join(sorted(links))}")
    found = []
    for g, size_B in enumerate(layer_B_G.tolist()):
        host = cluster.host(g)
        if name is None and host is None:
            raise InputError(
                f"device {g} of {cluster.name!r} has no host to copy experts from; add one to the cluster's file, or name the ring's link"
            )
        link = links[name] if name is not None else host.link  # type: ignore[union-attr]
        found.append(link.latency_s + size_B / link.bandwidth_Bps)
    return found


def _gatherable(cost: CostModel, budget_s: float, experts: int) -> int:
    """How many experts can be gathered on every device in `budget_s`: time grows with their number."""
    low, high = 0, experts
    while low < high:
        middle = (low + high + 1) // 2
        if gather_s(cost, middle * cost.model.expert_B) <= budget_s:
            low = middle
        else:
            high = middle - 1
    return low


def _title(stream: str, device: int) -> str:
    return stream if device == ALL else f"{stream} g{device}"
