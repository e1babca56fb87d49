"""Prompts that begin alike: blocks of prompts stay in a rank's cache after their request and are used again (vLLM's prefix cache).

A unit is a block of `unit_tokens` prompt tokens and all before it; equal ids are equal units. What requests use is counted once,
however many share it. What nobody uses stays until its room is wanted; the one unused for longest goes first, the end of a
prompt before its beginning. Suffix U: distinct units.
"""

from __future__ import annotations

from moesim.serving.kernel.state import COUNT, NEWER, NEWEST, NONE, OLDER, OLDEST, USERS, Ranks, Requests, Stages, inlined


@inlined
def known_units(q: int, w: int, req: Requests, ranks: Ranks, stages: Stages) -> tuple[int, int]:
    """Units from the start of request q that rank w holds, and how many of them nobody uses. One token is always computed."""
    start = req.first_unit_R[q]
    most = min(req.first_unit_R[q + 1] - start, (req.prompt_R[q] + req.made_R[q] - 1) // stages.unit_tokens)
    found, unused = 0, 0
    while found < most and ranks.units_WU3[w, req.unit_A[start + found], USERS] >= 0:
        unused += ranks.units_WU3[w, req.unit_A[start + found], USERS] == 0
        found += 1
    return found, unused


@inlined
def use_known(q: int, w: int, count: int, req: Requests, ranks: Ranks, stages: Stages) -> None:
    """Request q uses the first units it has, which rank w holds."""
    for i in range(count):
        u = req.unit_A[req.first_unit_R[q] + i]
        if ranks.units_WU3[w, u, USERS] == 0:
            _unlink(w, u, ranks)
            ranks.used_W[w] += stages.unit_tokens // stages.block_tokens
        ranks.units_WU3[w, u, USERS] += 1
    req.units_R[q] = count
    req.computed_R[q] = count * stages.unit_tokens
    req.reused_R[q] += count * stages.unit_tokens


@inlined
def keep_computed(q: int, w: int, req: Requests, ranks: Ranks, stages: Stages) -> None:
    """Units that request q has computed in full are known from now on; its own copy of one that is known already is given back."""
    per_unit = stages.unit_tokens // stages.block_tokens
    start, most = req.first_unit_R[q], req.first_unit_R[q + 1] - req.first_unit_R[q]
    while req.units_R[q] < most and (req.units_R[q] + 1) * stages.unit_tokens <= req.computed_R[q]:
        u = req.unit_A[start + req.units_R[q]]
        if ranks.units_WU3[w, u, USERS] > 0:
            ranks.used_W[w] -= per_unit
        elif ranks.units_WU3[w, u, USERS] == 0:
            _unlink(w, u, ranks)
        ranks.units_WU3[w, u, USERS] = max(ranks.units_WU3[w, u, USERS], 0) + 1
        req.blocks_R[q] -= per_unit
        req.units_R[q] += 1


@inlined
def release(q: int, w: int, req: Requests, ranks: Ranks, stages: Stages) -> None:
    """Request q needs its cache on rank w no more."""
    ranks.used_W[w] -= req.blocks_R[q]
    req.blocks_R[q] = 0
    for i in range(req.units_R[q] - 1, -1, -1):
        u = req.unit_A[req.first_unit_R[q] + i]
        ranks.units_WU3[w, u, USERS] -= 1
        if ranks.units_WU3[w, u, USERS] == 0:
            ranks.used_W[w] -= stages.unit_tokens // stages.block_tokens
            _link(w, u, ranks)
    req.units_R[q] = 0


@inlined
def make_room(w: int, blocks: int, ranks: Ranks, stages: Stages) -> None:
    """Forget units nobody uses until they fit beside what is used, in a cache of so many blocks."""
    per_unit = stages.unit_tokens // stages.block_tokens
    while ranks.unused_W3[w, COUNT] > 0 and ranks.used_W[w] + ranks.unused_W3[w, COUNT] * per_unit > blocks:
        u = ranks.unused_W3[w, OLDEST]
        _unlink(w, u, ranks)
        ranks.units_WU3[w, u, USERS] = NONE


@inlined
def forget(w: int, ranks: Ranks) -> None:
    """Rank w loses what nobody uses."""
    while ranks.unused_W3[w, COUNT] > 0:
        u = ranks.unused_W3[w, OLDEST]
        _unlink(w, u, ranks)
        ranks.units_WU3[w, u, USERS] = NONE


@inlined
def _link(w: int, u: int, ranks: Ranks) -> None:
    """Unit u is the one used last."""
    ranks.units_WU3[w, u, OLDER] = ranks.units_WU3[w, u, NEWER] = NONE
    if ranks.unused_W3[w, COUNT] == 0:
        ranks.unused_W3[w, OLDEST] = u
    else:
        ranks.units_WU3[w, u, OLDER] = ranks.unused_W3[w, NEWEST]
        ranks.units_WU3[w, ranks.unused_W3[w, NEWEST], NEWER] = u
    ranks.unused_W3[w, NEWEST] = u
    ranks.unused_W3[w, COUNT] += 1


@inlined
def _unlink(w: int, u: int, ranks: Ranks) -> None:
    """Unit u is used, or forgotten."""
    older, newer = ranks.units_WU3[w, u, OLDER], ranks.units_WU3[w, u, NEWER]
    if older == NONE:
        ranks.unused_W3[w, OLDEST] = newer
    else:
        ranks.units_WU3[w, older, NEWER] = newer
    if newer == NONE:
        ranks.unused_W3[w, NEWEST] = older
    else:
        ranks.units_WU3[w, newer, OLDER] = older
    ranks.unused_W3[w, COUNT] -= 1
