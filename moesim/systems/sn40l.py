"""SN40L Composition of Experts: whole models live in DDR, the ones in use in HBM; a switch copies one from tier to tier.

An expert of the trace stands for a model, a layer for the router's choice of it. On a device with memory below its main one
(the SN40L's DDR) experts come from there, elsewhere from the host: the same system shows what the middle tier is worth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from moesim.replay import Events, Prefetches
from moesim.systems.mechanisms import System
from moesim.systems.residency import Residency


@dataclass(frozen=True)
class Queue:
    """What the next event asks for is known: requests wait in a queue, routed when they came."""

    name: ClassVar[str] = "queue"

    def predict(self, events: Events, *, seed: int = 0) -> Prefetches:
        """Everything but the first event, one event ahead."""
        first = int(events.starts_N[1]) if len(events) else 0
        starts_N = np.maximum(events.starts_N - first, 0)
        return Prefetches(experts_F=events.experts_A[first:], starts_N=starts_N, lead_N=(np.arange(len(events)) > 0).astype(np.int32))


def make(*, share: float | None = 0.25, queued: bool = False) -> System:
    """Room for `share` of the models in HBM; `queued`: the next request is known, and its model comes beside the current one."""
    return System(
        name="sn40l",
        title="SN40L Composition of Experts, three memory tiers",
        paper="SambaNova SN40L, arXiv 2405.07518",
        headline="model switches 15-31x faster than on a DGX, footprint /19, 150 experts",
        check="a switch takes bytes / DDR bandwidth; the ratio to a DGX is that of the tiers' bandwidths",
        residency=Residency(share=share, policy="lru", tier="ddr", prefetch=Queue() if queued else None),
    )


SYSTEM = make()
