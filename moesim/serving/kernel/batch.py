"""One step: which tokens a rank takes, and how long the group needs for them."""

from __future__ import annotations

from typing import Any

import numpy as np

from moesim.serving.kernel.prefix import known_units, make_room, use_known
from moesim.serving.kernel.queues import pop, send_back
from moesim.serving.kernel.state import COUNT, Found, Laws, Ranks, Requests, Stages, inlined


@inlined
def schedule(w: int, shared: int, t: float, pool: int, z: int, admit: bool, idle: bool, req: Requests, ranks: Ranks, stages: Stages) -> None:
    """Fill the step of rank w; its load goes to load_W5.

    Scheduled ahead, and unless the group was idle, the step knows no request that came, and no place that became free,
    while the last step ran. What waits at the rank comes before the queue `shared`.
    """
    budget, block = stages.tokens_Z2[z, pool], stages.block_tokens
    blocks, per_unit = stages.blocks_Z2[z, pool], stages.unit_tokens // stages.block_tokens
    late = stages.ahead and not idle
    places = stages.seqs_Z2[z, pool] - (ranks.done_W[w] if late else 0)
    decode, prompt, context, pairs, sampled = 0, 0, 0, 0.0, 0
    for i in range(ranks.running_W[w]):
        req.chunk_R[ranks.batch_WS[w, i]] = 0
    i, sent_back = 0, False
    while budget > 0:
        fresh, source = i >= ranks.running_W[w], w
        if not fresh:
            q = ranks.batch_WS[w, i]
        else:
            if ranks.waiting_W[w] == 0:
                source = shared
            if sent_back or not admit or ranks.waiting_W[source] == 0 or i >= places:
                break
            q = ranks.head_W[source]
            if late and req.seen_R[q] >= t:
                break
        held, known = req.computed_R[q], req.prompt_R[q] + req.made_R[q]
        units, unused = known_units(q, w, req, ranks, stages) if per_unit > 0 and fresh and held == 0 else (0, 0)
        held += units * stages.unit_tokens
        chunk = min(known - held, budget)
        own = (held + chunk + block - 1) // block - req.blocks_R[q] - (req.units_R[q] + units) * per_unit
        if own + unused * per_unit > blocks - ranks.used_W[w]:
            if fresh:
                break
            last = ranks.running_W[w] - 1
            send_back(w, last, True, req, ranks, stages)
            sent_back = True
            if last == i:
                break
            continue
        if fresh:
            pop(source, req, ranks)
            ranks.batch_WS[w, i] = q
            ranks.running_W[w] += 1
            req.rank_R[q] = w
            if np.isnan(req.start_R[q]):
                req.start_R[q] = t
            if units > 0:
                use_known(q, w, units, req, ranks, stages)
        ranks.used_W[w] += own
        req.blocks_R[q] += own
        if ranks.unused_W3[w, COUNT] > 0:
            make_room(w, blocks, ranks, stages)
        req.chunk_R[q] = chunk
        budget -= chunk
        if chunk == 1 and req.made_R[q] > 0:
            decode += 1
            context += held + 1
        else:
            prompt += chunk
            pairs += chunk * (held + 0.5 * (chunk + 1))
        sampled += held + chunk == known
        i += 1
    ranks.load_W5[w, 0], ranks.load_W5[w, 1], ranks.load_W5[w, 2], ranks.load_W5[w, 3], ranks.load_W5[w, 4] = decode, prompt, context, pairs, sampled


@inlined
def _hash(seed: Any, a: int, b: int) -> Any:
    """SplitMix64 (Steele, Lea and Flood 2014) of three numbers: a draw that depends on nothing else."""
    x = np.uint64(seed) ^ (np.uint64(a) * np.uint64(0x9E3779B97F4A7C15)) ^ (np.uint64(b) * np.uint64(0xBF58476D1CE4E5B9))
    x += np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@inlined
def _drawn(i: int, tokens: int, share: float, d: int, x: int, window: int, laws: Laws) -> float:
    """Quantity i of draw d: by line between two grid points, and between decode and prompt tokens by the share of these."""
    b, part = laws.place_XT[x, tokens], laws.part_XT[x, tokens]
    value = 0.0
    for k, weight in ((b, 1.0 - part), (b + 1, part)):
        value += weight * ((1.0 - share) * laws.drawn_XHBDM3[x, window, k, d, 0, i] + share * laws.drawn_XHBDM3[x, window, k, d, 1, i])
    return value


@inlined
def step_s(first: int, width: int, x: int, window: int, slow: float, hidden: bool, seed: Any, ranks: Ranks, laws: Laws, found: Found) -> float:
    """Seconds of the step of the group that begins at rank `first`. A rank without work runs one token along.

    `hidden`: the host's work was done while the last step ran, and shows only where it takes longer than the devices'.
    """
    total, most, prompt, dense = 0, 0, 0.0, 0.0
    for w in range(first, first + width):
        tokens = max(1, int(ranks.load_W5[w, 0] + ranks.load_W5[w, 1]))
        total += tokens
        most = max(most, tokens)
        prompt += ranks.load_W5[w, 1]
        own = laws.dense_XT[x, tokens] + laws.head_XT[x, int(ranks.load_W5[w, 4])]
        context = laws.context_X2[x, 1 if ranks.load_W5[w, 1] > 0 else 0]
        dense = max(dense, own + ranks.load_W5[w, 2] * context + ranks.load_W5[w, 3] * laws.pair_X[x])
    d = int(_hash(seed, first, ranks.steps_W[first]) % np.uint64(laws.drawn_XHBDM3.shape[3]))
    share, padded = prompt / total, most * width
    experts = _drawn(0, total, share, d, x, window, laws)
    mean = _drawn(1, total, share, d, x, window, laws)
    exchange = _drawn(2, padded, share, d, x, window, laws)  # the fullest rank's port sets the time
    devices = dense + experts + exchange
    host = max(0.0, laws.fixed_X[x] - devices) if hidden else laws.fixed_X[x]
    plain = host + devices
    ranks.steps_W[first] += 1
    found.steps_X[x] += 1
    found.busy_s_X[x] += dense + mean + exchange
    found.parts_X5[x, 0] += host
    found.parts_X5[x, 1] += dense
    found.parts_X5[x, 2] += experts
    found.parts_X5[x, 3] += exchange
    found.parts_X5[x, 4] += plain * (slow - 1.0)
    return plain * slow  # type: ignore[no-any-return]
