"""Traffic: what a placement makes of a routing, exactly, from the tokens themselves.

A token's hidden state goes once to each *distinct* device that holds one of its experts, and, where a transport
forwards inside the node, once to each distinct node; so co-activation decides the bytes, not the token count.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.cost.split import split_SLP
from moesim.plan import Placement
from moesim.trace import NO_EXPERT


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Counts per step s and MoE layer l.

    slot_tokens_SLP   tokens computed in each physical slot
    copies_SLGG       token copies from the device a token lives on to each distinct destination device (diagonal: stays)
    node_copies_SLGN  token copies to each distinct destination node
    selections_SLGG   token-expert pairs from each device to each other: what travels without de-duplication (None: not counted)
    tokens_SG         tokens that live on each device
    """

    slot_tokens_SLP: NDArray[np.float64]
    copies_SLGG: NDArray[np.float64]
    node_copies_SLGN: NDArray[np.float64]
    tokens_SG: NDArray[np.float64]
    selections_SLGG: NDArray[np.float64] | None = None

    def device_tokens_SLG(self, placement: Placement) -> NDArray[np.float64]:
        """Token-expert pairs each device computes."""
        ends = np.cumsum(placement.slots_G)
        sums = np.concatenate([np.zeros((*self.slot_tokens_SLP.shape[:2], 1)), self.slot_tokens_SLP.cumsum(axis=2)], axis=2)
        return np.asarray(sums[:, :, ends] - sums[:, :, ends - placement.slots_G])

    @property
    def fanout_devices_L(self) -> NDArray[np.float64]:
        """Mean number of distinct devices a token is sent to, per layer (its own counts)."""
        return np.asarray(self.copies_SLGG.sum(axis=(0, 2, 3)) / self.tokens_SG.sum())

    @property
    def fanout_nodes_L(self) -> NDArray[np.float64]:
        """Mean number of distinct nodes a token is sent to, per layer."""
        return np.asarray(self.node_copies_SLGN.sum(axis=(0, 2, 3)) / self.tokens_SG.sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatchTable:
    """Candidate slots of every (layer, source, expert): `slots[start : start + count]`, taken in turn by token index.

    The source axis has length 1 when the choice does not depend on it.
    """

    start_LGE: NDArray[np.int32]
    count_LGE: NDArray[np.int32]
    slots: NDArray[np.int32]


def dispatch_table(placement: Placement, node_G: NDArray[np.integer]) -> DispatchTable:
    """Table of the placement's dispatch rule on devices in nodes `node_G`; all replicas where the rule looks at the batch's loads."""
    layers = len(placement.layers)
    order = np.argsort(placement.slots_LP, axis=1, kind="stable").astype(np.int32)  # slots by expert, lowest first
    ends = np.cumsum(placement.replicas_LE, axis=1, dtype=np.int32)
    base = (np.arange(layers, dtype=np.int32) * order.shape[1])[:, None]
    start, count = base + ends - placement.replicas_LE, placement.replicas_LE
    if placement.dispatch not in ("static-source", "nearest") or (placement.replicas_LE == 1).all():
        return DispatchTable(start_LGE=start[:, None], count_LGE=count[:, None], slots=order.ravel())
    sources = placement.devices
    starts = np.repeat(start[:, None], sources, axis=1)
    counts = np.repeat(count[:, None], sources, axis=1)
    if placement.dispatch == "static-source":
        counts[:] = 1
    slots, tail = [order.ravel()], order.size
    for layer, expert in np.argwhere(placement.replicas_LE > 1):
        mine = order[layer, start[layer, expert] - base[layer, 0] :][: count[layer, expert]]
        homes = placement.device_P[mine]
        for source in range(sources):
            near = mine[homes == source]
            if not len(near) and placement.dispatch == "nearest":
                near = mine[node_G[homes] == node_G[source]]
            if len(near):
                near = near[:1] if placement.dispatch == "static-source" else near
                starts[layer, source, expert], counts[layer, source, expert] = tail, len(near)
                slots.append(near)
                tail += len(near)
    return DispatchTable(start_LGE=starts, count_LGE=counts, slots=np.concatenate(slots))


@cache
def _kernel() -> Any:
    import numba

    global _furthest_behind, _lightest  # closed over, they would make numba compile the kernel anew in every process

    @numba.njit(cache=True, nogil=True)
    def _furthest_behind(slots, start, count, quota_P, given_P):  # type: ignore[no-untyped-def]
        """Where the replica stands that has the smallest share of its quota so far: tokens of every source are spread alike."""
        best, lowest = start, np.inf
        for at in range(start, start + count):
            quota = quota_P[slots[at]]
            if quota > 0 and given_P[slots[at]] / quota < lowest:
                best, lowest = at, given_P[slots[at]] / quota
        return best

    @numba.njit(cache=True, nogil=True)
    def _lightest(slots, start, count, device_P, load_G):  # type: ignore[no-untyped-def]
        """Where the replica stands whose device has the fewest tokens so far."""
        best = start
        for at in range(start + 1, start + count):
            if load_G[device_P[slots[at]]] < load_G[device_P[slots[best]]]:
                best = at
        return best

    @numba.njit(parallel=True, cache=True, nogil=True)
    def route(  # type: ignore[no-untyped-def]
        experts_TLK, step_N, turn_N, source_N, start_LGE, count_LGE, slots, device_P, node_G, quota_SLP, by_load,
        slot_out, copies_out, nodes_out, pairs_out,
    ):  # fmt: skip
        tokens, layers, width = experts_TLK.shape
        by_source, count_pairs, by_quota = start_LGE.shape[1] > 1, pairs_out.size > 0, quota_SLP.size > 0
        for layer in numba.prange(layers):
            seen_G = np.full(copies_out.shape[3], -1, np.int64)  # last token that was sent there
            seen_N = np.full(nodes_out.shape[3], -1, np.int64)
            load_G, load_step = np.zeros(copies_out.shape[3] if by_load else 0, np.int64), -1
            for token in range(tokens):
                step, source = np.uint64(step_N[token]), np.uint64(source_N[token])
                row = source if by_source else np.uint64(0)
                if by_load and step_N[token] != load_step:
                    load_G[:] = 0
                    load_step = step_N[token]
                for k in range(width):
                    expert = np.uint64(experts_TLK[token, layer, k])
                    if expert == NO_EXPERT:
                        continue
                    at, count = start_LGE[layer, row, expert], count_LGE[layer, row, expert]
                    if count > 1:
                        if by_quota:
                            at = _furthest_behind(slots, at, count, quota_SLP[step, layer], slot_out[step, layer])
                        elif by_load:
                            at = _lightest(slots, at, count, device_P, load_G)
                        else:
                            at += turn_N[token] % count
                    slot = np.uint64(slots[np.uint64(at)])
                    device = np.uint64(device_P[slot])
                    if by_load:
                        load_G[device] += 1
                    node = np.uint64(node_G[device])
                    slot_out[step, layer, slot] += 1
                    # adding 0 or 1 instead of branching: whether a device is new is as good as random
                    copies_out[step, layer, source, device] += np.int64(seen_G[device] != token)
                    nodes_out[step, layer, source, node] += np.int64(seen_N[node] != token)
                    if count_pairs:
                        pairs_out[step, layer, source, device] += 1
                    seen_G[device] = token
                    seen_N[node] = token

    return route


def route(
    experts_TLK: NDArray[np.uint16],
    placement: Placement,
    node_G: NDArray[np.integer],
    *,
    ends_S: NDArray[np.integer] | None = None,
    tokens_per_step: float | None = None,
    selections: bool = False,
) -> Traffic:
    """Traffic of T tokens under a placement; step s is the tokens before `ends_S[s]` (rising, to T; default: one step).

    Inside a step the devices' tokens are consecutive runs, as in data-parallel attention. With `tokens_per_step` the
    counts are scaled so that every step stands for that many tokens; `selections` counts token-expert pairs, too. Cost: O(T·L·K);
    memory: the counts of all steps. A step is a batch where the dispatch rule looks at loads.
    """
    tokens, devices = len(experts_TLK), placement.devices
    place = np.arange(tokens)
    ends = np.asarray([tokens] if ends_S is None else ends_S)
    length_S = np.diff(ends, prepend=0)
    step_N = np.repeat(np.arange(len(ends), dtype=np.int32), length_S)
    turn_N = place - (ends - length_S)[step_N]
    source_N = (turn_N * devices // length_S[step_N]).astype(np.int32)
    steps = len(ends)
    table = dispatch_table(placement, node_G)
    layers, slots, nodes = len(placement.layers), placement.slots_LP.shape[1], int(np.max(node_G)) + 1
    slot_out = np.zeros((steps, layers, slots), np.int64)
    copies = np.zeros((steps, layers, devices, devices), np.int64)
    node_copies = np.zeros((steps, layers, devices, nodes), np.int64)
    pairs = np.zeros((steps, layers, devices, devices) if selections else (0, 0, 0, 0), np.int64)
    replicated = bool((placement.replicas_LE > 1).any())
    quota_SLP = np.zeros((0, 0, 0), np.int64)
    if placement.dispatch == "lp" and replicated:
        quota_SLP = split_SLP(_counts_SLE(experts_TLK, ends, placement.experts), placement)
    _kernel()(
        experts_TLK, step_N, turn_N, source_N, table.start_LGE, table.count_LGE, table.slots, placement.device_P,
        np.asarray(node_G, np.int32), quota_SLP, placement.dispatch == "least-loaded" and replicated, slot_out, copies, node_copies, pairs,
    )  # fmt: skip
    lives = np.bincount(step_N * np.int64(devices) + source_N, minlength=steps * devices).reshape(steps, devices)
    scale_S = np.ones(steps) if tokens_per_step is None else tokens_per_step / length_S
    return Traffic(
        slot_tokens_SLP=slot_out * scale_S[:, None, None],
        copies_SLGG=copies * scale_S[:, None, None, None],
        node_copies_SLGN=node_copies * scale_S[:, None, None, None],
        tokens_SG=lives * scale_S[:, None],
        selections_SLGG=pairs * scale_S[:, None, None, None] if selections else None,
    )


def _counts_SLE(experts_TLK: NDArray[np.uint16], ends_S: NDArray[np.integer], experts: int) -> NDArray[np.int64]:
    """Tokens of each step that chose each expert."""
    counts = np.zeros((len(ends_S), experts_TLK.shape[1], experts), np.int64)
    for step, (begin, end) in enumerate(zip(np.concatenate([[0], ends_S[:-1]]), ends_S, strict=True)):
        for layer in range(experts_TLK.shape[1]):
            chosen = experts_TLK[begin:end, layer].ravel()
            counts[step, layer] = np.bincount(chosen[chosen != NO_EXPERT], minlength=experts)
    return counts
