"""Fiddler: experts that are not on the device run on the host's cores where that is sooner than their copy."""

from __future__ import annotations

from moesim.cost.offload import HostCompute
from moesim.systems.mechanisms import System
from moesim.systems.residency import Residency

# A server's cores on bf16 experts, as reached: assumed, a fifth of the peak of 32 AVX-512 cores and 60 % of 8 channels of DDR4-3200.
HOST = HostCompute(flops=1.0e12, memory_Bps=120e9, launch_s=20e-6)


def make(*, share: float = 0.25, host: HostCompute = HOST) -> System:
    """Fiddler with the hottest `share` of the experts on the device."""
    return System(
        name="fiddler",
        title="Fiddler, missing experts on the host's cores",
        paper="Fiddler, ICLR 2025, arXiv 2402.07033",
        headline="1.26x for a single request, 1.30x in prefill, 11.57x with beam search",
        check="one number of tokens from which a copy is worth it; it falls as the link gets faster",
        residency=Residency(share=share, policy="static", host=host),
    )


SYSTEM = make()
