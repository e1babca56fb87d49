"""The loop over what happens: arrivals, ends of steps, hand-overs, changes."""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Any

from moesim.serving.kernel.batch import schedule, step_s
from moesim.serving.kernel.prefix import keep_computed, release
from moesim.serving.kernel.queues import least_loaded, next_look, push
from moesim.serving.kernel.state import BINS, FOREVER, NONE, Changes, Found, Laws, Ranks, Requests, Stages, compiled, inlined
from moesim.serving.kernel.transition import apply


@compiled
def run(seed: Any, req: Requests, ranks: Ranks, stages: Stages, laws: Laws, changes: Changes, found: Found) -> int:
    """Run until every request is served. Returns how many are not when nothing more can happen."""
    requests, shared = len(req.arrival_R), len(ranks.used_W) - 1
    base_1 = int(stages.ranks_Z2[:, 0].max())  # first rank of pool 1
    entry = 1 if stages.ranks_Z2[0, 1] > 0 else 0  # pool that computes prompts
    keeps = stages.unit_tokens > 0  # what prompts begin with
    z, c, window, now, coming, left = 0, 0, 0, 0.0, 0, requests
    paused_until, down_until, slow_until, slow = 0.0, 0.0, 0.0, 1.0
    handed = [(FOREVER, NONE)]  # heap of (time, request) on their way from pool 1 to pool 0
    while left > 0:
        t = handed[0][0]
        if coming < requests:
            t = min(t, req.arrival_R[coming])
        if c < len(changes.at_C):
            t = min(t, changes.at_C[c])
        for pool in range(entry + 1):
            low, width = pool * base_1, stages.width_Z2[z, pool]
            for first in range(low, low + stages.ranks_Z2[z, pool], width):
                t = min(t, ranks.end_W[first])
        if paused_until > now:
            t = min(t, paused_until)
        if down_until > now:
            t = min(t, down_until)
        if t == FOREVER:
            return left
        waiting, running, blocks = len(handed) - 1, 0, 0
        for w in range(shared + 1):
            waiting += ranks.waiting_W[w]
            running += ranks.running_W[w]
            blocks += ranks.used_W[w]
        _count(now, t, waiting, running, blocks, found)
        now = t
        while window + 1 < len(laws.window_H) and laws.window_H[window + 1] <= now:
            window += 1
        for pool in range(entry + 1):
            low, width = pool * base_1, stages.width_Z2[z, pool]
            for first in range(low, low + stages.ranks_Z2[z, pool], width):
                if ranks.end_W[first] <= now:
                    left -= _finish(first, width, now, pool, z, keeps and pool == entry, handed, req, ranks, stages, found)
        while handed[0][0] <= now:
            q = heappop(handed)[1]
            release(q, int(req.rank_R[q]), req, ranks, stages)
            w = least_loaded(0, stages.ranks_Z2[z, 0], 4, ranks)
            req.seen_R[q] = next_look(w, 0, stages.width_Z2[z, 0], now, ranks)
            push(q, w, req, ranks)
        while c < len(changes.at_C) and changes.at_C[c] <= now:
            z = apply(c, z, now, base_1, req, ranks, stages, changes)
            paused_until = max(paused_until, now + changes.pause_C[c])
            down_until = max(down_until, now + changes.down_C[c])
            if changes.slow_s_C[c] > 0:
                slow, slow_until = changes.slow_C[c], now + changes.slow_s_C[c]
            c += 1
        while coming < requests and req.arrival_R[coming] <= now:
            w, low = shared, entry * base_1
            req.seen_R[coming] = now
            if not stages.shared:
                w = least_loaded(low, low + stages.ranks_Z2[z, entry], 4, ranks)
                req.seen_R[coming] = next_look(w, low, stages.width_Z2[z, entry], now, ranks)
            push(coming, w, req, ranks)
            coming += 1
        if now < down_until:
            continue
        for pool in range(entry + 1):
            low, width = pool * base_1, stages.width_Z2[z, pool]
            for first in range(low, low + stages.ranks_Z2[z, pool], width):
                if ranks.end_W[first] < FOREVER:
                    continue
                any_work = pool == entry and ranks.waiting_W[shared] > 0
                for w in range(first, first + width):
                    any_work = any_work or ranks.waiting_W[w] > 0 or ranks.running_W[w] > 0
                if not any_work:
                    continue
                tokens, idle = 0.0, ranks.ended_W[first] != now
                while True:
                    for w in range(first, first + width):
                        schedule(w, shared if pool == entry else w, now, pool, z, now >= paused_until, idle, req, ranks, stages)
                        tokens += ranks.load_W5[w, 0] + ranks.load_W5[w, 1]
                    if tokens > 0 or idle or not stages.ahead:
                        break
                    idle = True  # nothing was scheduled ahead, so the engine looks again
                if tokens > 0:
                    factor = slow if now < slow_until else 1.0
                    ranks.end_W[first] = now + step_s(first, width, 2 * z + pool, window, factor, stages.ahead and not idle, seed, ranks, laws, found)
    return left


@inlined
def _finish(
    first: int, width: int, now: float, pool: int, z: int, keeps: bool, handed: Any, req: Requests, ranks: Ranks, stages: Stages, found: Found
) -> int:
    """End the step of the group that begins at rank `first`. Returns how many requests are done."""
    done, x = 0, 2 * z + pool
    place = min(int(now / found.bin_s[0]), BINS - 1)
    ranks.end_W[first], ranks.ended_W[first] = FOREVER, now
    for w in range(first, first + width):
        kept = 0
        ranks.done_W[w] = 0
        for i in range(ranks.running_W[w]):
            q = ranks.batch_WS[w, i]
            chunk = req.chunk_R[q]
            if chunk > 0:
                req.chunk_R[q] = 0
                before = req.computed_R[q]
                req.computed_R[q] = before + chunk
                if keeps and before < req.prompt_R[q]:
                    keep_computed(q, w, req, ranks, stages)
                fed = max(0, min(before + chunk, req.prompt_R[q]) - before)
                found.series_5N[4, place] += fed
                found.tokens_X2[x, 1] += fed
                if before + chunk == req.prompt_R[q] + req.made_R[q]:
                    req.made_R[q] += 1
                    found.series_5N[3, place] += 1
                    found.tokens_X2[x, 0] += 1
                    if req.made_R[q] == 1:
                        req.first_R[q] = now
                    if req.made_R[q] == req.output_R[q]:
                        req.end_R[q] = now
                        release(q, w, req, ranks, stages)
                        ranks.done_W[w] += 1
                        continue
                    if pool == 1:  # the blocks stay until the copy is done
                        ranks.port_W[w] = max(now, ranks.port_W[w]) + req.computed_R[q] * stages.hand_Z2[z, 1]
                        heappush(handed, (ranks.port_W[w] + stages.hand_Z2[z, 0], q))
                        continue
            ranks.batch_WS[w, kept] = q
            kept += 1
        ranks.running_W[w] = kept
        done += ranks.done_W[w]
    return done


@inlined
def _count(t0: float, t1: float, waiting: int, running: int, blocks: int, found: Found) -> None:
    """Add three levels over t0..t1 to the series; intervals double when time outgrows them."""
    series = found.series_5N
    while t1 >= found.bin_s[0] * BINS:
        for row in series:
            for n in range(BINS // 2):
                row[n] = row[2 * n] + row[2 * n + 1]
            row[BINS // 2 :] = 0.0
        found.bin_s[0] *= 2
    width = found.bin_s[0]
    n = int(t0 / width)
    while t0 < t1:
        until = min(t1, (n + 1) * width)
        series[0, n] += waiting * (until - t0)
        series[1, n] += running * (until - t0)
        series[2, n] += blocks * (until - t0)
        t0 = until
        n += 1
