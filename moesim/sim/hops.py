"""Traffic of an exchange on the links: who sends what to whom inside nodes and between them, by algorithm."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.cost.collectives import Algorithm
from moesim.sim.fabric import Wiring
from moesim.systems.routing import member_copies

Floats = NDArray[np.float64]


def hops(bytes_NGG: Floats, bytes_NGN: Floats, node_G: NDArray[np.integer], algorithm: Algorithm) -> tuple[Floats, Floats]:
    """(link_NGG, nic_NGG): bytes between devices of one node and of different nodes, as the algorithm sends them.

    flat directly; hierarchical first inside the node to the destination's local index, then between equal indices;
    forwarded one copy per node to the equal index there (bytes_NGN), then inside. Devices are sorted by node; any leading axes.
    """
    same_GG = node_G[:, None] == node_G[None, :]
    if algorithm == "flat":
        return np.where(same_GG, bytes_NGG, 0.0), np.where(same_GG, 0.0, bytes_NGG)
    *lead, devices, _ = bytes_NGG.shape
    nodes = int(node_G.max()) + 1
    local = devices // nodes
    blocks = bytes_NGG.reshape(*lead, nodes, local, nodes, local)
    link, nic = np.zeros((2, *blocks.shape))
    node, index = np.arange(nodes), np.arange(local)
    if algorithm == "hierarchical":
        link[..., node, :, node, :] = np.moveaxis(blocks.sum(axis=-2), -3, 0)
        nic[..., :, index, :, index] = np.moveaxis(blocks.sum(axis=-3), -1, 0)
    else:
        link[..., node, :, node, :] = np.moveaxis(blocks.sum(axis=-4), -2, 0)
        nic[..., :, index, :, index] = np.moveaxis(bytes_NGN.reshape(*lead, nodes, local, nodes), -2, 0)
    return link.reshape(bytes_NGG.shape), np.where(same_GG, 0.0, nic.reshape(bytes_NGG.shape))


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

    def exchange(
        self, copies_NGG: Floats, copies_NGN: Floats, algorithm: Algorithm, *, back: bool, apart: bool = False, slices: int = 1
    ) -> tuple[Floats, ...]:
        """Loads of a dispatch, or of its way back, for each byte of a copy: (whole_NK,), or `apart` (nic_NK, link_NK), between nodes and inside."""
        if algorithm == "flat" and not apart:
            sent: tuple[Floats, ...] = (copies_NGG,)
        else:
            link, nic = hops(copies_NGG, copies_NGN, self.node_G, algorithm)
            sent = (nic, link) if apart else (link + nic,)
        if slices > 1:
            sent = (*sent[:-1], sent[-1] + member_copies(copies_NGG, slices))
        return tuple(self.wiring.loads(np.swapaxes(matrix, -1, -2) if back else matrix) for matrix in sent)

    def gather(self, size_B: float) -> Floats:
        """Load of an all-gather of `size_B`."""
        if size_B not in self._gathers:
            link, nic = spread(size_B, self.node_G)
            self._gathers[size_B] = self.wiring.loads(link) + self.wiring.loads(nic)
        return self._gathers[size_B]
