"""Program: the tasks of every step and layer of a model under a system, one block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from moesim.cost import CostModel
from moesim.plan import Placement
from moesim.sim.copies import Fetcher
from moesim.sim.dense import DenseTimes, gather_s, optimizer_s
from moesim.sim.hops import LinkLoads
from moesim.sim.layers import Pass
from moesim.sim.tasks import Block, Task
from moesim.systems.mechanisms import Ring, System
from moesim.systems.routing import Routed

Floats = NDArray[np.float64]
GRADIENT_B = 2.0  # bytes of one reduced gradient
GRADIENT_PIECES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Some consecutive steps, from step `first` on, with their times."""

    first: int
    routed: Routed
    forward: Pass
    backward: Pass | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What all steps of a run share.

    variants     the cost model under each transport of the system's exchange
    held_G       experts of a layer on each device
    encode_s_G   what a device does to its tokens before an exchange, and again after it
    fetch_s_G    copy of one layer's experts, for systems with a ring
    fetcher      copies of experts, for systems with a residency
    contention   traffic shares links; otherwise exchanges take the cost model's time and traffic takes turns
    """

    cost: CostModel
    variants: list[CostModel]
    placement: Placement
    system: System
    dense: DenseTimes
    held_G: Floats
    encode_s_G: Sequence[float]
    fetch_s_G: Sequence[float]
    links: LinkLoads
    contention: bool
    fetcher: Fetcher | None = None


def tokens_by_slot(routed: Routed, step: int, layer: int, g: int) -> Floats:
    """tokens_X that each of a device's slots computes in one layer of one step."""
    slots_G = routed.placement.slots_G
    end = int(slots_G[: g + 1].sum())
    return routed.traffic.slot_tokens_SLP[step, layer, end - int(slots_G[g]) : end]


class _Layer:
    """One pass of a layer of the chunk's step `s`, whose tasks are being made; layer -1 is what ends a step of training."""

    __slots__ = ("chunk", "label", "layer", "s", "tasks", "times")

    def __init__(self, chunk: Chunk, times: Pass, s: int, layer: int) -> None:
        self.chunk = chunk
        self.times = times
        self.s = s
        self.layer = layer
        self.label = (chunk.first + s, layer)
        self.tasks: list[Task] = []


class Program:
    """Builds the blocks of steps in order. `exchanges` counts all-to-alls that carry something, `gathers_K` sums the bytes
    that gathers and reductions put on each link."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.devices = range(setting.cost.cluster.size)
        self.exchanges = 0
        self.gathers_K = np.zeros(len(setting.links.wiring.capacity_K))
        apart = setting.system.schedule.tiers_apart
        shared = setting.contention
        self._weights = "weights" if shared else "inter" if apart else "exchange"
        self._gradients = "gradients" if shared else self._weights
        self._ring: dict[int, list[Task]] = {}  # layers counted from the first step → copies of their experts
        self._counted = 0
        # what the next layer of each batch waits for on each device
        self._ready: list[Sequence[Sequence[Task]]] = [[() for _ in self.devices] for _ in range(setting.system.schedule.batches)]
        self._beside: Sequence[Task] = ()  # what the last attention waited for, so that gathers run beside it
        self._reduces: list[Task] = []
        self._step_loads: dict[tuple[bool, bool], list[Floats]] = {}  # by (forward pass, way back)

    def blocks(self, chunk: Chunk) -> Iterator[Block]:
        """Blocks of the chunk's steps."""
        steps, layers = chunk.forward.degree_SL.shape
        for s in range(steps):
            self._step_loads.clear()
            for layer in range(layers):
                yield self._forward(_Layer(chunk, chunk.forward, s, layer), last=chunk.backward is None and layer == layers - 1)
            if chunk.backward is not None:
                for layer in reversed(range(layers)):
                    yield self._backward(_Layer(chunk, chunk.backward, s, layer))
                yield self._update(_Layer(chunk, chunk.backward, s, -1))

    def _forward(self, at: _Layer, *, last: bool) -> Block:
        """One layer of all batches; with two, those of the second are behind the first's in every queue."""
        setting, system = self.setting, self.setting.system
        self._beside = self._all(self._ready[0])
        if at.layer == 0 and at.chunk.routed.context_tokens:  # every device needs the hidden states of all new tokens
            size_B = at.chunk.routed.context_tokens * setting.cost.dispatch_B
            known = self._collect(at, "gather", self._weights, size_B, self._beside)
            self._ready = [[(known,) for _ in self.devices] for _ in self._ready]
            self._beside = (known,)
        needed: Sequence[Task] = ()
        gates: Sequence[Task] = ()
        attention, shared, gate = setting.dense.attention_LG[at.layer].tolist(), setting.dense.shared_G.tolist(), setting.dense.gate_G.tolist()
        for batch, ready in enumerate(self._ready):
            front = self._each(at, "attention", attention, ready, batch)
            if any(shared) and not system.schedule.shared_beside:
                front = self._each(at, "shared", shared, front, batch, going_on=True)
            front = self._each(at, "gate", gate, front, batch, going_on=True)
            if any(shared) and system.schedule.shared_beside:
                self._each(at, "shared", shared, front, batch)
            if batch == 0:
                gates, needed = self._all(front), self._gather(at, self._beside)
            needed_G: Sequence[Sequence[Task]] = [needed] * len(self.devices)
            if system.ring and self._counted in self._ring:
                needed_G = [(*needed, copy) for copy in self._ring[self._counted]]
            if setting.fetcher:
                needed_G = setting.fetcher.asked(at.tasks, at.label, front)
            self._ready[batch] = self._experts(at, front, needed_G, batch)
        if system.ring:
            self._ring.pop(self._counted, None)
            self._fetch(at, system.ring)
        ends = [self._all([waits for ready in self._ready for waits in ready])] * len(self.devices) if len(self._ready) > 1 else self._ready[0]
        if last:  # a step ends for all its tokens
            self._ready = [ends for _ in self._ready]
        return Block(label=at.label, tasks=at.tasks, span=(gates, self._all(ends)), last=last)

    def _backward(self, at: _Layer) -> Block:
        setting, system = self.setting, self.setting.system
        before, late = self._all(self._ready[0]), _Layer(at.chunk, at.times, at.s, at.layer)
        needed = self._gather(late, self._beside)
        ends = self._experts(at, self._ready[0], [needed] * len(self.devices))
        at.tasks += late.tasks  # the block's first task must come before all of the next block's
        self._beside = done = self._all(ends)
        if needed:  # gradients of gathered experts go back to their owners the way the experts came
            self._reduces.append(self._collect(at, "reduce", self._gradients, self._gathered_B(at), done))
        spent = 2 * (setting.dense.attention_LG[at.layer] + setting.dense.shared_G + setting.dense.gate_G)
        self._ready = [self._each(at, "attention", spent.tolist(), ends)]
        if system.schedule.gradients_in_gaps:
            self._reduce(at, at.layer, self._all(self._ready[0]), pieces=GRADIENT_PIECES, priority=1)
        return Block(label=at.label, tasks=at.tasks, span=(before, done))

    def _update(self, at: _Layer) -> Block:
        """Reduce what gradients are left, then the optimizer on every device."""
        setting, model = self.setting, self.setting.cost.model
        layers = len(setting.dense.parameters_L)
        if not setting.system.schedule.gradients_in_gaps:
            for layer in reversed(range(layers)):
                self._reduce(at, layer, self._all(self._ready[0]), pieces=1, priority=0)
        waits = [(*ready, *self._reduces) for ready in self._ready[0]]
        dense = float(setting.dense.parameters_L.sum()) / len(self.devices)  # optimizer state is sharded over the devices
        devices = setting.cost.cluster.devices
        spent = [
            optimizer_s(dense + layers * float(setting.held_G[g]) * model.expert_parameters, setting.cost.peaks[devices[g].name])
            for g in self.devices
        ]
        ends = self._each(at, "optimizer", spent, waits)
        self._ready, self._reduces = [ends], []
        return Block(label=at.label, tasks=at.tasks, span=((), self._all(ends)), last=True)

    def _reduce(self, at: _Layer, layer: int, after: Sequence[Task], *, pieces: int, priority: int) -> None:
        """All-reduce of a layer's replicated gradients: dense weights, and experts with several slots."""
        setting, placement = self.setting, self.setting.placement
        doubled = float((placement.replicas_LE[layer] > 1).sum()) * setting.cost.model.expert_parameters
        size_B = (float(setting.dense.parameters_L[layer]) + doubled) * GRADIENT_B
        if len(self.devices) > 1:  # reduce-scatter and all-gather
            self._reduces.append(self._collect(at, "reduce", self._gradients, size_B, after, rounds=2, pieces=pieces, priority=priority))

    def _gathered_B(self, at: _Layer) -> float:
        """Bytes of the experts that the routing has gathered on every device."""
        return int(at.chunk.routed.gathered_SL[at.s, at.layer]) * self.setting.cost.model.expert_B

    def _gather(self, at: _Layer, after: Sequence[Task]) -> Sequence[Task]:
        """Gather of hot experts beside attention, if the routing asks for one."""
        size_B = self._gathered_B(at)
        return (self._collect(at, "gather", self._weights, size_B, after),) if size_B else ()

    def _collect(
        self, at: _Layer, kind: str, stream: str, size_B: float, after: Sequence[Task], *, rounds: int = 1, pieces: int = 1, priority: int = 0
    ) -> Task:
        """A collective of `rounds` gathers or scatters of `size_B`, that may be interrupted between `pieces`."""
        setting = self.setting
        work_s = rounds * gather_s(setting.cost, size_B)
        load_K = rounds * setting.links.gather(size_B)
        self.gathers_K += load_K
        task = Task(
            kind,
            stream,
            work_s,
            after,
            label=at.label,
            load_K=load_K if setting.contention else None,
            chunk_s=work_s / pieces if pieces > 1 else 0.0,
            priority=priority,
        )
        at.tasks.append(task)
        return task

    def _experts(self, at: _Layer, front: Sequence[Sequence[Task]], needed_G: Sequence[Sequence[Task]], batch: int = 0) -> Sequence[Sequence[Task]]:
        """Dispatch, experts and combine of all parts of a batch; returns what waits on each device for their end."""
        fetcher, label = self.setting.fetcher, at.label
        parts = int(at.times.degree_SL[at.s, at.layer]) // self.setting.system.schedule.batches
        encode = self.setting.encode_s_G
        if any(encode):
            front = self._each(at, "encode", encode, front, batch, going_on=True)
        there, last_there = self._cross(at, [self._all(front)] * parts, batch, back=False)
        compute = at.times.compute_SLG[at.s, at.layer].tolist()
        computed: list[Sequence[Task]] = []
        for i, come in enumerate(there):
            after_G: Sequence[Sequence[Task]] = [(come, *needed) for needed in needed_G] if i == 0 else [(come,)] * len(self.devices)
            if fetcher is None:
                group = [Task("experts", "compute", compute[g], after_G[g], g, label, batch + i) for g in self.devices]
                at.tasks += group
            else:
                group = []
                for g in self.devices:
                    tokens_X = tokens_by_slot(at.chunk.routed, at.s, at.layer, g)
                    group += fetcher.experts(at.tasks, label, g, i, compute[g], after_G[g], needed_G[g], tokens_X)
            computed.append(group)
        # no part returns before all have left: the stage order that pipeline_span assumes
        back, _ = self._cross(at, [[*group, *last_there] for group in computed], batch, back=True)
        ends: Sequence[Sequence[Task]] = [(back[-1],)] * len(self.devices)
        return self._each(at, "decode", encode, ends, batch) if any(encode) else ends

    def _cross(self, at: _Layer, after: Sequence[Sequence[Task]], batch: int, *, back: bool) -> tuple[list[Task], Sequence[Task]]:
        """One exchange in parts: its last task of every part, and the last task of each of its streams."""
        system, parts = self.setting.system, len(after)
        crossing = at.times.back if back else at.times.there
        kind, sm_share = "combine" if back else "dispatch", system.exchange.sm_share
        stages = [("inter", crossing.nic_SL), ("intra", crossing.link_SL)] if system.schedule.tiers_apart else [("exchange", crossing.whole_SL)]
        loads = [load_LK[at.layer] for load_LK in self._loads(at, back=back)] if self.setting.contention else [None] * len(stages)
        crossed = list(zip(stages, loads, strict=True))
        self.exchanges += parts * (crossing.whole_SL[at.s, at.layer] > 0)
        last: list[Task] = []
        for (stream, work_SL), load_K in reversed(crossed) if back else crossed:
            work_s = float(work_SL[at.s, at.layer])
            share = sm_share if work_s > 0 else 0.0
            made = [Task(kind, stream, work_s, after[i], label=at.label, chunk=batch + i, load_K=load_K, sm_share=share) for i in range(parts)]
            at.tasks += made
            last.append(made[-1])
            after = [(task,) for task in made]
        return made, last

    def _loads(self, at: _Layer, *, back: bool) -> list[Floats]:
        """load_LK of one part of every stage of an exchange in every layer of a step; made for all layers at once, since that is quicker."""
        setting, routed, times, s = self.setting, at.chunk.routed, at.times, at.s
        forward = times is at.chunk.forward
        if (forward, back) not in self._step_loads:
            returning = back == forward  # the backward pass goes the combine's way first
            apart = setting.system.schedule.tiers_apart
            loads = np.zeros((2 if apart else 1, len(times.transport_SL[s]), len(self.gathers_K)))
            for index, cost in enumerate(setting.variants):
                at_L = times.transport_SL[s] == index
                if at_L.any():
                    copies = routed.copies(cost, back=returning)
                    size_B = (cost.combine_B if returning else cost.dispatch_B) * setting.system.exchange.bytes_scale
                    pairs, nodes = copies.pairs_SLGG[s, at_L], copies.nodes_SLGN[s, at_L]
                    found = setting.links.exchange(pairs, nodes, cost.algorithm, back=back, apart=apart, slices=routed.slices)
                    loads[:, at_L] = np.stack(found) * size_B
            self._step_loads[forward, back] = list(loads / times.degree_SL[s][:, None])
        return self._step_loads[forward, back]

    def _fetch(self, at: _Layer, ring: Ring) -> None:
        """Copy of the experts of the layer that takes over this layer's slot of the ring."""
        layers = len(self.setting.dense.parameters_L)
        if ring.layers < layers:
            done = [tuple(task for task in at.tasks if task.kind == "experts" and task.device == g)[-len(self._ready) :] for g in self.devices]
            made = [Task("fetch", "h2d", self.setting.fetch_s_G[g], done[g], device=g, label=at.label) for g in self.devices]
            at.tasks += made
            self._ring[self._counted + ring.layers] = made
        self._counted += 1

    def _each(
        self, at: _Layer, kind: str, work_s: Sequence[float], after: Sequence[Sequence[Task]], batch: int = 0, *, going_on: bool = False
    ) -> Sequence[Sequence[Task]]:
        """One compute task per device. A batch that is `going_on` to its dispatch lets no other begin in between."""
        priority, label = -1 if going_on and len(self._ready) > 1 else 0, at.label
        made = [Task(kind, "compute", work_s[g], after[g], g, label, batch, priority) for g in self.devices]
        at.tasks += made
        return [(task,) for task in made]

    @staticmethod
    def _all(per_device: Sequence[Sequence[Task]]) -> Sequence[Task]:
        """Every task some device waits for, once."""
        return list(dict.fromkeys(chain.from_iterable(per_device)))
