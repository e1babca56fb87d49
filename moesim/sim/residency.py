"""What every device's cache of experts is asked in a run, what it finds, and the copies that follow: before the run, in whole.

A cache's next state needs its last one, and some policies the future, so one pass over the routing collects events and a
replay decides them; the engine then runs the copies. Memory: a byte per step, layer and slot of all devices while that goes on,
then a few numbers per access. Suffixes: S steps, L MoE layers, P slots, E experts, G devices, N events (step-major, layers
inside), A accesses, X slots of one device: its cache knows an expert as the first of the device's slots that hold it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moesim.cost import CostModel
from moesim.cost.experts import expert_time_s
from moesim.cost.fitted import main_memory
from moesim.cost.offload import Fetching, fetching, is_main, on_chip_B, own_memory, shared_with_host
from moesim.errors import InputError
from moesim.plan import Placement
from moesim.replay import EVICT, PREFETCH, STREAM, Events, Replay, load_policy, replay
from moesim.systems.residency import Residency
from moesim.systems.routing import Routed
from moesim.units import human

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Whole = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """One device's cache over a run. N events of S steps x L layers.

    hit_A     in place when the event begins
    ahead_A   missing, but copied before it was asked for
    host_A    missing, and computed by the host
    wrong_N   experts copied ahead for an event that does not ask for them, and their bytes: all, those on the SSD
    lead_N    events by which those copies are asked for before their event
    size_B_A  bytes of the expert of each access; stored_A, that it is on the SSD
    expert_LX the expert in each of the device's slots; first_LX the first slot that holds it
    """

    events: Events
    hit_A: Bools
    ahead_A: Bools
    host_A: Bools
    wrong_N: Whole
    wrong_B_N: Floats
    wrong_stored_B_N: Floats
    lead_N: Whole
    size_B_A: Floats
    stored_A: Bools
    expert_LX: NDArray[np.int32]
    first_LX: Whole

    def tokens_X(self, layer: int, tokens_X: Floats) -> Floats:
        """Tokens of a layer by slot, all of an expert's in its first."""
        return np.bincount(self.first_LX[layer], tokens_X, minlength=len(tokens_X)).astype(np.float64)

    @cached_property
    def foretold_N(self) -> list[list[int]]:
        """Events whose copies ahead are asked for at each event, in order."""
        asked: list[list[int]] = [[] for _ in self.lead_N]
        for event, lead in enumerate(self.lead_N.tolist()):
            if lead:
                asked[max(0, event - lead)].append(event)
        return asked

    @cached_property
    def event_A(self) -> Whole:
        """Event of every access."""
        return np.repeat(np.arange(len(self.events)), np.diff(self.events.starts_N))

    def sums(self, of_A: Bools, weight_A: Floats | None = None) -> Floats:
        """How many accesses of each event are marked, or their weights: [N]."""
        events = self.event_A[of_A]
        return np.bincount(events, None if weight_A is None else weight_A[of_A], minlength=len(self.events)).astype(np.float64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Copies:
    """Experts and bytes that each step s copies for layer l to device g.

    demand: while the layer waits; known: ahead of a layer that asks for them; vain: ahead of one that does not. Stored bytes
    are read from the SSD first.
    """

    asked_SLG: Floats
    hits_SLG: Floats
    demand_SLG: Floats
    demand_B_SLG: Floats
    demand_stored_B_SLG: Floats
    known_SLG: Floats
    known_B_SLG: Floats
    known_stored_B_SLG: Floats
    vain_SLG: Floats
    vain_B_SLG: Floats
    vain_stored_B_SLG: Floats


@dataclass(frozen=True, kw_only=True, eq=False)
class Stay:
    """Residency of a run: what was found, the copies, and how they run."""

    residency: Residency
    ways_G: tuple[Fetching, ...]
    streams_G: tuple[tuple[str, int], ...]  # copy engine of each device; SSDs are shared by a node
    storage_G: tuple[int, ...]  # device that stands for the node's SSD
    found_G: tuple[Found, ...]
    copies: Copies
    notes: tuple[str, ...]

    def held(self, routed: Routed, first: int) -> Routed:
        """The routing without the tokens of experts that the host computes, from step `first` on."""
        if self.residency.host is None:
            return routed
        tokens_SLP = routed.traffic.slot_tokens_SLP.copy()
        steps, layers, _ = tokens_SLP.shape
        ends = np.cumsum(routed.placement.slots_G)
        for g, found in enumerate(self.found_G):
            gone_NX = np.zeros((steps * layers, found.events.experts), bool)
            lo, hi = found.events.starts_N[[first * layers, (first + steps) * layers]]
            mine = found.host_A[lo:hi]
            gone_NX[found.event_A[lo:hi][mine] - first * layers, found.events.experts_A[lo:hi][mine]] = True
            at = np.broadcast_to(found.first_LX, (steps, *found.first_LX.shape))
            gone_SLX = np.take_along_axis(gone_NX.reshape(steps, layers, -1), at, axis=2)
            tokens_SLP[:, :, ends[g] - gone_SLX.shape[2] : ends[g]][gone_SLX] = 0.0
        return replace(routed, traffic=replace(routed.traffic, slot_tokens_SLP=tokens_SLP))


def settle(residency: Residency, cost: CostModel, routed: Iterable[Routed]) -> Stay:
    """Replay what a run asks of every device's cache.

    Raises InputError or ProfileError for slots of another placement, an expert that fits no memory, and
    devices without a memory or host to copy from.
    """
    cluster, model = cost.cluster, cost.model
    asked: list[NDArray[np.uint8]] = []
    tokens: list[NDArray[np.float32]] = []
    placement: Placement | None = None
    for part in routed:
        if placement is None:
            placement = part.placement
        asked.append(np.packbits(part.traffic.slot_tokens_SLP > 0, axis=2))
        if residency.host:
            tokens.append(part.traffic.slot_tokens_SLP.astype(np.float32))
    assert placement is not None
    layers, slots = placement.slots_LP.shape
    used_SLP = np.unpackbits(np.concatenate(asked), axis=2, count=slots).astype(bool)
    held_LG = placement.holds_LGE.sum(axis=2)
    slots_LG = residency.slots(held_LG)
    size_B_LE = _sizes(residency, model.expert_parameters, model.weight_bits, (layers, placement.experts))
    notes: list[str] = []
    ways, streams, storage, found = [], [], [], []
    ends = np.cumsum(placement.slots_G)
    for g, device in enumerate(cluster.devices):
        way = residency.way or fetching(cluster, g, residency.tier)
        if residency.stored_LE is not None and residency.tier != "nvme" and residency.way is None:
            way = replace(way, storage_Bps=fetching(cluster, g, "nvme").storage_Bps)
        _check_fits(residency, cost, g, slots_LG[:, g], size_B_LE)
        notes += way.notes
        own = own_memory(device, residency.tier) is not None and residency.way is None
        ways.append(way)
        streams.append(("memory" if own else "h2d", g))
        storage.append(int(np.argmax(cluster.node_G == cluster.node_G[g])))
        mine = slice(ends[g] - placement.slots_G[g], ends[g])
        tokens_SLX = np.concatenate(tokens)[:, :, mine] if tokens else None
        one, remarks = _found(residency, cost, g, used_SLP[:, :, mine], tokens_SLX, slots_LG[:, g], placement.slots_LP[:, mine], size_B_LE, way)
        found.append(one)
        notes += remarks
    if (slots_LG >= held_LG).all():
        notes.append("every expert has a slot: nothing is copied after its first touch")
    if residency.bits is not None or residency.bits_LE is not None:
        notes.append(f"copies have the bits of the residency; computation is timed at the model's {model.weight_bits:g} bits")
    return Stay(
        residency=residency,
        ways_G=tuple(ways),
        streams_G=tuple(streams),
        storage_G=tuple(storage),
        found_G=tuple(found),
        copies=_copies(found, len(used_SLP), layers),
        notes=tuple(dict.fromkeys(notes)),
    )


def _sizes(residency: Residency, parameters: int, weight_bits: float, shape: tuple[int, int]) -> Floats:
    """Bytes of every expert as it is copied."""
    bits_LE = np.full(shape, residency.bits or weight_bits) if residency.bits_LE is None else np.asarray(residency.bits_LE, np.float64)
    if bits_LE.shape != shape:
        raise InputError(f"bits for {bits_LE.shape} layers and experts, the placement has {shape}; give one per expert")
    return bits_LE * parameters / 8


def _check_fits(residency: Residency, cost: CostModel, g: int, slots_L: Whole, size_B_LE: Floats) -> None:
    """InputError unless an expert, and on the chip all slots and buffers, fit."""
    device, largest_B = cost.cluster.devices[g], float(size_B_LE.max())
    if residency.way is None and is_main(device, residency.tier):
        room_B, what = on_chip_B(device), f"the memory on the chip of device {g} ({device.name})"
        need_B = (int(slots_L.sum()) + (residency.buffers or 1)) * largest_B
        parts = f"{int(slots_L.sum())} slots and {residency.buffers or 1} buffers of {human(largest_B, 'B')}"
    else:
        room_B, what = main_memory(device).capacity_B, f"the {main_memory(device).name} of device {g} ({device.name})"
        need_B, parts = largest_B, f"one expert of {human(largest_B, 'B')}"
    if need_B > room_B:
        raise InputError(f"{parts} do not fit {what}, {human(room_B, 'B')}; give fewer slots or bits, or a device with more memory")


def _found(
    residency: Residency,
    cost: CostModel,
    g: int,
    used_SLX: Bools,
    tokens_SLX: NDArray[np.float32] | None,
    slots_L: Whole,
    expert_LX: NDArray[np.int32],
    size_B_LE: Floats,
    way: Fetching,
) -> tuple[Found, tuple[str, ...]]:
    """What one device's cache finds, and remarks of its policy."""
    steps, layers, slots = used_SLX.shape
    first_LX = np.argmax(expert_LX[:, :, None] == expert_LX[:, None, :], axis=2)
    need_SLX = np.zeros(used_SLX.shape, bool)
    s, l, x = np.nonzero(used_SLX)
    need_SLX[s, l, first_LX[l, x]] = True
    need_NX = need_SLX.reshape(steps * layers, slots)
    event_A, slot_A = np.nonzero(need_NX)
    events = Events(
        experts_A=slot_A.astype(np.int32),
        starts_N=np.concatenate([[0], np.cumsum(need_NX.sum(axis=1))]),
        layer_N=np.tile(np.arange(layers, dtype=np.int32), steps),
        step_N=np.repeat(np.arange(steps, dtype=np.int32), layers),
        layers=layers,
        experts=slots,
    )
    rows = np.arange(layers)[:, None]
    pinned, stored_LX = np.zeros((layers, slots), bool), np.full((layers, slots), residency.tier == "nvme")
    if residency.pinned_LE is not None:
        pinned = np.asarray(residency.pinned_LE, bool)[rows, expert_LX] & (first_LX == np.arange(slots))
    if residency.stored_LE is not None:
        stored_LX |= np.asarray(residency.stored_LE, bool)[rows, expert_LX]
    size_B_LX = size_B_LE[rows, expert_LX]
    run = replay(
        events,
        residency.policy,
        slots_L,
        warm=residency.warm,
        seed=residency.seed,
        resident=pinned,
        prefetcher=residency.prefetch,
        log=residency.prefetch is not None,
    )
    ahead_A, wrong = _copied_ahead(residency, run, event_A, pinned)
    hit_A = run.hit_A & ~ahead_A
    size_B_A, stored_A = size_B_LX[events.layer_A, slot_A], stored_LX[events.layer_A, slot_A]
    wrong_B = size_B_LX[events.layer_N[wrong[0]], wrong[1]]
    host_A = np.zeros(events.accesses, bool)
    if tokens_SLX is not None:
        tokens_SLF = np.zeros(tokens_SLX.shape)
        np.add.at(tokens_SLF, (s, l, first_LX[l, x]), tokens_SLX[s, l, x])
        copy_s_A = np.where(stored_A, way.demand_s(size_B_A, stored=True), way.demand_s(size_B_A))
        host_A = _on_host(residency, cost, g, event_A, tokens_SLF.reshape(-1, slots)[event_A, slot_A], hit_A, copy_s_A, way.alone_Bps)
    found = Found(
        events=events,
        hit_A=hit_A,
        ahead_A=ahead_A,
        host_A=host_A,
        wrong_N=np.bincount(wrong[0], minlength=len(events)),
        wrong_B_N=np.bincount(wrong[0], wrong_B, minlength=len(events)).astype(np.float64),
        wrong_stored_B_N=np.bincount(wrong[0], wrong_B * stored_LX[events.layer_N[wrong[0]], wrong[1]], minlength=len(events)).astype(np.float64),
        lead_N=run.lead_N.astype(np.int64),
        size_B_A=size_B_A,
        stored_A=stored_A,
        expert_LX=expert_LX,
        first_LX=first_LX,
    )
    remarks = (
        *run.notes,
        *_foreseen(residency.policy),
    )
    return found, remarks


def _foreseen(policy: str) -> list[str]:
    """A remark on a policy that no running system can follow, since it needs the future, or that needs a queue of routed requests."""
    found = load_policy(policy)
    if not getattr(found, "foresight", False):
        return []
    window = getattr(found, "window", None)
    if window is None:
        return [f"policy {policy!r} knows the whole run ahead; it bounds what others reach"]
    return [f"policy {policy!r} knows the next {window} steps, which takes a queue of requests routed before they run"]


def _copied_ahead(residency: Residency, run: Replay, event_A: Whole, pinned_LX: Bools) -> tuple[Bools, tuple[Whole, Whole]]:
    """Accesses whose expert was copied for their event, and (events, experts) of copies nobody asked for.

    What is foretold and not in place is copied: into the cache where the replay found room, else into a buffer until its event.
    """
    events = run.events
    if residency.prefetch is None or run.moves is None:
        return np.zeros(events.accesses, bool), (np.zeros(0, np.int64), np.zeros(0, np.int64))
    foretold = residency.prefetch.predict(events, seed=residency.seed)
    event_F, expert_F = np.repeat(np.arange(len(events)), np.diff(foretold.starts_N)), foretold.experts_F.astype(np.int64)
    kept = run.moves.action_M != STREAM
    moved_M = (run.moves.layer_M[kept].astype(np.int64) * events.experts + run.moves.expert_M[kept]) * len(events) + run.moves.event_M[kept]
    order = np.argsort(moved_M, kind="stable")
    id_F = events.layer_N[event_F].astype(np.int64) * events.experts + expert_F
    last_F = np.searchsorted(moved_M[order], id_F * len(events) + event_F) - 1  # the last move of this expert before this event
    in_place_F = pinned_LX.ravel()[id_F]
    if len(order):
        last_M = order[np.maximum(last_F, 0)]
        in_place_F |= (last_F >= 0) & (moved_M[last_M] // len(events) == id_F) & (run.moves.action_M[kept][last_M] != EVICT)
    key_A, key_F = event_A * events.experts + events.experts_A, event_F * events.experts + expert_F
    brought = run.moves.action_M == PREFETCH
    stayed_A = run.hit_A & ~np.isin(key_A, run.moves.event_M[brought] * events.experts + run.moves.expert_M[brought])
    vain = ~in_place_F & ~np.isin(key_F, key_A)
    return np.isin(key_A, key_F[~in_place_F]) & ~stayed_A, (event_F[vain], expert_F[vain])


def _on_host(
    residency: Residency, cost: CostModel, g: int, event_A: Whole, tokens_A: Floats, hit_A: Bools, copy_s_A: Floats, link_Bps: float
) -> Bools:
    """True for missing experts that the host computes: where it is sooner than copy and device, or beside them (`HostCompute.beside`)."""
    host, model = residency.host, cost.model
    assert host is not None
    host_s_A = host.expert_s(
        tokens_A,
        parameters=model.expert_parameters,
        expert_B=model.expert_B,
        moved_B=2 * model.hidden * model.activation_bits / 8,
        link_Bps=link_Bps,
    )
    alone_s_A = one_expert_s(cost, cost.cluster.devices[g].name, tokens_A)
    found_A = ~hit_A & (host_s_A < copy_s_A + alone_s_A)
    if host.beside and not hit_A.all():
        resident_s_N = np.bincount(event_A, alone_s_A * hit_A, minlength=int(event_A.max()) + 1)
        found_A[~hit_A] = shared_with_host(host_s_A[~hit_A], (copy_s_A + alone_s_A)[~hit_A], event_A[~hit_A], resident_s_N)
    return found_A


def one_expert_s(cost: CostModel, device: str, tokens_N: Floats, *, on_chip: bool = False) -> Floats:
    """Seconds of single experts with n tokens on a device; `on_chip`: weights are in its buffers, not read from memory."""
    model = cost.model
    if not tokens_N.size:
        return np.zeros(0)
    found = expert_time_s(
        np.asarray(tokens_N, np.float64)[:, None],
        hidden=model.hidden,
        intermediate=model.intermediate,
        gated=model.gated,
        top_k=1,
        peak=cost.peaks[device],
        kernel=cost.kernels[device],
        warm_cache=on_chip,
    )
    return found.time_s_N


def _copies(found_G: list[Found], steps: int, layers: int) -> Copies:
    def stacked(of: list[Floats]) -> Floats:
        return np.stack([each.reshape(steps, layers) for each in of], axis=2)

    demand_G = [~f.hit_A & ~f.ahead_A & ~f.host_A for f in found_G]
    both = list(zip(found_G, demand_G, strict=True))
    return Copies(
        asked_SLG=stacked([f.sums(np.ones(f.events.accesses, bool)) for f in found_G]),
        hits_SLG=stacked([f.sums(f.hit_A) for f in found_G]),
        demand_SLG=stacked([f.sums(d) for f, d in both]),
        demand_B_SLG=stacked([f.sums(d, f.size_B_A) for f, d in both]),
        demand_stored_B_SLG=stacked([f.sums(d & f.stored_A, f.size_B_A) for f, d in both]),
        known_SLG=stacked([f.sums(f.ahead_A) for f in found_G]),
        known_B_SLG=stacked([f.sums(f.ahead_A, f.size_B_A) for f in found_G]),
        known_stored_B_SLG=stacked([f.sums(f.ahead_A & f.stored_A, f.size_B_A) for f in found_G]),
        vain_SLG=stacked([f.wrong_N.astype(np.float64) for f in found_G]),
        vain_B_SLG=stacked([f.wrong_B_N for f in found_G]),
        vain_stored_B_SLG=stacked([f.wrong_stored_B_N for f in found_G]),
    )


__all__ = ["Copies", "Found", "Stay", "one_expert_s", "settle"]
