"""Going over from one stage of a deployment to the next, while requests are served."""

from __future__ import annotations

import numpy as np

from moesim.serving.kernel.prefix import forget
from moesim.serving.kernel.queues import least_loaded, next_look, pop, push, send_back
from moesim.serving.kernel.state import FOREVER, Changes, Ranks, Requests, Stages, compiled


@compiled
def apply(c: int, z: int, now: float, base_1: int, req: Requests, ranks: Ranks, stages: Stages, changes: Changes) -> int:
    """Stop ranks, lose caches, regroup, deal the waiting requests out anew. Returns the new stage."""
    new, restart = changes.stage_C[c], changes.restart_C[c]
    for pool in range(2):
        low, before, after = pool * base_1, stages.ranks_Z2[z, pool], stages.ranks_Z2[new, pool]
        for w in range(low, low + before):
            if restart or w >= low + after or changes.lost_CW[c, w]:
                lose = restart or changes.lost_CW[c, w] or not changes.keep_C[c]
                for i in range(ranks.running_W[w] - 1, -1, -1):
                    send_back(w, i, lose, req, ranks, stages)
                forget(w, ranks)
                if restart:
                    ranks.end_W[w] = FOREVER
        if before != after or stages.width_Z2[z, pool] != stages.width_Z2[new, pool]:
            _regroup(low, before, max(stages.width_Z2[z, pool], 1), after, max(stages.width_Z2[new, pool], 1), ranks)
        if restart:
            _begin_again(low, low + before, req, ranks)
        if before != after or restart or changes.lost_CW[c].any():
            _deal(low, max(before, after), after, max(stages.width_Z2[new, pool], 1), now, req, ranks)
    return new  # type: ignore[no-any-return]


@compiled
def _begin_again(low: int, high: int, req: Requests, ranks: Ranks) -> None:
    """Those who wait at these ranks have made nothing yet."""
    for w in range(low, high):
        q = ranks.head_W[w]
        for _ in range(ranks.waiting_W[w]):
            req.made_R[q] = 0
            req.first_R[q] = np.nan
            q = req.next_R[q]


@compiled
def _regroup(low: int, before: int, width: int, after: int, new_width: int, ranks: Ranks) -> None:
    """Steps under way are finished: a new group begins when the last step of its ranks has ended."""
    count = max(before, after)
    end_W = np.full(count, -1.0)
    for w in range(before):
        end = ranks.end_W[low + w // width * width]
        end_W[w] = end if end < FOREVER else -1.0
    ranks.end_W[low : low + count] = FOREVER
    for first in range(0, after, new_width):
        end = end_W[first : first + new_width].max()
        if end >= 0:
            ranks.end_W[low + first] = end


@compiled
def _deal(low: int, count: int, after: int, width: int, now: float, req: Requests, ranks: Ranks) -> None:
    """Everyone who waits at one of `count` ranks goes, by arrival, to the rank with the fewest requests of the first `after`."""
    waiting = 0
    for w in range(low, low + count):
        waiting += ranks.waiting_W[w]
    queued = np.empty(waiting, np.int64)
    n = 0
    for w in range(low, low + count):
        while ranks.waiting_W[w] > 0:
            queued[n] = pop(w, req, ranks)
            n += 1
    queued.sort()
    for n in range(waiting):
        q = int(queued[n])
        w = least_loaded(low, low + after, 1, ranks)
        req.seen_R[q] = min(req.seen_R[q], next_look(w, low, width, now, ranks))
        push(q, w, req, ranks)
