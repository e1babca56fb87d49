"""Program: the tasks of every step and layer of a model under a system, one block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
        self._ready: list[list[Sequence[Task]]] = [[() for _ in self.devices] for _ in range(setting.system.schedule.batches)]
        self._beside: Sequence[Task] = ()  # what the last attention waited for, so that gathers run beside it
        self._reduces: list[Task] = []
        self._step_loads: dict[tuple[bool, bool], tuple[Floats, Floats]] = {}  # by (forward pass, way back)

    def blocks(self, chunk: Chunk) -> Iterator[Block]:
        """Blocks of the chunk's steps."""
        steps, layers = chunk.forward.degree_SL.shape
        for s in range(steps):
            self._step_loads.clear()
            for layer in range(layers):
                yield self._forward(chunk, s, layer, last=chunk.backward is None and layer == layers - 1)
            if chunk.backward is not None:
                for layer in reversed(range(layers)):
                    yield self._backward(chunk, chunk.backward, s, layer)
                yield self._update(chunk.first + s)

    def _forward(self, chunk: Chunk, s: int, layer: int, *, last: bool) -> Block:
        """One layer of all batches; with two, those of the second are behind the first's in every queue."""
        setting, system = self.setting, self.setting.system
        label = (chunk.first + s, layer)
        tasks: list[Task] = []
        self._beside = self._all(self._ready[0])
        if layer == 0 and chunk.routed.context_tokens:  # every device needs the hidden states of all new tokens
            size_B = chunk.routed.context_tokens * setting.cost.dispatch_B
            known = self._collect(tasks, "gather", self._weights, size_B, self._beside, label)
            self._ready = [[(known,) for _ in self.devices] for _ in self._ready]
            self._beside = (known,)
        needed: Sequence[Task] = ()
        gates: Sequence[Task] = ()
        for batch, ready in enumerate(self._ready):
            front = self._each(tasks, "attention", setting.dense.attention_LG[layer].tolist(), ready, label, batch)
            shared = setting.dense.shared_G.tolist()
            if any(shared) and not system.schedule.shared_beside:
                front = self._each(tasks, "shared", shared, front, label, batch, going_on=True)
            front = self._each(tasks, "gate", setting.dense.gate_G.tolist(), front, label, batch, going_on=True)
            if any(shared) and system.schedule.shared_beside:
                self._each(tasks, "shared", shared, front, label, batch)
            if batch == 0:
                gates, needed = self._all(front), self._gather(tasks, chunk, s, layer, label)
            needed_G: Sequence[Sequence[Task]] = [needed for _ in self.devices]
            if system.ring and self._counted in self._ring:
                needed_G = [(*needed, copy) for copy in self._ring[self._counted]]
            if setting.fetcher:
                needed_G = setting.fetcher.asked(tasks, label, front)
            self._ready[batch] = list(self._experts(tasks, chunk, chunk.forward, s, layer, label, front, needed_G, batch))
        if system.ring:
            self._ring.pop(self._counted, None)
            self._fetch(tasks, label, system.ring)
        ends = [self._all([waits for ready in self._ready for waits in ready])] * len(self.devices) if len(self._ready) > 1 else self._ready[0]
        if last:  # a step ends for all its tokens
            self._ready = [list(ends) for _ in self._ready]
        return Block(label=label, tasks=tasks, span=(gates, self._all(ends)), last=last)

    def _backward(self, chunk: Chunk, times: Pass, s: int, layer: int) -> Block:
        setting, system = self.setting, self.setting.system
        label = (chunk.first + s, layer)
        tasks: list[Task] = []
        before, beside = self._all(self._ready[0]), self._beside
        late: list[Task] = []
        needed = self._gather(late, chunk, s, layer, label, after=beside)
        ends = self._experts(tasks, chunk, times, s, layer, label, self._ready[0], [needed for _ in self.devices])
        tasks += late  # the block's first task must come before all of the next block's
        done = self._all(ends)
        self._beside = done
        if needed:  # gradients of gathered experts go back to their owners the way the experts came
            size_B = int(chunk.routed.gathered_SL[s, layer]) * setting.cost.model.expert_B
            self._reduces.append(self._collect(tasks, "reduce", self._gradients, size_B, done, label))
        spent = 2 * (setting.dense.attention_LG[layer] + setting.dense.shared_G + setting.dense.gate_G)
        ready = self._each(tasks, "attention", spent.tolist(), ends, label)
        if system.schedule.gradients_in_gaps:
            self._reduce(tasks, label, layer, self._all(ready), pieces=GRADIENT_PIECES, priority=1)
        block = self._close(tasks, label, before, ends, last=False)
        self._ready = [list(ready)]
        return block

    def _update(self, step: int) -> Block:
        """Reduce what gradients are left, then the optimizer on every device."""
        setting, model = self.setting, self.setting.cost.model
        label = (step, -1)
        tasks: list[Task] = []
        if not setting.system.schedule.gradients_in_gaps:
            for layer in reversed(range(len(setting.dense.parameters_L))):
                self._reduce(tasks, label, layer, self._all(self._ready[0]), pieces=1, priority=0)
        waits = [(*ready, *self._reduces) for ready in self._ready[0]]
        layers = len(setting.dense.parameters_L)
        dense = float(setting.dense.parameters_L.sum()) / len(self.devices)  # optimizer state is sharded over the devices
        devices = setting.cost.cluster.devices
        spent = [
            optimizer_s(dense + layers * float(setting.held_G[g]) * model.expert_parameters, setting.cost.peaks[devices[g].name])
            for g in self.devices
        ]
        ends = self._each(tasks, "optimizer", spent, waits, label)
        self._reduces = []
        return self._close(tasks, label, (), ends, last=True)

    def _reduce(self, tasks: list[Task], label: tuple[int, int], layer: int, after: Sequence[Task], *, pieces: int, priority: int) -> None:
        """All-reduce of a layer's replicated gradients: dense weights, and experts with several slots."""
        setting, placement = self.setting, self.setting.placement
        doubled = float((placement.replicas_LE[layer] > 1).sum()) * setting.cost.model.expert_parameters
        size_B = (float(setting.dense.parameters_L[layer]) + doubled) * GRADIENT_B
        if len(self.devices) > 1:  # reduce-scatter and all-gather
            self._reduces.append(self._collect(tasks, "reduce", self._gradients, size_B, after, label, rounds=2, pieces=pieces, priority=priority))

    def _gather(
        self, tasks: list[Task], chunk: Chunk, s: int, layer: int, label: tuple[int, int], *, after: Sequence[Task] | None = None
    ) -> Sequence[Task]:
        """Gather of hot experts beside attention, if the routing asks for one."""
        size_B = int(chunk.routed.gathered_SL[s, layer]) * self.setting.cost.model.expert_B
        return (self._collect(tasks, "gather", self._weights, size_B, self._beside if after is None else after, label),) if size_B else ()

    def _collect(
        self,
        tasks: list[Task],
        kind: str,
        stream: str,
        size_B: float,
        after: Sequence[Task],
        label: tuple[int, int],
        *,
        rounds: int = 1,
        pieces: int = 1,
        priority: int = 0,
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
            label=label,
            load_K=load_K if setting.contention else None,
            chunk_s=work_s / pieces if pieces > 1 else 0.0,
            priority=priority,
        )
        tasks.append(task)
        return task

    def _experts(
        self,
        tasks: list[Task],
        chunk: Chunk,
        times: Pass,
        s: int,
        layer: int,
        label: tuple[int, int],
        front: Sequence[Sequence[Task]],
        needed_G: Sequence[Sequence[Task]],
        batch: int = 0,
    ) -> Sequence[Sequence[Task]]:
        """Dispatch, experts and combine of all parts of a batch; returns what waits on each device for their end."""
        parts = int(times.degree_SL[s, layer]) // self.setting.system.schedule.batches
        encode = self.setting.encode_s_G
        if any(encode):
            front = self._each(tasks, "encode", encode, front, label, batch, going_on=True)
        begin = self._all(front)
        there, last_there = self._cross(tasks, chunk, times, s, layer, label, [begin] * parts, batch, back=False)
        compute = times.compute_SLG[s, layer].tolist()
        computed: list[Sequence[Task]] = []
        for i in range(parts):
            group: list[Task] = []
            for g in self.devices:
                after = (there[i], *needed_G[g]) if i == 0 else (there[i],)
                if self.setting.fetcher:
                    tokens_X = tokens_by_slot(chunk.routed, s, layer, g)
                    group += self.setting.fetcher.experts(tasks, label, g, i, compute[g], after, needed_G[g], tokens_X)
                else:
                    group.append(Task("experts", "compute", compute[g], after, g, label, batch + i))
                    tasks.append(group[-1])
            computed.append(group)
        # no part returns before all have left: the stage order that pipeline_span assumes
        back, _ = self._cross(tasks, chunk, times, s, layer, label, [[*group, *last_there] for group in computed], batch, back=True)
        ends: Sequence[Sequence[Task]] = [(back[-1],) for _ in self.devices]
        return self._each(tasks, "decode", encode, ends, label, batch) if any(encode) else ends

    def _cross(
        self,
        tasks: list[Task],
        chunk: Chunk,
        times: Pass,
        s: int,
        layer: int,
        label: tuple[int, int],
        after: Sequence[Sequence[Task]],
        batch: int,
        *,
        back: bool,
    ) -> tuple[list[Task], Sequence[Task]]:
        """One exchange in parts: its last task of every part, and the last task of each of its streams."""
        setting, parts = self.setting, len(after)
        crossing = times.back if back else times.there
        kind, sm_share = "combine" if back else "dispatch", setting.system.exchange.sm_share
        link_K, nic_K = (load_LK[layer] for load_LK in self._loads(chunk, times, s, back=back)) if setting.contention else (None, None)
        if setting.system.schedule.tiers_apart:
            stages = [("inter", float(crossing.nic_SL[s, layer]), nic_K), ("intra", float(crossing.link_SL[s, layer]), link_K)]
        else:
            both = None if link_K is None or nic_K is None else link_K + nic_K
            stages = [("exchange", float(crossing.whole_SL[s, layer]), both)]
        self.exchanges += parts * (crossing.whole_SL[s, layer] > 0)
        last: list[Task] = []
        for stream, work_s, load_K in reversed(stages) if back else stages:
            share = sm_share if work_s > 0 else 0.0
            made = [Task(kind, stream, work_s, after[i], label=label, chunk=batch + i, load_K=load_K, sm_share=share) for i in range(parts)]
            tasks += made
            last.append(made[-1])
            after = [(task,) for task in made]
        return made, last

    def _loads(self, chunk: Chunk, times: Pass, s: int, *, back: bool) -> tuple[Floats, Floats]:
        """link_LK and nic_LK of one part of an exchange in every layer of a step; made for all layers at once, since that is quicker."""
        key = (times is chunk.forward, back)
        if key not in self._step_loads:
            returning = back if times is chunk.forward else not back  # the backward pass goes the combine's way first
            loads = np.zeros((2, len(times.transport_SL[s]), len(self.gathers_K)))
            for index, cost in enumerate(self.setting.variants):
                at_L = times.transport_SL[s] == index
                if at_L.any():
                    copies = chunk.routed.copies(cost, back=returning)
                    size_B = (cost.combine_B if returning else cost.dispatch_B) * self.setting.system.exchange.bytes_scale
                    slices = chunk.routed.slices
                    found = self.setting.links.exchange(
                        copies.pairs_SLGG[s, at_L], copies.nodes_SLGN[s, at_L], cost.algorithm, back=back, slices=slices
                    )
                    loads[:, at_L] = np.stack(found) * size_B
            link_LK, nic_LK = loads / times.degree_SL[s][:, None]
            self._step_loads[key] = link_LK, nic_LK
        return self._step_loads[key]

    def _fetch(self, tasks: list[Task], label: tuple[int, int], ring: Ring) -> None:
        """Copy of the experts of the layer that takes over this layer's slot of the ring."""
        layers = len(self.setting.dense.parameters_L)
        if ring.layers < layers:
            done = [tuple(task for task in tasks if task.kind == "experts" and task.device == g)[-len(self._ready) :] for g in self.devices]
            made = [Task("fetch", "h2d", self.setting.fetch_s_G[g], done[g], device=g, label=label) for g in self.devices]
            tasks += made
            self._ring[self._counted + ring.layers] = made
        self._counted += 1

    def _close(self, tasks: list[Task], label: tuple[int, int], before: Sequence[Task], ends: Sequence[Sequence[Task]], *, last: bool) -> Block:
        self._ready = [list(ends)]
        return Block(label=label, tasks=tasks, span=(before, self._all(ends)), last=last)

    def _each(
        self,
        tasks: list[Task],
        kind: str,
        work_s: Sequence[float],
        after: Sequence[Sequence[Task]],
        label: tuple[int, int],
        batch: int = 0,
        *,
        going_on: bool = False,
    ) -> list[tuple[Task]]:
        """One compute task per device. A batch that is `going_on` to its dispatch lets no other begin in between."""
        priority = -1 if going_on and len(self._ready) > 1 else 0
        made = [Task(kind, "compute", work_s[g], after[g], g, label, batch, priority) for g in self.devices]
        tasks += made
        return [(task,) for task in made]

    @staticmethod
    def _all(per_device: Sequence[Sequence[Task]]) -> Sequence[Task]:
        """Every task some device waits for, once."""
        return list(dict.fromkeys(task for waits in per_device for task in waits))
