"""Cluster: devices, the nodes they sit in and the links between them, as arrays and as a networkx graph."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moesim.errors import ProfileError
from moesim.files import digest, read_toml, validated
from moesim.hardware.profile import Device, Fact, Link, cluster_names, find, load_device, load_links, make_link

if TYPE_CHECKING:
    import networkx as nx


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """G devices in nodes. Inside a node every device has one port to the node's switch; between nodes every device
    has one NIC to its rail, and rails share a spine that carries 1/oversubscription of their ports (None: one node).
    """

    name: str
    title: str
    devices: tuple[Device, ...]
    node_G: NDArray[np.int32]
    intra_G: tuple[Link, ...]  # the port of each device to its node's switch
    network: Link | None
    oversubscription: float = 1.0

    @property
    def size(self) -> int:
        """Number of devices, G."""
        return len(self.devices)

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return int(self.node_G.max()) + 1

    @cached_property
    def digest(self) -> str:
        """Names what the cost of this cluster depends on."""
        return digest(repr(self.devices), self.node_G.tobytes(), repr(self.intra_G), repr(self.network), str(self.oversubscription))

    @cached_property
    def weak_facts(self) -> tuple[str, ...]:
        """ "device: path = value (source)" of every number that nobody verified; shown in results."""
        found: dict[str, None] = {}
        for device in dict.fromkeys(d.name for d in self.devices):
            first = next(d for d in self.devices if d.name == device)
            found.update(dict.fromkeys(f"{device}: {fact.path} = {fact.value} ({fact.confidence})" for fact in first.weak_facts))
        for link in {**{p.name: p for p in self.intra_G}, **({self.network.name: self.network} if self.network else {})}.values():
            if link.fact.confidence in ("unverified", "assumed"):
                found[f"link {link.name}: {link.fact.value} ({link.fact.confidence})"] = None
        return tuple(found)

    @cached_property
    def graph(self) -> nx.DiGraph:
        """Directed graph of devices ("g0"), node switches ("node0"), rails ("rail0") and the spine.

        Edges carry `bandwidth_Bps`, `latency_s`, `link`. Rail r joins the r-th device of every node.
        """
        import networkx as nx

        graph = nx.DiGraph(name=self.name)
        position = [int((self.node_G[:g] == self.node_G[g]).sum()) for g in range(self.size)]

        def join(a: str, b: str, link: Link, bandwidth_Bps: float) -> None:
            for ends in ((a, b), (b, a)):
                graph.add_edge(*ends, bandwidth_Bps=bandwidth_Bps, latency_s=link.latency_s / 2, link=link.name)

        for g, device in enumerate(self.devices):
            graph.add_node(f"g{g}", kind="device", device=device.name, node=int(self.node_G[g]))
            join(f"g{g}", f"node{self.node_G[g]}", self.intra_G[g], self.intra_G[g].bandwidth_Bps)
            if self.network:
                join(f"g{g}", f"rail{position[g]}", self.network, self.network.bandwidth_Bps)
        if self.network:
            for rail in sorted(set(position)):
                ports = position.count(rail)
                join(f"rail{rail}", "spine", self.network, ports * self.network.bandwidth_Bps / self.oversubscription)
        return graph


def load_cluster(name: str | Path) -> Cluster:
    """A cluster by packaged name or by path of a .toml file; ProfileError lists every mistake."""
    path = find("clusters", name, cluster_names())
    from moesim.hardware.schema import ClusterFile

    parsed = validated(ClusterFile, read_toml(path, ProfileError), place=str(path), error=ProfileError)
    links = load_links() | {key: make_link(key, table) for key, table in parsed.links.items()}

    def link(key: str, where: str) -> Link:
        if key not in links:
            raise ProfileError(f"{path}: {where}: link {key!r} is not known; known: {', '.join(sorted(links))}; or add [links.{key}]")
        return links[key]

    devices: list[Device] = []
    nodes: list[int] = []
    ports: list[Link] = []
    for index, table in enumerate(parsed.nodes):
        reference = path.parent / table.device if table.device.endswith(".toml") else table.device
        device, port = load_device(reference), link(table.link, f"$.nodes[{index}].link")
        for _ in range(table.repeat):
            nodes += [nodes[-1] + 1 if nodes else 0] * table.devices
            devices += [device] * table.devices
            ports += [port] * table.devices
    return Cluster(
        name=parsed.name,
        title=parsed.title,
        devices=tuple(devices),
        node_G=np.asarray(nodes, np.int32),
        intra_G=tuple(ports),
        network=link(parsed.network.link, "$.network.link") if parsed.network else None,
        oversubscription=parsed.network.oversubscription if parsed.network else 1.0,
    )


__all__ = ["Cluster", "Fact", "load_cluster"]
