"""Read-ME: one router outside the model gives a token one route for all layers, so that requests queue by expert."""

from __future__ import annotations

from moesim.systems.batching import OneRoute, Regrouped
from moesim.systems.mechanisms import System
from moesim.systems.residency import Residency


def make(*, share: float = 0.5, window: int = 2, policy: str = "lookahead") -> System:
    """Read-ME with slots for `share` of the experts, batches from queues of `window` steps, and what is queued known to `policy`."""
    return System(
        name="read-me",
        title="Read-ME, pre-gating outside the model with expert-aware batches",
        paper="Read-ME, NeurIPS 2024, arXiv 2410.19123",
        headline="hits at 2/3/4/5 slots: Belady 44/62/77/88 %, LRU 34/52/67/83 %; experts per batch 5.08-5.21 -> 3.51; mean latency -5.0..6.1 %",
        check="Belady of the queue above LRU, LRU within 2.3 points of random under interleaved requests; layers see identical routes",
        routing=Regrouped(window=window, by="queue", inner=OneRoute()),
        residency=Residency(share=share, policy=policy, order="one-by-one"),
    )


SYSTEM = make()
