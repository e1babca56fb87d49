"""Hardware profiles (TOML) and the clusters they compose."""

from moesim.hardware.cluster import Cluster, load_cluster
from moesim.hardware.profile import Device, Fact, Fitted, Host, Link, Memory, cluster_names, device_names, load_device, load_hosts, load_links

__all__ = [
    "Cluster",
    "Device",
    "Fact",
    "Fitted",
    "Host",
    "Link",
    "Memory",
    "cluster_names",
    "device_names",
    "load_cluster",
    "load_device",
    "load_hosts",
    "load_links",
]
