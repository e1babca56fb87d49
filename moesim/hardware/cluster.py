"""Cluster: devices, the nodes they sit in and the links between them, as arrays and as a networkx graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moesim.errors import ProfileError
from moesim.files import digest, read_toml, validated
from moesim.hardware.profile import (
    Device,
    Fact,
    Host,
    Link,
    cluster_names,
    find,
    load_device,
    load_hosts,
    load_links,
    make_host,
    make_link,
)

if TYPE_CHECKING:
    import networkx as nx


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """G devices in nodes. Inside a node every device has one port to the node's switch; between nodes every device
    has one NIC to its rail, and rails share a spine that carries 1/oversubscription of their ports (None: one node).

    own_nics names devices whose NIC is not `network`; host_G is what feeds each device (None: not described); edges are
    links beyond these, between places of the graph.
    """

    name: str
    title: str
    devices: tuple[Device, ...]
    node_G: NDArray[np.int32]
    intra_G: tuple[Link, ...]  # the port of each device to its node's switch
    network: Link | None
    oversubscription: float = 1.0
    own_nics: Mapping[int, Link] = field(default_factory=dict)
    host_G: tuple[Host | None, ...] = ()
    edges: tuple[tuple[str, str, Link], ...] = ()

    @property
    def size(self) -> int:
        """Number of devices, G."""
        return len(self.devices)

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return int(self.node_G.max()) + 1

    @property
    def nic_G(self) -> tuple[Link, ...]:
        """NIC of each device; empty without a network."""
        return tuple(self.own_nics.get(g, self.network) for g in range(self.size)) if self.network else ()

    def host(self, device: int) -> Host | None:
        """What feeds a device, if the cluster's file says."""
        return self.host_G[device] if self.host_G else None

    @cached_property
    def digest(self) -> str:
        """Names what the cost of this cluster depends on."""
        parts: list[bytes | str] = [repr(self.devices), self.node_G.tobytes(), repr(self.intra_G), repr(self.network), str(self.oversubscription)]
        more = [repr(part) for part in (dict(self.own_nics), self.host_G, self.edges) if part]
        return digest(*parts, *more)

    @cached_property
    def weak_facts(self) -> tuple[str, ...]:
        """ "device: path = value (source)" of every number that nobody verified; shown in results."""
        found: dict[str, None] = {}
        for device in dict.fromkeys(d.name for d in self.devices):
            first = next(d for d in self.devices if d.name == device)
            found.update(dict.fromkeys(f"{device}: {fact.path} = {fact.value} ({fact.confidence})" for fact in first.weak_facts))
        links = [*self.intra_G, *self.nic_G, *(link for *_, link in self.edges), *(host.link for host in self.host_G if host)]
        both: tuple[tuple[str, Sequence[Link | Host]], ...] = (("link", links), ("host", [host for host in self.host_G if host]))
        for kind, parts in both:
            for part in {part.name: part for part in parts}.values():
                found.update(dict.fromkeys(f"{kind} {part.name}: {fact.path} = {fact.value} ({fact.confidence})" for fact in part.weak_facts))
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
                join(f"g{g}", f"rail{position[g]}", self.nic_G[g], self.nic_G[g].bandwidth_Bps)
        if self.network:
            for rail in sorted(set(position)):
                ports_Bps = sum(nic.bandwidth_Bps for nic, at in zip(self.nic_G, position, strict=True) if at == rail)
                join(f"rail{rail}", "spine", self.network, ports_Bps / self.oversubscription)
        for a, b, link in self.edges:
            join(a, b, link, link.bandwidth_Bps)
        return graph


def load_cluster(name: str | Path) -> Cluster:
    """A cluster by packaged name or by path of a .toml file; ProfileError lists every mistake."""
    path = find("clusters", name, cluster_names())
    from moesim.hardware.schema import ClusterFile

    data = read_toml(path, ProfileError)
    parsed = validated(ClusterFile, data, place=str(path), error=ProfileError)
    links = load_links() | {key: make_link(key, table, data["links"][key]) for key, table in parsed.links.items()}
    hosts = load_hosts() | {key: make_host(key, table, data["hosts"][key], links) for key, table in parsed.hosts.items()}

    def link(key: str, where: str) -> Link:
        if key not in links:
            raise ProfileError(f"{path}: {where}: link {key!r} is not known; known: {', '.join(sorted(links))}; or add [links.{key}]")
        return links[key]

    devices: list[Device] = []
    nodes: list[int] = []
    ports: list[Link] = []
    feeds: list[Host | None] = []
    own_nics: dict[int, Link] = {}
    for index, table in enumerate(parsed.nodes):
        reference = path.parent / table.device if table.device.endswith(".toml") else table.device
        device, port = load_device(reference), link(table.link, f"$.nodes[{index}].link")
        if table.host is not None and table.host not in hosts:
            known = ", ".join(sorted(hosts))
            raise ProfileError(f"{path}: $.nodes[{index}].host: host {table.host!r} is not known; known: {known}; or add [hosts.{table.host}]")
        total = table.repeat * table.devices
        if table.nic is not None:
            own_nics |= dict.fromkeys(range(len(devices), len(devices) + total), link(table.nic, f"$.nodes[{index}].nic"))
        feeds += [hosts[table.host] if table.host else None] * total
        for _ in range(table.repeat):
            nodes += [nodes[-1] + 1 if nodes else 0] * table.devices
            devices += [device] * table.devices
            ports += [port] * table.devices
    cluster = Cluster(
        name=parsed.name,
        title=parsed.title,
        devices=tuple(devices),
        node_G=np.asarray(nodes, np.int32),
        intra_G=tuple(ports),
        network=link(parsed.network.link, "$.network.link") if parsed.network else None,
        oversubscription=parsed.network.oversubscription if parsed.network else 1.0,
        own_nics=own_nics,
        host_G=tuple(feeds) if any(feeds) else (),
    )
    edges = tuple((*edge.between, link(edge.link, f"$.edges[{index}].link")) for index, edge in enumerate(parsed.edges))
    if edges and (strangers := sorted({place for a, b, _ in edges for place in (a, b)} - set(cluster.graph))):
        raise ProfileError(f"{path}: $.edges: {', '.join(strangers)} is no place of the graph; places are {', '.join(cluster.graph)}")
    return replace(cluster, edges=edges) if edges else cluster


__all__ = ["Cluster", "Fact", "load_cluster"]
