"""Copies of experts as tasks: on demand, ahead of need, one by one through buffers, and experts computed by the host.

One copy engine for each direction and tier, first in, first out; what a layer waits for goes before what later layers will,
which gives way after the expert it is copying. Copies of a layer to a device are one task, experts are tasks of their own only
one by one. An SSD's read is a task before the copy, on an engine its node shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.cost import CostModel
from moesim.cost.offload import is_main
from moesim.sim.residency import Stay, one_expert_s
from moesim.sim.tasks import Task

Floats = NDArray[np.float64]
Label = tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyUse:
    """What a run copied, all devices together.

    asked, hits      experts that layers asked of devices, and those in place; missing ones are demanded, ahead or on the host
    demanded, ahead, on_host   experts copied while their layer waited, copied ahead (those in vain, too), computed by the host
    known, timely    missing experts that were copied ahead, and those whose copy had come when their layer asked
    demand_B, ahead_B, wrong_B, stored_B   bytes of those copies; wrong: copied in vain, stored: read from SSDs
    """

    asked: int
    hits: int
    demanded: int
    ahead: int
    on_host: int
    known: int
    timely: float
    demand_B: float
    ahead_B: float
    wrong_B: float
    stored_B: float

    @property
    def hit_ratio(self) -> float:
        """Share of the experts asked for that were in place without a copy ahead."""
        return self.hits / self.asked if self.asked else 0.0

    @property
    def recall(self) -> float:
        """Share of the missing experts that were copied ahead."""
        missing = self.asked - self.hits
        return self.known / missing if missing else 0.0

    @property
    def timely_recall(self) -> float:
        """The same, of copies that had come when their layer asked."""
        missing = self.asked - self.hits
        return self.timely / missing if missing else 0.0

    def to_dict(self) -> dict[str, float]:
        """JSON-ready form."""
        return {name: getattr(self, name) for name in self.__slots__} | {
            "hit_ratio": self.hit_ratio,
            "recall": self.recall,
            "timely_recall": self.timely_recall,
        }


class Piece(NamedTuple):
    """What is loaded and computed in turn: bytes to load (0: in place), whether from the SSD, seconds to compute, and what it is."""

    load_B: float
    stored: bool
    compute_s: float
    about: str


class Fetcher:
    """Makes the copy tasks of a run, layer by layer in order. `timely` counts experts copied ahead that had come in time."""

    def __init__(self, stay: Stay, cost: CostModel) -> None:
        self.stay = stay
        self.timely = 0.0
        self._cost = cost
        self._residency = stay.residency
        self._layers = stay.copies.asked_SLG.shape[1]
        self._devices = range(len(stay.ways_G))
        self._ahead: dict[Label, dict[int, Task]] = {}
        self._judged: list[tuple[Task, Task, float]] = []  # copy ahead, what asked, its experts
        self._loaded_B = self._stored_B = 0.0  # one by one, in the planes that were wanted
        self._on_chip = [stay.residency.way is None and is_main(d, stay.residency.tier) for d in cost.cluster.devices]

    def asked(self, tasks: list[Task], label: Label, gates_G: Sequence[Sequence[Task]]) -> list[tuple[Task, ...]]:
        """Copies that follow the gate of a layer: what it misses, and what a later layer will. Returns what its experts wait for."""
        copies, (step, layer) = self.stay.copies, label
        come = self._ahead.pop(label, {})
        gates = [tuple(gates) for gates in gates_G]
        for g, copy in come.items():
            self._judged.append((copy, gates[g][-1], float(copies.known_SLG[step, layer, g])))
        known = [(*gates[g], come[g]) if g in come else gates[g] for g in self._devices]
        synced = list(known)
        for g in self._devices:
            if self.stay.ways_G[g].sync_s:
                sync = Task("sync", "compute", self.stay.ways_G[g].sync_s, known[g], device=g, label=label)
                tasks.append(sync)
                synced[g] = (sync,)
        asks = [synced[g] if self.stay.ways_G[g].sync_s else gates[g] for g in self._devices]
        needed = []
        for g in self._devices:
            waits = list(synced[g])
            count = float(copies.demand_SLG[step, layer, g])
            if count and self._residency.order == "grouped":
                size_B, stored_B = float(copies.demand_B_SLG[step, layer, g]), float(copies.demand_stored_B_SLG[step, layer, g])
                about = f"fetch {count:.0f} experts of layer {layer}"
                waits.append(self._copy(tasks, "fetch", label, g, float(self.stay.ways_G[g].demand_s(size_B)), stored_B, asks[g], about=about))
            needed.append(tuple(waits))
        for g, found in enumerate(self.stay.found_G):
            for event in found.foretold_N[step * self._layers + layer]:
                self._fetch_ahead(tasks, divmod(event, self._layers), g, asks[g])
        if len(self._judged) > 4 * len(self._devices) * self._layers:
            self._judge()
        return needed

    def experts(
        self, tasks: list[Task], label: Label, g: int, chunk: int, compute_s: float, after: Sequence[Task], gate: Sequence[Task], tokens_X: Floats
    ) -> list[Task]:
        """A device's experts of one part of a layer; returns the tasks its combine waits for."""
        if self._residency.order == "one-by-one":
            return self._one_by_one(tasks, label, g, after, gate, tokens_X)
        made = [Task("experts", "compute", compute_s, after, device=g, label=label, chunk=chunk)]
        tasks += made
        if self._residency.host is not None and chunk == 0:
            made += self._on_host(tasks, label, g, [task for task in after if task.kind != "fetch"], tokens_X)  # no host waits for copies
        return made

    def experts_s(self, step: int, layer: int, g: int, tokens_X: Floats) -> float:
        """Seconds of a device's experts one by one, without waiting."""
        return sum(piece.compute_s for piece in self._pieces(step, layer, g, tokens_X))

    def use(self) -> CopyUse:
        """Sums of the run; call it when all tasks have ended."""
        self._judge()
        copies, found_G = self.stay.copies, self.stay.found_G
        demand_B, stored_B = float(copies.demand_B_SLG.sum()), float(copies.demand_stored_B_SLG.sum())
        if self._residency.order == "one-by-one":
            demand_B, stored_B = self._loaded_B, self._stored_B
        return CopyUse(
            asked=int(copies.asked_SLG.sum()),
            hits=int(copies.hits_SLG.sum()),
            demanded=int(copies.demand_SLG.sum()),
            ahead=int((copies.known_SLG + copies.vain_SLG).sum()),
            on_host=int(sum(found.host_A.sum() for found in found_G)),
            known=int(copies.known_SLG.sum()),
            timely=self.timely,
            demand_B=demand_B,
            ahead_B=float((copies.known_B_SLG + copies.vain_B_SLG).sum()),
            wrong_B=float(copies.vain_B_SLG.sum()),
            stored_B=stored_B + float((copies.known_stored_B_SLG + copies.vain_stored_B_SLG).sum()),
        )

    def _fetch_ahead(self, tasks: list[Task], label: Label, g: int, after: Sequence[Task]) -> None:
        """What is foretold of a layer to device g: what it will ask for first, since that is likeliest, then what is in vain."""
        copies, (step, layer), bulk = self.stay.copies, label, self._residency.bulk
        known = [float(each[step, layer, g]) for each in (copies.known_SLG, copies.known_B_SLG, copies.known_stored_B_SLG)]
        vain = [float(each[step, layer, g]) for each in (copies.vain_SLG, copies.vain_B_SLG, copies.vain_stored_B_SLG)]
        both = [a + b for a, b in zip(known, vain, strict=True)]
        for part, words in ((both, ""),) if bulk else ((known, ""), (vain, " in vain")):
            count, size_B, stored_B = part
            if count:
                pieces = 1 if bulk else count
                work_s = float(self.stay.ways_G[g].ahead_s(size_B, pieces))
                about = f"prefetch {count:.0f} experts of layer {layer}{words}"
                copy = self._copy(tasks, "prefetch", label, g, work_s, stored_B, after, about=about, pieces=pieces)
                if not words and known[0]:  # nobody waits for what is in vain
                    self._ahead.setdefault(label, {})[g] = copy

    def _copy(
        self,
        tasks: list[Task],
        kind: str,
        label: Label,
        g: int,
        work_s: float,
        stored_B: float,
        after: Sequence[Task],
        *,
        about: str,
        pieces: float = 1.0,
    ) -> Task:
        """A copy to device g, behind the read of what of it is on the SSD."""
        urgent = kind != "prefetch"
        if stored_B:
            read_s = stored_B / self.stay.ways_G[g].storage_Bps
            read = Task(
                "read",
                "nvme",
                read_s,
                after,
                device=self.stay.storage_G[g],
                label=label,
                chunk_s=0.0 if urgent else read_s / pieces,
                priority=0 if urgent else 1,
                about=f"read for device {g}: {about}",
            )
            tasks.append(read)
            after = (read,)
        stream, device = self.stay.streams_G[g]
        chunk_s = work_s / pieces if not urgent and pieces > 1 else 0.0
        copy = Task(kind, stream, work_s, after, device=device, label=label, chunk_s=chunk_s, priority=0 if urgent else 1, about=about)
        tasks.append(copy)
        return copy

    def _judge(self) -> None:
        """Count experts whose copy had come when their layer asked; a copy of several counts those that had passed."""
        left = []
        for copy, gate, count in self._judged:
            if copy.end < 0 or gate.end < 0:
                left.append((copy, gate, count))
            elif copy.end <= gate.end:
                self.timely += count
            elif copy.start < gate.end:
                self.timely += float(np.floor((gate.end - copy.start) / (copy.end - copy.start) * count))
        self._judged = left

    def _pieces(self, step: int, layer: int, g: int, tokens_X: Floats) -> list[Piece]:
        """A layer's experts on a device in order, those in place first."""
        found, residency, device = self.stay.found_G[g], self._residency, self._cost.cluster.devices[g]
        event = step * self._layers + layer
        own = slice(*found.events.starts_N[event : event + 2])
        slot_A, hit_A, stored_A = found.events.experts_A[own], found.hit_A[own], found.stored_A[own]
        expert_A, tokens_A = found.expert_LX[layer, slot_A], found.tokens_X(layer, tokens_X)[slot_A]
        planes = residency.planes
        order = np.lexsort((expert_A, -tokens_A if planes and planes.hottest_first else 0 * tokens_A, ~hit_A))
        if planes is None:
            spent_A = one_expert_s(self._cost, device.name, tokens_A, on_chip=self._on_chip[g])
            size_A = np.where(hit_A, 0.0, found.size_B_A[own])
            return [Piece(float(size_A[i]), bool(stored_A[i]), float(spent_A[i]), f"expert {expert_A[i]}") for i in order.tolist()]
        wanted_A = planes.wanted(tokens_A)
        unpack_s = planes.unpack_B * self._cost.model.expert_parameters / self._cost.peaks[device.name].memory_Bps
        spent_A = one_expert_s(self._cost, device.name, tokens_A / wanted_A, on_chip=self._on_chip[g]) + unpack_s
        bits = planes.bits if planes.nested else tuple(np.cumsum(planes.bits).tolist())
        plane_B = [self._cost.model.expert_parameters * b / 8 for b in bits]
        pieces: list[Piece] = []
        for i in order.tolist():
            wanted, spent_s, stored, name = int(wanted_A[i]), float(spent_A[i]), bool(stored_A[i]), f"expert {expert_A[i]}"
            sizes_B = [0.0] * wanted if hit_A[i] else plane_B[:wanted]
            if planes.progressive:
                pieces += [Piece(size_B, stored, spent_s, f"plane {plane} of {name}") for plane, size_B in enumerate(sizes_B)]
            else:
                pieces.append(Piece(sum(sizes_B), stored, spent_s * wanted, f"{wanted} planes of {name}"))
        return pieces

    def _one_by_one(self, tasks: list[Task], label: Label, g: int, after: Sequence[Task], gate: Sequence[Task], tokens_X: Floats) -> list[Task]:
        step, layer = label
        way, buffers = self.stay.ways_G[g], self._residency.buffers
        computed: list[Task] = []
        loading: Sequence[Task] = gate
        for load_B, stored, compute_s, name in self._pieces(step, layer, g, tokens_X):
            waits = list(after)
            if load_B:
                free = computed[-buffers] if buffers is not None and len(computed) >= buffers else None
                asks = (*loading, free) if free is not None else loading
                stored_B = load_B if stored else 0.0
                load = self._copy(tasks, "fetch", label, g, float(way.demand_s(load_B)), stored_B, asks, about=f"load {name} of layer {layer}")
                loading = load.after if stored else (load,)  # the next is read while this one is copied
                waits.append(load)
                self._loaded_B += load_B
                self._stored_B += stored_B
            made = Task("experts", "compute", compute_s, waits, device=g, label=label, chunk=len(computed), about=f"{name} of layer {layer}")
            tasks.append(made)
            computed.append(made)
        if not computed:
            computed.append(Task("experts", "compute", 0.0, after, device=g, label=label))
            tasks += computed
        return computed

    def _on_host(self, tasks: list[Task], label: Label, g: int, after: Sequence[Task], tokens_X: Floats) -> list[Task]:
        """Activations to the host, its experts one after the other, results back: each on its own engine."""
        step, layer = label
        found, host, model = self.stay.found_G[g], self._residency.host, self._cost.model
        event = step * self._layers + layer
        own = slice(*found.events.starts_N[event : event + 2])
        tokens_A = found.tokens_X(layer, tokens_X)[found.events.experts_A[own]][found.host_A[own]]
        if host is None or not tokens_A.size:
            return []
        spent_s = float(host.expert_s(tokens_A, parameters=model.expert_parameters, expert_B=model.expert_B).sum())
        moved_s = float(tokens_A.sum()) * model.hidden * model.activation_bits / 8 / self.stay.ways_G[g].alone_Bps
        about = f"{len(tokens_A)} experts of layer {layer} on the host"
        there = Task("send", "d2h", moved_s, after, device=g, label=label, about=f"activations for {about}")
        there_ends = Task("host experts", "host", spent_s, (there,), device=g, label=label, about=about)
        back = Task("return", "h2d", moved_s, (there_ends,), device=g, label=label, about=f"results of {about}")
        tasks += [there, there_ends, back]
        return [back]


__all__ = ["CopyUse", "Fetcher"]
