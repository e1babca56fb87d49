"""MoE-Infinity: experts are prefetched and kept by how often a request's like has used them.

Its match of a request's activations against a collection is an input here: the share of needed experts it names.
"""

from __future__ import annotations

from moesim.replay import Oracle
from moesim.systems.mechanisms import System
from moesim.systems.residency import Residency


def make(*, share: float | None = 0.5, recall: float = 0.8, false: float = 0.25, distance: int = 2) -> System:
    """MoE-Infinity with slots for `share` of the experts; its matches name `recall` of what is needed, a share `false` of what they name is not."""
    return System(
        name="moe-infinity",
        title="MoE-Infinity, activation-aware offloading",
        paper="MoE-Infinity, arXiv 2401.14361",
        headline="A5000-24, s/token: Switch-large-128 .130, NLLB .119, Mixtral .735, DeepSeek-V2-Lite .155",
        check="against copying whole layers it gains the more, the fewer experts a token activates: least on Mixtral",
        residency=Residency(share=share, policy="lfu", prefetch=Oracle(distance=distance, recall=recall, false=false)),
    )


SYSTEM = make()
