"""Migrations executed: experts move between ranks while the layer keeps serving, and no output may change.

Order for safety: copy in, switch the map, then free; at no time has an expert no replica. Every rank has one spare slot:
with it a next safe move always exists (a rank without a free slot and with experts still to come holds more experts
to give up than are to come, so by counting some target of theirs has room).
On one device a copy between two ranks' slots is a copy inside its memory: a bound that no link reaches.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesim.cost.copies import CopyPath
from moesim.errors import PlanError, ValidationError
from moesim.plan import Placement
from moesim.trace import NO_EXPERT
from moesim.validate.backends import Backend
from moesim.validate.layer import selected_outputs, slots_layer, weighted_sum
from moesim.validate.machine import check_device, on_device
from moesim.validate.ranks import check_equal
from moesim.validate.streams import Side
from moesim.validate.timing import Progress, one_thread
from moesim.validate.weights import ROUNDING, ExpertWeights

SPARE = 1  # slots beside the larger of the two placements', on every rank


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """Copy `expert` from rank to rank, then free what the copy makes superfluous: (rank, expert) pairs."""

    expert: int
    source: int
    target: int
    frees: tuple[tuple[int, int], ...]


def safe_order(old: Placement, new: Placement, layer: int, *, node_G: NDArray[np.integer] | None = None) -> list[Move]:
    """The moves of `old.diff(new)` in one layer row, in an order in which every copy has room and no expert is ever without a slot.

    What both placements hold in common stays. `LiveLayer.retire` gives up what is left over at the end.
    """
    moves_M4 = old.diff(new, node_G=node_G).moves_M4
    wanted, held = new.holds_LGE[layer], old.holds_LGE[layer].copy()
    capacity_G = np.maximum(old.slots_G, new.slots_G) + SPARE
    waiting = [tuple(map(int, move[1:])) for move in moves_M4 if move[0] == layer]
    order: list[Move] = []
    while waiting:
        ready = next((move for move in waiting if held[move[2]].sum() < capacity_G[move[2]]), None)
        if ready is None:
            raise PlanError(f"layer {old.layers[layer]}: no rank has room for the next of {len(waiting)} moves; give a spare slot")
        expert, source, target = ready
        waiting.remove(ready)
        if not held[source, expert]:  # its first source was freed meanwhile; any holder will do
            source = int(np.flatnonzero(held[:, expert])[0])
        held[target, expert] = True
        frees = []
        for rank, other in np.argwhere(held & ~wanted):
            still_read = any(move[0] == other and move[1] == rank for move in waiting)
            if held[:, other].sum() > 1 and not still_read:
                held[rank, other] = False
                frees.append((int(rank), int(other)))
        order.append(Move(expert=expert, source=source, target=target, frees=tuple(frees)))
    return order


class LiveLayer:
    """One layer spread over ranks' slot pools on one device, serving tokens by a map that moves change.

    Replicas are taken in turn by token. Raises ValidationError when an expert would be left without a slot.
    """

    def __init__(self, placement: Placement, layer: int, weights: ExpertWeights, *, slots_G: NDArray[np.integer]) -> None:
        self.experts = placement.experts
        self.slots_G = [int(count) for count in slots_G]
        self.pools = [weights.like(count) for count in self.slots_G]
        self.slot_of: list[dict[int, int]] = [{} for _ in self.pools]
        for rank, pool in enumerate(self.pools):
            for expert in np.flatnonzero(placement.holds_LGE[layer, rank]).tolist():
                slot = len(self.slot_of[rank])
                pool.put(slot, weights, expert)
                self.slot_of[rank][expert] = slot

    def holds_GE(self) -> NDArray[np.bool_]:
        """Which rank holds which expert now."""
        held = np.zeros((len(self.pools), self.experts), bool)
        for rank, slots in enumerate(self.slot_of):
            held[rank, list(slots)] = True
        return held

    def free_slot(self, rank: int) -> int:
        """A slot of a rank that holds nothing."""
        used = set(self.slot_of[rank].values())
        slot = next((s for s in range(self.slots_G[rank]) if s not in used), None)
        if slot is None:
            raise ValidationError(f"rank {rank} has no free slot of {self.slots_G[rank]}; free one before copying in")
        return slot

    def copy_in(self, move: Move, slot: int) -> None:
        """Copy a move's expert into a free slot of its target; the map does not know of it yet."""
        self.pools[move.target].put(slot, self.pools[move.source], self.slot_of[move.source][move.expert], non_blocking=True)

    def switch(self, move: Move, slot: int) -> None:
        """Serve from the new slot, and give up what the move makes superfluous."""
        self.slot_of[move.target][move.expert] = slot
        for rank, expert in move.frees:
            del self.slot_of[rank][expert]
            if not any(expert in slots for slots in self.slot_of):
                raise ValidationError(f"expert {expert} would be left without a slot after rank {rank} gave it up; copy it in elsewhere first")

    def retire(self, wanted_GE: NDArray[np.bool_]) -> None:
        """Give up every expert that a rank need not hold; ValidationError if a wanted one is missing."""
        held = self.holds_GE()
        if (wanted_GE & ~held).any():
            rank, expert = np.argwhere(wanted_GE & ~held)[0]
            raise ValidationError(f"rank {rank} does not hold expert {expert} after the last move; the order of moves is incomplete")
        for rank, expert in np.argwhere(held & ~wanted_GE):
            del self.slot_of[int(rank)][int(expert)]

    def serve(self, hidden_TH: Tensor, ids_TK: NDArray[np.integer], gates_TK: Tensor, *, backend: Backend = "loop") -> Tensor:
        """Output [T, H] for tokens and their choices (65535: none), summed in the order of the choice."""
        device = hidden_TH.device
        homes = [[rank for rank, slots in enumerate(self.slot_of) if expert in slots] for expert in range(self.experts)]
        count_E = np.array([len(ranks) for ranks in homes])
        first_E = np.cumsum(count_E) - count_E
        flat = np.array([rank for ranks in homes for rank in ranks])
        token_N, k_N = np.nonzero(ids_TK != NO_EXPERT)
        expert_N = ids_TK[token_N, k_N].astype(np.int64)
        rank_N = flat[first_E[expert_N] + token_N % count_E[expert_N]]
        place_N = token_N * ids_TK.shape[1] + k_N
        rows, places = [], []
        for rank, pool in enumerate(self.pools):
            mine = rank_N == rank
            if mine.any():
                table = np.zeros(self.experts, np.int64)
                table[list(self.slot_of[rank])] = list(self.slot_of[rank].values())
                slots, tokens = (torch.as_tensor(x, device=device) for x in (table[expert_N[mine]], token_N[mine]))
                rows.append(selected_outputs(hidden_TH, slots, tokens, pool, backend=backend))
                places.append(torch.as_tensor(place_N[mine], device=device))
        return weighted_sum(torch.cat(rows), torch.cat(places), gates_TK, hidden_TH) if rows else torch.zeros_like(hidden_TH)


def execute_migration(
    old: Placement,
    new: Placement,
    layer: int,
    weights: ExpertWeights,
    ids_TK: NDArray[np.uint16],
    gates_TK: NDArray[np.floating],
    *,
    device: str = "cpu",
    backend: Backend = "loop",
    path: CopyPath | None = None,
    repeats: int = 5,
    seed: int = 0,
    progress: Progress = lambda share, what: None,
) -> dict[str, Any]:
    """Move one layer (row `layer`) from one placement to another, move by move, serving the same tokens all the time.

    Outputs before, during every copy and after must equal the unplaced layer's; ValidationError otherwise. Returns, JSON-ready:
    moves and bytes, seconds of the copies (and predicted by `path`), seconds to serve without and beside a copy
    (medians), the slow-down, and the largest deviation of an output.
    """
    check_device(device)
    order = safe_order(old, new, layer)
    hidden = torch.randn(len(ids_TK), weights.up.shape[2], generator=torch.Generator().manual_seed(seed)).to(device, weights.activations)
    gates = torch.as_tensor(np.asarray(gates_TK, np.float32), device=device)
    ids = torch.as_tensor(np.where(ids_TK == NO_EXPERT, -1, ids_TK.astype(np.int64)), device=device)
    with torch.inference_mode(), on_device(device, "migration"), one_thread(device):
        live = LiveLayer(old, layer, weights, slots_G=np.maximum(old.slots_G, new.slots_G) + SPARE)
        whole = slots_layer(hidden, ids, gates, weights, backend=backend)
        serve = partial(live.serve, hidden, ids_TK, gates, backend=backend)
        limit, why = ROUNDING[hidden.dtype], "the map from logical to physical experts is wrong"
        deviations = [check_equal(serve(), whole, tolerance=limit, why=why)]
        alone = [_seconds(serve, device)[0] for _ in range(repeats + 1)][1:]
        beside, copies = [], []
        with Side(device) as side:
            for index, move in enumerate(order):
                slot = live.free_slot(move.target)
                ticket = side.submit(partial(live.copy_in, move, slot))
                seconds, out = _seconds(serve, device)
                beside.append(seconds)
                deviations.append(check_equal(out, whole, tolerance=limit, why=why))
                side.wait(ticket)
                copies.append(ticket)
                live.switch(move, slot)
                deviations.append(check_equal(serve(), whole, tolerance=limit, why=why))
                progress((index + 1) / len(order), "migrating")
        live.retire(new.holds_LGE[layer])
        deviations.append(check_equal(serve(), whole, tolerance=limit, why=why))
        found: dict[str, Any] = {
            "layer": old.layers[layer],
            "moves": len(order),
            "bytes": len(order) * weights.expert_B,
            "copy_s": float(sum(ticket.seconds for ticket in copies)),
            "predicted_copy_s": None if path is None else float(path.time_s(np.full(len(order), weights.expert_B)).sum()),
            "serve_s": float(np.median(alone)),
            "serve_beside_copy_s": float(np.median(beside)) if beside else None,
            "slowdown": float(np.median(beside) / np.median(alone)) if beside else None,
            "noise_floor": float(np.std(alone) / np.mean(alone)),
            "deviation": max(deviations),
            "exact": max(deviations) == 0.0,
            "link": "copies inside one device: a bound that no link reaches",
        }
    return found


def _seconds(serve: Any, device: str) -> tuple[float, Tensor]:
    """Seconds of a call and what it returned: wall clock on CUDA, other streams go on; processor time of this thread on a CPU."""
    if device == "cpu":
        begin = time.thread_time()
        out = serve()
        return time.thread_time() - begin, out
    torch.cuda.current_stream().synchronize()
    begin = time.perf_counter()
    out = serve()
    torch.cuda.current_stream().synchronize()
    return time.perf_counter() - begin, out
