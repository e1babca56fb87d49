"""Hardware profiles (TOML) and the clusters they compose."""

from moesim.hardware.cluster import Cluster, load_cluster
from moesim.hardware.profile import Device, Fact, Fitted, Link, Memory, cluster_names, device_names, load_device, load_links

__all__ = ["Cluster", "Device", "Fact", "Fitted", "Link", "Memory", "cluster_names", "device_names", "load_cluster", "load_device", "load_links"]
