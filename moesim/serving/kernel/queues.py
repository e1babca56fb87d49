"""Queues of waiting requests: linked lists through `next_R`, one per rank and one that all share."""

from __future__ import annotations

from moesim.serving.kernel.prefix import release
from moesim.serving.kernel.state import FOREVER, Ranks, Requests, Stages, compiled, inlined


@inlined
def push(q: int, w: int, req: Requests, ranks: Ranks) -> None:
    """Put request q at the end of the queue of w."""
    if ranks.waiting_W[w] == 0:
        ranks.head_W[w] = q
    else:
        req.next_R[ranks.tail_W[w]] = q
    ranks.tail_W[w] = q
    ranks.waiting_W[w] += 1


@inlined
def push_front(q: int, w: int, req: Requests, ranks: Ranks) -> None:
    """Put request q before the others in the queue of w."""
    if ranks.waiting_W[w] == 0:
        ranks.tail_W[w] = q
    else:
        req.next_R[q] = ranks.head_W[w]
    ranks.head_W[w] = q
    ranks.waiting_W[w] += 1


@inlined
def pop(w: int, req: Requests, ranks: Ranks) -> int:
    """Take the first request of the queue of w."""
    q = ranks.head_W[w]
    ranks.head_W[w] = req.next_R[q]
    ranks.waiting_W[w] -= 1
    return q  # type: ignore[no-any-return]


@inlined
def least_loaded(low: int, high: int, weight: int, ranks: Ranks) -> int:
    """The rank from low to high with the lowest weight*waiting + running; vLLM's data-parallel front end takes weight 4."""
    best, least = low, weight * ranks.waiting_W[low] + ranks.running_W[low]
    for w in range(low + 1, high):
        score = weight * ranks.waiting_W[w] + ranks.running_W[w]
        if score < least:
            best, least = w, score
    return best


@inlined
def next_look(w: int, low: int, width: int, now: float, ranks: Ranks) -> float:
    """When rank w next looks at its queue: at the end of its group's step, at once where there is none."""
    end = ranks.end_W[low + (w - low) // width * width]
    return end if end < FOREVER else now


@compiled
def send_back(w: int, i: int, lose: bool, req: Requests, ranks: Ranks, stages: Stages) -> None:
    """The i-th running request of w gives its blocks back and waits in front; `lose`: what it computed is gone, too."""
    q = ranks.batch_WS[w, i]
    for j in range(i, ranks.running_W[w] - 1):
        ranks.batch_WS[w, j] = ranks.batch_WS[w, j + 1]
    ranks.running_W[w] -= 1
    release(q, w, req, ranks, stages)
    req.chunk_R[q] = 0
    if lose:
        req.computed_R[q] = 0
        req.again_R[q] += 1
    push_front(q, w, req, ranks)
