"""Traffic of an exchange on the links: who sends what to whom inside nodes and between them, by algorithm."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.cost.collectives import Algorithm
from moesim.sim.fabric import Wiring

Floats = NDArray[np.float64]


def hops(bytes_GG: Floats, bytes_GN: Floats, node_G: NDArray[np.integer], algorithm: Algorithm) -> tuple[Floats, Floats]:
    """(link_GG, nic_GG): bytes between devices of one node and of different nodes, as the algorithm sends them.

    flat directly; hierarchical first inside the node to the destination's local index, then between equal indices;
    forwarded one copy per node to the equal index there (bytes_GN), then inside. Devices are sorted by node.
    """
    same_GG = node_G[:, None] == node_G[None, :]
    if algorithm == "flat":
        return np.where(same_GG, bytes_GG, 0.0), np.where(same_GG, 0.0, bytes_GG)
    devices, nodes = len(node_G), int(node_G.max()) + 1
    local = devices // nodes
    blocks = bytes_GG.reshape(nodes, local, nodes, local)
    link, nic = np.zeros((2, nodes, local, nodes, local))
    node, index = np.arange(nodes), np.arange(local)
    if algorithm == "hierarchical":
        link[node, :, node] = blocks.sum(axis=2)
        nic[:, index, :, index] = np.moveaxis(blocks.sum(axis=1), 2, 0)
    else:
        link[node, :, node] = np.moveaxis(blocks.sum(axis=0), 1, 0)
        nic[:, index, :, index] = np.swapaxes(bytes_GN.reshape(nodes, local, nodes), 0, 1)
    return link.reshape(devices, devices), np.where(same_GG, 0.0, nic.reshape(devices, devices))


def spread(size_B: float, node_G: NDArray[np.integer]) -> tuple[Floats, Floats]:
    """(link_GG, nic_GG) of an all-gather of `size_B` spread evenly: shares between equal indices, then inside the nodes."""
    devices = len(node_G)
    share = np.full((devices, devices), size_B / devices) * ~np.eye(devices, dtype=bool)
    sizes = np.unique(node_G, return_counts=True)[1]
    if len(set(sizes.tolist())) > 1:
        return hops(share, np.zeros((devices, len(sizes))), node_G, "flat")
    per_node = np.full((devices, len(sizes)), size_B / devices)
    link, nic = hops(share, per_node, node_G, "forwarded")
    return link * ~np.eye(devices, dtype=bool), nic


class LinkLoads:
    """load_K of collectives on a wiring."""

    def __init__(self, wiring: Wiring, node_G: NDArray[np.integer]) -> None:
        self.wiring = wiring
        self.node_G = node_G
        self._gathers: dict[float, Floats] = {}

    def exchange(self, copies_GG: Floats, copies_GN: Floats, size_B: float, algorithm: Algorithm, *, back: bool) -> tuple[Floats, Floats]:
        """Loads inside nodes and between them of a dispatch, or of its way back."""
        link, nic = hops(copies_GG * size_B, copies_GN * size_B, self.node_G, algorithm)
        return (self.wiring.loads(link.T), self.wiring.loads(nic.T)) if back else (self.wiring.loads(link), self.wiring.loads(nic))

    def gather(self, size_B: float) -> Floats:
        """Load of an all-gather of `size_B`."""
        if size_B not in self._gathers:
            link, nic = spread(size_B, self.node_G)
            self._gathers[size_B] = self.wiring.loads(link) + self.wiring.loads(nic)
        return self._gathers[size_B]
