"""Layouts: parts of a cluster, tensor-parallel ranks, experts in order."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from moesim.errors import InputError
from moesim.hardware import Cluster
from moesim.model import ModelSpec
from moesim.plan import Placement

_LAYOUT = re.compile(r"(?:dp(\d+))?(?:tp(\d+))?")


def even_placement(model: ModelSpec, devices: int) -> Placement:
    """Experts in order, one slot each; devices own as equal numbers of them as they divide."""
    slots_G = np.diff(np.arange(devices + 1) * model.experts // devices)
    slots_LP = np.tile(np.arange(model.experts, dtype=np.int32), (len(model.moe_layers), 1))
    return Placement(slots_LP=slots_LP, slots_G=slots_G, experts=model.experts, layers=model.moe_layers)


def first_devices(cluster: Cluster, devices: int) -> Cluster:
    """The cluster's first devices, in the nodes they sit in. Raises InputError when there are not that many."""
    if not 1 <= devices <= cluster.size:
        raise InputError(f"{cluster.name} has {cluster.size} devices, not {devices}")
    if devices == cluster.size:
        return cluster
    one_node = bool((cluster.node_G[:devices] == cluster.node_G[0]).all())
    own: Mapping[int, Any] = {g: link for g, link in cluster.own_nics.items() if g < devices}
    return replace(
        cluster,
        name=f"{cluster.name}[:{devices}]",
        devices=cluster.devices[:devices],
        node_G=cluster.node_G[:devices],
        intra_G=cluster.intra_G[:devices],
        network=None if one_node else cluster.network,
        own_nics={} if one_node else own,
        host_G=cluster.host_G[:devices],
        edges=(),
    )


def parse_layout(text: str, devices: int) -> int:
    """Tensor-parallel devices per rank of a layout such as "dp8", "tp8" or "dp4tp2" on `devices` devices.

    Raises InputError when it is not understood or does not fill the cluster. Experts are spread over all devices always.
    """
    match = _LAYOUT.fullmatch(text.lower().replace("x", "").replace("-", ""))
    if not match or not any(match.groups()):
        raise InputError(f"layout {text!r} is not understood; write dp{devices}, tp{devices} or dp{max(devices // 2, 1)}tp{min(devices, 2)}")
    tp = int(match[2]) if match[2] else devices // int(match[1]) if match[1] and int(match[1]) else 0
    dp = int(match[1]) if match[1] else devices // max(tp, 1)
    if match[1] and not match[2]:
        tp = 1
    if dp * tp != devices:
        raise InputError(f"layout {text!r} takes {dp} x {tp} devices, the cluster has {devices}; write a layout that fills it")
    return tp
