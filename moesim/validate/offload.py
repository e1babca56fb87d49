"""Cache plans executed: experts in (pinned) host memory, a pool of slots on the device, copies beside the computation.

What is copied when is decided by `moesim.replay`; this room obeys, keeps its own map of what sits in which slot, and judges
hits by that map. N events (one layer of one step), A accesses, L layers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesim.cost.copies import CopyPath
from moesim.errors import ValidationError
from moesim.replay import EVICT, PREFETCH, STREAM, Events, replay
from moesim.trace import NO_EXPERT
from moesim.validate.backends import Backend
from moesim.validate.layer import slots_layer
from moesim.validate.machine import check_device, on_device
from moesim.validate.streams import Side, Ticket
from moesim.validate.timing import Progress
from moesim.validate.weights import ExpertWeights


class LayerCache:
    """Slots of one layer on the device, filled from host memory: `slots` that keep experts, and `spare` ones for an event's own use."""

    def __init__(self, host: ExpertWeights, slots: int, spare: int, device: str) -> None:
        self.host, self.slots = host, slots
        self.pool = host.like(slots + spare, device=device)
        self.slot_of: dict[int, int] = {}
        self.free = list(range(slots + spare))[::-1]
        self.coming: dict[int, Ticket] = {}  # prefetched, not waited for yet

    def evict(self, expert: int) -> int:
        """Forget an expert; its slot, which is not free before whoever reads it has."""
        if expert not in self.slot_of:
            raise ValidationError(f"the plan evicts expert {expert}, which is not on the device; replay and execution disagree")
        self.coming.pop(expert, None)
        return self.slot_of.pop(expert)

    def copy(self, expert: int, side: Side) -> tuple[int, Ticket]:
        """Begin to copy an expert into a slot that nobody reads."""
        if not self.free or expert in self.slot_of:
            raise ValidationError(f"the plan loads expert {expert} {'twice' if expert in self.slot_of else 'into a full cache'}")
        slot = self.free.pop()
        return slot, side.submit(partial(self.pool.put, slot, self.host, expert, non_blocking=True))

    def load(self, expert: int, side: Side) -> Ticket:
        """Begin to copy an expert that stays."""
        slot, ticket = self.copy(expert, side)
        self.slot_of[expert] = slot
        return ticket


def execute_cache(
    ids_TLK: NDArray[np.uint16],
    gates_TLK: NDArray[np.floating],
    weights: Sequence[ExpertWeights],
    *,
    policy: str,
    slots: int | NDArray[np.integer],
    tokens_per_step: int = 1,
    prefetcher: Any = None,
    pinned_LE: NDArray[np.bool_] | None = None,
    device: str = "cpu",
    backend: Backend = "loop",
    path: CopyPath | None = None,
    seed: int = 0,
    progress: Progress = lambda share, what: None,
) -> dict[str, Any]:
    """Serve a trace with `slots` experts of each layer on the device, and compare with the replay.

    `weights` of every layer row lie in host memory (copied to pinned memory where there is pinning). Prefetches of an event are
    handed in before the event before it computes. Hits must equal the replay's one by one, bytes moved too, and outputs those
    of the resident layer bit for bit in the loop back-end (to rounding in the others); ValidationError otherwise. Returns,
    JSON-ready: hits, bytes, stall of every event that had to wait (P50, P90, total, wall clock) and the stall predicted from
    `path` with copies first in, first out.
    """
    check_device(device)
    experts = len(weights[0].up)
    events = Events.from_experts(ids_TLK, experts=experts, tokens_per_step=tokens_per_step)
    expected = replay(events, policy, slots, resident=pinned_LE, prefetcher=prefetcher, seed=seed, log=True)
    steps = _Moves(expected.moves, len(events))
    slots_L = np.broadcast_to(np.asarray(slots, np.int64), events.layers)
    spare_L = [max((steps.spare(n) for n in np.flatnonzero(events.layer_N == layer).tolist()), default=0) for layer in range(events.layers)]
    with torch.inference_mode(), on_device(device, "cache execution"), Side(device) as side:
        hosts = [_pinned(each) if device.startswith("cuda") else each for each in weights]
        caches = [LayerCache(host, int(slots_L[layer]), spare_L[layer], device) for layer, host in enumerate(hosts)]
        start = expected_pins(expected, pinned_LE, events)
        for layer, cache in enumerate(caches):
            for expert in np.flatnonzero(start[layer]).tolist():
                side.wait(cache.load(expert, side))
        run = _Run(events, steps, caches, weights, ids_TLK, gates_TLK, tokens_per_step, device, backend, side)
        for n in range(len(events)):
            run.event(n)
            if n % 64 == 0:
                progress(n / len(events), "cache plan")
    wrong = np.flatnonzero(run.hit_A != expected.hit_A)
    if len(wrong):
        access = int(wrong[0])
        raise ValidationError(
            f"access {access} (layer row {events.layer_A[access]}, expert {events.experts_A[access]}) was a {'hit' if run.hit_A[access] else 'miss'} "
            f"on the device and a {'hit' if expected.hit_A[access] else 'miss'} in the replay; {len(wrong)} of {events.accesses} differ"
        )
    moved = (expected.insertions + expected.streamed) * weights[0].expert_B
    if run.moved_B != moved:
        raise ValidationError(f"{run.moved_B} bytes were copied, the replay says {moved}")
    if run.worst > (0 if backend == "loop" else 1e-3):
        raise ValidationError(f"outputs differ from the resident layer's by {run.worst:.1e}; a slot held the wrong expert or was read too early")
    stall_N = np.array([sum(ticket.stall_s for ticket in tickets) for tickets in run.tickets])
    copy_s = [ticket.seconds for ticket in run.copies]
    predicted_N = None if path is None else fifo_stalls(run.demand_N, run.ahead_N, np.array(run.compute_s), path, weights[0].expert_B)
    waited = stall_N[run.demand_N > 0]
    return {
        "policy": policy,
        "prefetcher": expected.prefetcher,
        "slots": slots_L.tolist(),
        "events": len(events),
        "accesses": events.accesses,
        "hits": int(run.hit_A.sum()),
        "hits_equal_simulated": True,
        "bytes": int(moved),
        "deviation": run.worst,
        "copies": len(copy_s),
        "copy_s": float(np.median(copy_s)) if copy_s else None,
        "compute_s": float(np.median(run.compute_s)),
        "stall_s": _spread(waited),
        "predicted_stall_s": None if predicted_N is None else _spread(predicted_N[run.demand_N > 0]),
        "host": "pinned memory" if device.startswith("cuda") else "a second pool in the same memory",
        "notes": list(expected.notes),
    }


def fifo_stalls(
    demand_N: NDArray[np.integer], ahead_N: NDArray[np.integer], compute_s_N: NDArray[np.float64], path: CopyPath, expert_B: float
) -> NDArray[np.float64]:
    """Seconds each event waits: copies queue on one engine, an event's own demands before the prefetches of the next.

    demand_N and ahead_N are copies handed in at each event: what it misses, and what is fetched for the next one.
    An event starts when all copies for it have ended: max(0, end - now), then computes.
    """
    each = float(path.time_s(expert_B))
    now = engine = promised = 0.0  # promised: when the prefetches for the coming event end
    stalls = np.zeros(len(demand_N))
    for n, (demand, ahead) in enumerate(zip(demand_N, ahead_N, strict=True)):
        need = promised
        if demand:
            engine = max(engine, now) + demand * each
            need = max(need, engine)
        stalls[n] = max(0.0, need - now)
        promised = 0.0
        if ahead:
            engine = max(engine, now) + ahead * each
            promised = engine
        now += stalls[n] + compute_s_N[n]
    return stalls


def expected_pins(expected: Any, pinned_LE: NDArray[np.bool_] | None, events: Events) -> NDArray[np.bool_]:
    """Experts that are on the device before the first event: hit at their first access without ever being loaded."""
    start = np.zeros((events.layers, events.experts), bool) if pinned_LE is None else np.asarray(pinned_LE, bool).copy()
    moves = expected.moves
    loaded = set(zip(events.layer_N[moves.event_M].tolist(), moves.expert_M.tolist(), strict=True))
    for layer, expert in zip(events.layer_A[expected.hit_A].tolist(), events.experts_A[expected.hit_A].tolist(), strict=True):
        if (layer, expert) not in loaded:
            start[layer, expert] = True
    return start


class _Moves:
    """Moves of each event by action, in order."""

    def __init__(self, moves: Any, events: int) -> None:
        self.rows: list[list[tuple[int, int]]] = [[] for _ in range(events)]  # (expert, action)
        for event, expert, action in zip(moves.event_M.tolist(), moves.expert_M.tolist(), moves.action_M.tolist(), strict=True):
            self.rows[event].append((expert, action))

    def spare(self, event: int) -> int:
        """Slots beside the kept ones that an event may need: for experts used and not kept, and for those given up while in use."""
        return sum(action in (EVICT, STREAM) for _, action in self.split(event)[1])

    def split(self, event: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """(up to the last prefetch, the rest): the first part can be done ahead of the event."""
        last = max((i for i, (_, action) in enumerate(self.rows[event]) if action == PREFETCH), default=-1)
        return self.rows[event][: last + 1], self.rows[event][last + 1 :]


class _Run:
    """The execution: event after event."""

    def __init__(
        self, events: Events, steps: _Moves, caches: list[LayerCache], weights: Sequence[ExpertWeights], ids_TLK: NDArray[np.uint16],
        gates_TLK: NDArray[np.floating], tokens_per_step: int, device: str, backend: Backend, side: Side,
    ) -> None:  # fmt: skip
        self.events, self.steps, self.caches, self.side, self.backend, self.device = events, steps, caches, side, backend, device
        self.ids, self.gates, self.size = ids_TLK, torch.as_tensor(np.asarray(gates_TLK, np.float32), device=device), tokens_per_step
        source = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(tokens_per_step, weights[0].up.shape[2], generator=source).to(device, weights[0].up.dtype)
        self.whole = [each if device == "cpu" else None for each in weights]
        self.hit_A = np.zeros(events.accesses, bool)
        self.demand_N, self.ahead_N = np.zeros((2, len(events)), np.int64)
        self.tickets: list[list[Ticket]] = []
        self.copies: list[Ticket] = []
        self.compute_s: list[float] = []
        self.moved_B, self.worst = 0, 0.0
        self.done_ahead = -1  # the last event whose prefetches were handed in

    def event(self, n: int) -> None:
        """Look up, load what is missing, hand in the next event's prefetches, compute, compare."""
        layer = int(self.events.layer_N[n])
        cache = self.caches[layer]
        if self.done_ahead < n:
            self._prefetch(n)
        lo, hi = int(self.events.starts_N[n]), int(self.events.starts_N[n + 1])
        needed = self.events.experts_A[lo:hi].tolist()
        self.hit_A[lo:hi] = [expert in cache.slot_of for expert in needed]
        _, rest = self.steps.split(n)
        waits = [cache.coming.pop(expert) for expert in needed if expert in cache.coming]
        slots = {expert: cache.slot_of[expert] for expert in needed if expert in cache.slot_of}
        after: list[int] = []  # slots that are free once this event has computed
        for expert, action in rest:
            if action == EVICT:
                slot = cache.evict(expert)
                (after if expert in slots else cache.free).append(slot)
                continue
            slots[expert], ticket = cache.copy(expert, self.side)
            if action == STREAM:
                after.append(slots[expert])
            else:
                cache.slot_of[expert] = slots[expert]
            self.demand_N[n] += 1
            waits.append(ticket)
            self._book(ticket, cache)
        if n + 1 < len(self.events) and int(self.events.layer_N[n + 1]) != layer:
            self._prefetch(n + 1, at=n)
        for ticket in waits:
            self.side.wait(ticket)
        self.tickets.append(waits)
        self._compute(n, layer, cache, slots)
        cache.free.extend(after)
        if len(cache.slot_of) > cache.slots:
            raise ValidationError(f"event {n}: {len(cache.slot_of)} experts are kept in {cache.slots} slots; the plan holds more than it may")

    def _prefetch(self, n: int, at: int | None = None) -> None:
        """Hand in what is fetched for event n, before event `at` computes (default: before n itself)."""
        cache = self.caches[int(self.events.layer_N[n])]
        ahead, _ = self.steps.split(n)
        for expert, action in ahead:
            if action == EVICT:
                cache.free.append(cache.evict(expert))
            else:
                cache.coming[expert] = cache.load(expert, self.side)
                self._book(cache.coming[expert], cache)
                self.ahead_N[n if at is None else at] += 1
        self.done_ahead = n

    def _book(self, ticket: Ticket, cache: LayerCache) -> None:
        self.copies.append(ticket)
        self.moved_B += cache.host.expert_B

    def _compute(self, n: int, layer: int, cache: LayerCache, slots: Mapping[int, int]) -> None:
        first = int(self.events.step_N[n]) * self.size
        ids = self.ids[first : first + self.size, layer]
        table = np.full(NO_EXPERT + 1, -1, np.int64)
        table[list(slots)] = list(slots.values())
        gates, hidden = self.gates[first : first + len(ids), layer], self.hidden[: len(ids)]
        begin = time.perf_counter()
        out = slots_layer(hidden, torch.as_tensor(table[ids], device=self.device), gates, cache.pool, backend=self.backend)
        if self.device != "cpu":
            torch.cuda.current_stream().synchronize()
        self.compute_s.append(time.perf_counter() - begin)
        self.worst = max(self.worst, _apart(out, self._resident(layer, cache, ids, hidden, gates)))

    def _resident(self, layer: int, cache: LayerCache, ids: NDArray[np.uint16], hidden: Tensor, gates: Tensor) -> Tensor:
        """What the layer with all its experts on the device says."""
        held = self.whole[layer]
        if held is None:
            held = self.whole[layer] = cache.host.like(len(cache.host.up), device=self.device)
            for expert in range(len(held.up)):
                held.put(expert, cache.host, expert)
        chosen = np.where(ids == NO_EXPERT, -1, ids.astype(np.int64))
        return slots_layer(hidden, torch.as_tensor(chosen, device=self.device), gates, held, backend=self.backend)


def _apart(out: Tensor, whole: Tensor) -> float:
    if not bool(torch.isfinite(out).all()):
        raise ValidationError("outputs under the cache plan are NaN or infinite; check weights and dtype")
    return float((out.double() - whole.double()).abs().max() / whole.double().abs().max().clamp_min(1e-20))


def _pinned(weights: ExpertWeights) -> ExpertWeights:
    """The same weights in pinned host memory."""
    found = weights.like(len(weights.up), pinned=True)
    for expert in range(len(weights.up)):
        found.put(expert, weights, expert)
    return found


def _spread(seconds: NDArray[np.float64]) -> dict[str, float]:
    if not len(seconds):
        return {"events": 0, "p50": 0.0, "p90": 0.0, "total": 0.0}
    return {
        "events": len(seconds),
        "p50": float(np.median(seconds)),
        "p90": float(np.quantile(seconds, 0.9)),
        "total": float(seconds.sum()),
    }
