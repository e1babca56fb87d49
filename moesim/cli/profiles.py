"""`moesim profiles`: devices and clusters, every number with its source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesim.cli.options import AsJson

NAME = "profiles"
EPILOG = "Examples: moesim profiles · moesim profiles h100-sxm · moesim profiles h100-4x8 --json"


def run(
    name: Annotated[str | None, typer.Argument(help="A device or cluster, by name or .toml path; without it, all are listed.")] = None,
    json: AsJson = False,
) -> None:
    """List the shipped devices and clusters, or show one with the source of every number."""
    from dataclasses import asdict

    from moesim.cli.screen import emit_json, table
    from moesim.errors import ProfileError
    from moesim.files import read_toml
    from moesim.hardware import cluster_names, device_names, load_cluster, load_device
    from moesim.units import human

    if name is None:
        if json:
            emit_json({"devices": device_names(), "clusters": cluster_names()})
            return
        devices = [load_device(item) for item in device_names()]
        rows = [
            [d.name, d.title, d.kind, " + ".join(f"{human(m.capacity_B, 'B')} {m.name} at {human(m.bandwidth_Bps, 'B/s')}" for m in d.memories),
             ", ".join(f"{dtype} {human(rate, 'FLOP/s')}" for dtype, rate in d.flops.items()), str(len(d.weak_facts))]
            for d in devices
        ]  # fmt: skip
        table("Devices", ["name", "title", "kind", "memory", "dense peak", "unverified"], rows)
        clusters = [load_cluster(item) for item in cluster_names()]
        table("Clusters", ["name", "title", "devices", "nodes"], [[c.name, c.title, str(c.size), str(c.nodes)] for c in clusters])
        return
    if name.endswith(".toml"):
        is_cluster = "nodes" in read_toml(Path(name), ProfileError)
    elif name in {*device_names(), *cluster_names()}:
        is_cluster = name not in device_names()
    else:
        shipped = f"devices {', '.join(device_names())}; clusters {', '.join(cluster_names())}"
        raise ProfileError(f"{name!r} is neither a device nor a cluster; shipped: {shipped}; or give the path of a .toml file")
    if is_cluster:
        cluster = load_cluster(name)
        devices = list({d.name: d for d in cluster.devices}.values())
        if json:
            emit_json(
                {
                    "cluster": cluster.name,
                    "title": cluster.title,
                    "devices": [d.name for d in cluster.devices],
                    "node_of_device": cluster.node_G.tolist(),
                    "unverified": list(cluster.weak_facts),
                    "network": cluster.network.name if cluster.network else None,
                    "host_of_device": [host and host.name for host in cluster.host_G] or None,
                }
            )
            return
        hosts = {host.name: host for host in cluster.host_G if host}
        links = {link.name: link for link in [*cluster.intra_G, *cluster.nic_G, *(host.link for host in hosts.values())]}
        rows = [
            [
                link.name,
                link.title,
                human(link.bandwidth_Bps, "B/s"),
                human(link.latency_s, "s"),
                *("\n".join(getattr(f, part) for f in link.facts) for part in ("confidence", "source")),
            ]
            for link in links.values()
        ]
        table(
            f"{cluster.title}: {cluster.size} devices in {cluster.nodes} nodes",
            ["link", "title", "per direction", "latency", "confidence", "source"],
            rows,
        )
    else:
        devices = [load_device(name)]
        if json:
            emit_json({"device": devices[0].name, "title": devices[0].title, "facts": [asdict(fact) for fact in devices[0].facts]})
            return
    for device in devices:
        table(
            f"{device.name}: {device.title}",
            ["where", "value", "confidence", "source"],
            [[f.path, f.value, f.confidence, f.source] for f in device.facts],
        )
