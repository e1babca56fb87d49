"""Cache plans executed: experts in (pinned) host memory, a pool of slots on the device, copies beside the computation.

What is copied when is decided by `moesim.replay`, as the event engine decides it; this room obeys, keeps its own map of what
sits in which slot, and judges hits by that map. N events (one layer of one step), A accesses, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesim.cost.offload import Fetching
from moesim.errors import ValidationError
from moesim.replay import EVICT, PREFETCH, STREAM, Events, Prefetcher, Replay, replay
from moesim.trace import NO_EXPERT
from moesim.validate.backends import Backend
from moesim.validate.layer import slots_layer
from moesim.validate.machine import check_device, on_device
from moesim.validate.stalls import UNKNOWN, expected_stalls, settle_one
from moesim.validate.streams import Mark, Side, Ticket
from moesim.validate.timing import Progress, one_thread
from moesim.validate.weights import ROUNDING, ExpertWeights, pinned

KEEP_B = 2**28  # of outputs, before they are held against the resident layer's


class LayerCache:
    """Slots of one layer on the device, filled from host memory: `slots` that keep experts, and `spare` ones for an event's own use."""

    def __init__(self, host: ExpertWeights, slots: int, spare: int, device: str) -> None:
        self.host, self.slots = host, slots
        self.pool = host.like(slots + spare, device=device)
        for part in self.pool.parts:
            part.zero_()  # a copy that is timed is not the first to touch its memory
        self.slot_of: dict[int, int] = {}
        self.buffer: dict[int, int] = {}  # experts copied ahead for one event that find no room to stay
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
        if not self.free or expert in self.slot_of or expert in self.buffer:
            raise ValidationError(f"the plan loads expert {expert} {'into a full cache' if not self.free else 'twice'}")
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
    prefetcher: Prefetcher | None = None,
    pinned_LE: NDArray[np.bool_] | None = None,
    device: str = "cpu",
    backend: Backend = "loop",
    way: Fetching | None = None,
    seed: int = 0,
    progress: Progress = lambda share, what: None,
) -> dict[str, Any]:
    """Serve a trace with `slots` experts of each layer on the device, and compare with the replay and the event engine.

    `weights` of every layer row lie in host memory (copied to pinned memory where there is pinning). Copies ahead are handed
    in before the event before theirs computes; what finds no room in the cache comes into a buffer for its event. Hits must
    equal the replay's one by one, copies on demand and ahead the engine's event by event, and outputs those of the resident
    layer, computed afterwards: bit for bit in the loop back-end, to rounding in the others; ValidationError otherwise.

    Returns, JSON-ready: hits, bytes, and how long events waited from when their copies were asked for (P50, P90, total;
    seconds as in `moesim.validate.streams`), beside what the engine expects when copies run by `way` around
    computation as it was measured.
    """
    check_device(device)
    experts = len(weights[0].up)
    events = Events.from_experts(ids_TLK, experts=experts, tokens_per_step=tokens_per_step)
    expected = replay(events, policy, slots, resident=pinned_LE, prefetcher=prefetcher, seed=seed, log=True)
    plan = _Orders(expected, prefetcher, pinned_LE)
    slots_L = np.broadcast_to(np.asarray(slots, np.int64), events.layers)
    spare_L = [max((plan.spare(n) for n in np.flatnonzero(events.layer_N == layer).tolist()), default=0) for layer in range(events.layers)]
    with torch.inference_mode(), on_device(device, "cache execution"), one_thread(device), Side(device) as side:
        hosts = [pinned(each) if device.startswith("cuda") else each for each in weights]
        caches = [LayerCache(host, int(slots_L[layer]), spare_L[layer], device) for layer, host in enumerate(hosts)]
        for layer, cache in enumerate(caches):
            for expert in np.flatnonzero(plan.start_LE[layer]).tolist():
                side.wait(cache.load(expert, side))
        run = _Run(events, plan, caches, ids_TLK, gates_TLK, tokens_per_step, device, backend, side)
        for n in range(len(events)):
            run.event(n)
            if n % 64 == 0:
                progress(n / len(events), "cache plan")
        run.verify()
        side.finish()
        stall_N, event_N = (np.array([side.seconds(*pair) for pair in pairs]) for pairs in (run.waits, run.spans))
        copy_s = [ticket.seconds for ticket in run.copies]
    busy_N = np.maximum(event_N - stall_N, 0.0)
    _check_hits(run, expected)
    stay, cost = settle_one(
        ids_TLK,
        weights[0],
        way or UNKNOWN,
        policy=policy,
        slots_L=slots_L,
        tokens_per_step=tokens_per_step,
        prefetcher=prefetcher,
        pinned_LE=pinned_LE,
        seed=seed,
    )
    ahead_N = (stay.copies.known_SLG + stay.copies.vain_SLG).reshape(-1)
    for what, mine_N, theirs_N in (("on demand", run.demand_N, stay.copies.demand_SLG.reshape(-1)), ("ahead", run.ahead_N, ahead_N)):
        if (mine_N != theirs_N).any():
            n = int(np.flatnonzero(mine_N != theirs_N)[0])
            raise ValidationError(f"event {n}: {mine_N[n]} experts were copied {what}, the event engine copies {theirs_N[n]:.0f}")
    if run.worst > (0 if backend == "loop" else ROUNDING[run.hidden.dtype]):
        raise ValidationError(f"outputs differ from the resident layer's by {run.worst:.1e}; a slot held the wrong expert or was read too early")
    copied_N = run.demand_N + run.ahead_N > 0
    return {
        "policy": policy,
        "prefetcher": expected.prefetcher,
        "slots": slots_L.tolist(),
        "events": len(events),
        "accesses": events.accesses,
        "hits": int(run.hit_A.sum()),
        "hits_equal_simulated": True,
        "bytes": len(copy_s) * weights[0].expert_B,
        "deviation": run.worst,
        "copies": len(copy_s),
        "copy_s": float(np.median(copy_s)) if copy_s else None,
        "compute_s": float(np.median(busy_N)),
        "stall_s": _spread(stall_N[copied_N]),
        "predicted_stall_s": None if way is None else _spread(expected_stalls(stay, cost, busy_N)[copied_N]),
        "host": "pinned memory" if device.startswith("cuda") else "a second pool in the same memory",
        "notes": list(expected.notes),
    }


def _check_hits(run: _Run, expected: Replay) -> None:
    wrong, events = np.flatnonzero(run.hit_A != expected.hit_A), expected.events
    if len(wrong):
        access = int(wrong[0])
        raise ValidationError(
            f"access {access} (layer row {events.layer_A[access]}, expert {events.experts_A[access]}) was a {'hit' if run.hit_A[access] else 'miss'} "
            f"on the device and a {'hit' if expected.hit_A[access] else 'miss'} in the replay; {len(wrong)} of {events.accesses} differ"
        )


def expected_pins(expected: Replay, pinned_LE: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    """Experts that are on the device before the first event: hit at their first access without ever being loaded."""
    events, moves = expected.events, expected.moves
    assert moves is not None
    start = np.zeros((events.layers, events.experts), bool) if pinned_LE is None else np.asarray(pinned_LE, bool).copy()
    loaded = set(zip(events.layer_N[moves.event_M].tolist(), moves.expert_M.tolist(), strict=True))
    for layer, expert in zip(events.layer_A[expected.hit_A].tolist(), events.experts_A[expected.hit_A].tolist(), strict=True):
        if (layer, expert) not in loaded:
            start[layer, expert] = True
    return start


@dataclass(frozen=True, slots=True)
class _Order:
    """One event's moves, (expert, action) in order: `ahead` up to the last prefetch, `rest`; `buffered` come ahead and find no room."""

    ahead: tuple[tuple[int, int], ...]
    buffered: tuple[int, ...]
    rest: tuple[tuple[int, int], ...]


class _Orders:
    """What a replay tells each event to do, and what lies on the device from the start."""

    def __init__(self, expected: Replay, prefetcher: Prefetcher | None, pinned_LE: NDArray[np.bool_] | None) -> None:
        events, moves = expected.events, expected.moves
        assert moves is not None
        self.start_LE = expected_pins(expected, pinned_LE)
        rows: list[list[tuple[int, int]]] = [[] for _ in range(len(events))]
        for event, expert, action in zip(moves.event_M.tolist(), moves.expert_M.tolist(), moves.action_M.tolist(), strict=True):
            rows[event].append((expert, action))
        foretold = None if prefetcher is None else prefetcher.predict(events, seed=expected.seed)
        here = [set(np.flatnonzero(row).tolist()) for row in self.start_LE]
        self.events: list[_Order] = []
        for n, (row, layer) in enumerate(zip(rows, events.layer_N.tolist(), strict=True)):
            last = max((i for i, (_, action) in enumerate(row) if action == PREFETCH), default=-1)
            ahead, rest = row[: last + 1], row[last + 1 :]
            before = set(here[layer])
            _follow(here[layer], ahead)
            told = [] if foretold is None else foretold.experts_F[foretold.starts_N[n] : foretold.starts_N[n + 1]].tolist()
            self.events.append(_Order(tuple(ahead), tuple(e for e in told if e not in before | here[layer]), tuple(rest)))
            _follow(here[layer], rest)

    def spare(self, event: int) -> int:
        """Slots beside the kept ones that an event may need: buffers, experts used and not kept, and those given up while in use."""
        order = self.events[event]
        return len(order.buffered) + sum(action in (EVICT, STREAM) for _, action in order.rest)


def _follow(here: set[int], moves: Sequence[tuple[int, int]]) -> None:
    for expert, action in moves:
        if action == EVICT:
            here.discard(expert)
        elif action != STREAM:
            here.add(expert)


class _Run:
    """The execution: event after event."""

    def __init__(
        self, events: Events, plan: _Orders, caches: list[LayerCache], ids_TLK: NDArray[np.uint16], gates_TLK: NDArray[np.floating],
        tokens_per_step: int, device: str, backend: Backend, side: Side,
    ) -> None:  # fmt: skip
        self.events, self.plan, self.caches, self.side, self.backend, self.device = events, plan, caches, side, backend, device
        self.ids, self.gates, self.size = ids_TLK, torch.as_tensor(np.asarray(gates_TLK, np.float32), device=device), tokens_per_step
        source, host = torch.Generator().manual_seed(0), caches[0].host
        self.hidden = torch.randn(tokens_per_step, host.up.shape[2], generator=source).to(device, host.activations)
        self.hit_A = np.zeros(events.accesses, bool)
        self.demand_N, self.ahead_N = np.zeros((2, len(events)), np.int64)
        self.waits: list[tuple[Mark, Mark]] = []
        self.copies: list[Ticket] = []
        self.spans: list[tuple[Mark, Mark]] = []
        self.outputs: list[tuple[int, Tensor]] = []
        self.worst = 0.0
        self.done_ahead = -1  # the last event whose copies ahead were handed in

    def event(self, n: int) -> None:
        """Look up, load what is missing, hand in the next event's copies ahead, compute. Outputs are compared later."""
        begin = self.side.mark()
        layer = int(self.events.layer_N[n])
        cache, order = self.caches[layer], self.plan.events[n]
        if self.done_ahead < n:
            self._ahead(n)
        lo, hi = int(self.events.starts_N[n]), int(self.events.starts_N[n + 1])
        needed = self.events.experts_A[lo:hi].tolist()
        self.hit_A[lo:hi] = [expert in cache.slot_of for expert in needed]
        waits = [cache.coming.pop(expert) for expert in needed if expert in cache.coming]
        slots = {expert: cache.slot_of[expert] for expert in needed if expert in cache.slot_of}
        after: list[int] = []  # slots that are free once this event has computed
        asked = self.side.mark()
        for expert, action in order.rest:
            if action == EVICT:
                slot = cache.evict(expert)
                (after if expert in slots else cache.free).append(slot)
                continue
            if expert in cache.buffer:
                slots[expert] = cache.buffer.pop(expert)
            else:
                slots[expert], ticket = cache.copy(expert, self.side)
                self.demand_N[n] += 1
                waits.append(ticket)
                self.copies.append(ticket)
            if action == STREAM:
                after.append(slots[expert])
            else:
                cache.slot_of[expert] = slots[expert]
        for expert in list(cache.buffer):  # foretold in vain
            after.append(cache.buffer.pop(expert))
            cache.coming.pop(expert, None)
        if n + 1 < len(self.events) and int(self.events.layer_N[n + 1]) != layer:
            self._ahead(n + 1)
        if not self.demand_N[n]:
            asked = self.side.mark()
        for ticket in waits:
            self.side.wait(ticket)
        self.waits.append((asked, self.side.mark()))
        self._compute(n, layer, cache, slots)
        self.spans.append((begin, self.side.mark()))
        cache.free.extend(after)
        if len(cache.slot_of) > cache.slots:
            raise ValidationError(f"event {n}: {len(cache.slot_of)} experts are kept in {cache.slots} slots; the plan holds more than it may")
        if len(self.outputs) * self.outputs[-1][1].nbytes > KEEP_B:
            self.verify()

    def _ahead(self, n: int) -> None:
        """Hand in what is copied ahead for event n."""
        cache, order = self.caches[int(self.events.layer_N[n])], self.plan.events[n]
        for expert, action in order.ahead:
            if action == EVICT:
                cache.free.append(cache.evict(expert))
            else:
                cache.coming[expert] = cache.load(expert, self.side)
                self.copies.append(cache.coming[expert])
        for expert in order.buffered:
            slot, cache.coming[expert] = cache.copy(expert, self.side)
            cache.buffer[expert] = slot
            self.copies.append(cache.coming[expert])
        self.ahead_N[n] = sum(action == PREFETCH for _, action in order.ahead) + len(order.buffered)
        self.done_ahead = n

    def _compute(self, n: int, layer: int, cache: LayerCache, slots: Mapping[int, int]) -> None:
        table = np.full(NO_EXPERT + 1, -1, np.int64)
        table[list(slots)] = list(slots.values())
        ids, gates, hidden = self._tokens(n, layer)
        out = slots_layer(hidden, torch.as_tensor(table[ids], device=self.device), gates, cache.pool, backend=self.backend)
        if self.device != "cpu":
            torch.cuda.current_stream().synchronize()
        self.outputs.append((n, out))

    def _tokens(self, n: int, layer: int) -> tuple[NDArray[np.uint16], Tensor, Tensor]:
        first = int(self.events.step_N[n]) * self.size
        ids = self.ids[first : first + self.size, layer]
        return ids, self.gates[first : first + len(ids), layer], self.hidden[: len(ids)]

    def verify(self) -> None:
        """Hold the outputs kept so far against those of a layer with all its experts on the device; a layer at a time."""
        for layer, cache in enumerate(self.caches):
            mine = [(n, out) for n, out in self.outputs if self.events.layer_N[n] == layer]
            held = cache.host.like(len(cache.host.up), device=self.device) if self.device != "cpu" and mine else cache.host
            for expert in range(len(held.up)) if held is not cache.host else ():
                held.put(expert, cache.host, expert)
            for n, out in mine:
                ids, gates, hidden = self._tokens(n, layer)
                chosen = np.where(ids == NO_EXPERT, -1, ids.astype(np.int64))
                whole = slots_layer(hidden, torch.as_tensor(chosen, device=self.device), gates, held, backend=self.backend)
                self.worst = max(self.worst, _apart(out, whole))
        self.outputs.clear()


def _apart(out: Tensor, whole: Tensor) -> float:
    if not bool(torch.isfinite(out).all()):
        raise ValidationError("outputs under the cache plan are NaN or infinite; check weights and dtype")
    return float((out.double() - whole.double()).abs().max() / whole.double().abs().max().clamp_min(1e-20))


def _spread(seconds: NDArray[np.float64]) -> dict[str, float]:
    if not len(seconds):
        return {"events": 0, "p50": 0.0, "p90": 0.0, "total": 0.0}
    return {
        "events": len(seconds),
        "p50": float(np.median(seconds)),
        "p90": float(np.quantile(seconds, 0.9)),
        "total": float(seconds.sum()),
    }
