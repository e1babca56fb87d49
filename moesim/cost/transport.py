"""Ways an all-to-all travels, by name: what is sent how often, over which ports.

    nccl                 every device sends to every other directly, one copy per token and device
    deepep-normal        one copy per token and node, forwarded inside it over the link (training, prefill)
    deepep-low-latency   directly, one copy per token and chosen expert (decode)
    hierarchical         first inside the node to the destination's index, then between equal indices, with NCCL

Source: NCCL 2.29 all-to-all; deepseek-ai/DeepEP dd758ca README and docs/legacy.md (MIT); DeepSpeed-MoE (arXiv:2201.05596).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.cost.collectives import Algorithm
from moesim.errors import InputError
from moesim.hardware import Cluster


@dataclass(frozen=True, kw_only=True, slots=True)
class Transport:
    """`algorithm` says which ports carry a copy, `library` whose fitted ports they are, per_selection what a copy is for."""

    name: str
    algorithm: Algorithm
    library: str
    per_selection: bool = False


TRANSPORTS = {
    transport.name: transport
    for transport in (
        Transport(name="nccl", algorithm="flat", library="nccl"),
        Transport(name="deepep-normal", algorithm="forwarded", library="deepep-normal"),
        Transport(name="deepep-low-latency", algorithm="flat", library="deepep-low-latency", per_selection=True),
        Transport(name="hierarchical", algorithm="hierarchical", library="nccl"),
    )
}


def pick_transport(name: str | None, cluster: Cluster) -> Transport:
    """The named transport; by default deepep-normal where several equal nodes are joined by a network, else nccl.

    Raises InputError for an unknown name, and where indices of nodes are paired but the nodes are unequal.
    """
    sizes = np.unique(cluster.node_G, return_counts=True)[1].tolist()
    equal = len(set(sizes)) == 1
    if name is None:
        return TRANSPORTS["deepep-normal" if equal and len(sizes) > 1 else "nccl"]
    if name not in TRANSPORTS:
        raise InputError(f"transport {name!r} is unknown; use one of {', '.join(TRANSPORTS)}")
    chosen = TRANSPORTS[name]
    if chosen.algorithm != "flat" and not equal:
        direct = ", ".join(each.name for each in TRANSPORTS.values() if each.algorithm == "flat")
        raise InputError(f"transport {name!r} pairs devices of equal nodes, but {cluster.name!r} has nodes of {sizes} devices; use {direct}")
    return chosen
