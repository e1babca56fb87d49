"""Time of collectives: protocol curves for uniform traffic, a busiest-port model for skewed all-to-all.

A port is what one device sends or receives on one tier (link inside the node, NIC between nodes). Both views
use the same function of a port's load, so a uniform traffic matrix reproduces the measured curve exactly.
Suffixes: N leading axes (steps, layers), G devices, M nodes, D devices per node, P the four `PORTS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import reduce
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import InputError, ProfileError
from moesim.hardware.profile import Fitted

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Algorithm = Literal["flat", "hierarchical", "forwarded"]

PORTS = ("link out", "link in", "nic out", "nic in")
OPS = ("all_to_all", "all_gather", "reduce_scatter", "all_reduce")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearPort:
    """A port with start-up, message cost and bandwidth: `t = latency + messages*message + bytes/bandwidth`.

    `valid_B` are the fewest and most bytes it was measured with. Raises ProfileError on impossible
    parameters.
    """

    latency_s: float
    bandwidth_Bps: float
    message_s: float = 0.0
    valid_B: tuple[float, float] = (0.0, np.inf)

    def __post_init__(self) -> None:
        _check_port(self, may_be_zero=("latency_s", "message_s"))

    def time_s(self, bytes_N: ArrayLike, *, messages_N: ArrayLike, largest_N: ArrayLike, ranks: ArrayLike) -> Floats:
        """Seconds to move `bytes_N` in `messages_N` messages; 0 for no bytes. The rest does not matter."""
        load_N = np.asarray(bytes_N, dtype=np.float64)
        time_N = self.latency_s + self.message_s * np.asarray(messages_N) + load_N / self.bandwidth_Bps
        return np.where(load_N > 0, time_N, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtocolPort:
    """A port driven by GPU copy kernels that have a short-message and a long-message protocol.

    y bytes pass the port in p messages, the largest of m bytes, and the kernels of one of n ranks handle
    x = y*n/(n-1) bytes, the rank's own share included:

        short = short_latency + p*short_message + m/short_bandwidth
        wire  = max(x/copy_bandwidth, y/port_bandwidth) * (1 + ramp*min(1, ramp_B/x))
        long  = p*long_message + max(long_floor, long_latency + wire)
        t     = min(short, long)

    Every message has its own channels, so the largest paces the short protocol. `ramp` is the extra time
    while chunks and channels are not yet full size, `long_floor` the time synchronisation takes anyway. t
    never falls when bytes or messages grow. `valid_B` are the fewest and most bytes y measured.
    Source: NCCL's LL and Simple protocols give the form; constants are fitted (`moesim.calibrate.networks`).
    Raises ProfileError on impossible parameters.
    """

    short_latency_s: float
    short_message_s: float
    short_bandwidth_Bps: float
    long_floor_s: float
    long_latency_s: float
    long_message_s: float
    copy_bandwidth_Bps: float
    port_bandwidth_Bps: float
    ramp: float
    ramp_B: float
    valid_B: tuple[float, float] = (0.0, np.inf)

    def __post_init__(self) -> None:
        _check_port(self, may_be_zero=("short_message_s", "long_message_s", "ramp", "ramp_B"))

    def time_s(self, bytes_N: ArrayLike, *, messages_N: ArrayLike, largest_N: ArrayLike, ranks: ArrayLike) -> Floats:
        """Seconds to move `bytes_N` in `messages_N` messages, the largest of `largest_N` bytes."""
        load_N, messages_N = np.asarray(bytes_N, dtype=np.float64), np.asarray(messages_N, dtype=np.float64)
        ranks_N = np.asarray(ranks, dtype=np.float64)
        copied_N = load_N * ranks_N / np.maximum(ranks_N - 1, 1)
        short_N = self.short_latency_s + self.short_message_s * messages_N
        short_N = short_N + np.asarray(largest_N) / self.short_bandwidth_Bps
        slowed_N = 1.0 + self.ramp * np.minimum(1.0, self.ramp_B / np.maximum(copied_N, 1e-300))
        wire_N = np.maximum(copied_N / self.copy_bandwidth_Bps, load_N / self.port_bandwidth_Bps) * slowed_N
        long_N = np.maximum(self.long_floor_s, self.long_latency_s + wire_N) + self.long_message_s * messages_N
        return np.where(load_N > 0, np.minimum(short_N, long_N), 0.0)


Port = LinearPort | ProtocolPort


def _check_port(port: Port, *, may_be_zero: tuple[str, ...]) -> None:
    for name in (field.name for field in fields(port)):
        value = getattr(port, name)
        if name == "valid_B":
            good, expected = 0 <= value[0] <= value[1], "0 <= fewest <= most bytes"
        elif name in may_be_zero:
            good, expected = bool(np.isfinite(value)) and value >= 0, "a finite number >= 0"
        else:
            good, expected = bool(np.isfinite(value)) and value > 0, "a finite number > 0"
        if not good:
            raise ProfileError(f"{type(port).__name__}.{name}={value}: expected {expected}; correct it")


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveCurve:
    """Time of one uniform collective in one NVLink domain, from bytes and ranks.

    `bytes` is the full buffer of one rank (all_to_all, all_reduce), the gathered output (all_gather) or the
    input (reduce_scatter), as NCCL's own benchmarks count it. all_to_all sends n-1 messages of bytes/n; the
    others are rings whose n-1 steps form one stream (a reduction inside the switch is expressed in the same
    ring bytes, so its port bandwidth may exceed the wire's). `ranks` are the fewest and most measured.
    """

    name: str
    op: str
    port: ProtocolPort
    ranks: tuple[int, int]

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ProfileError(f"collective op {self.op!r} is unknown; use one of {', '.join(OPS)}")
        if not 2 <= self.ranks[0] <= self.ranks[1]:
            raise ProfileError(f"{self.name} {self.op}: ranks={self.ranks}; expected 2 <= fewest <= most")

    def time_s(self, bytes_N: ArrayLike, *, ranks: ArrayLike) -> tuple[Floats, Bools]:
        """Seconds, and whether (bytes, ranks) lie outside what was measured.

        Shapes: bytes_N and ranks broadcast -> same, twice. No bytes or one rank cost exactly 0.
        Raises InputError for negative bytes or ranks below 1.
        """
        buffer_N, ranks_N = np.broadcast_arrays(np.asarray(bytes_N, float), np.asarray(ranks, float))
        if not (np.all(buffer_N >= 0) and np.all(ranks_N >= 1)):
            raise InputError(f"{self.op}: bytes={bytes_N!r}, ranks={ranks!r}; pass bytes >= 0 and ranks >= 1")
        port_N = wire_bytes(self.op, buffer_N, ranks_N)
        largest_N = buffer_N / ranks_N if self.op == "all_to_all" else port_N
        time_N = self.port.time_s(port_N, messages_N=ranks_N - 1, largest_N=largest_N, ranks=ranks_N)
        measured_N = (self.ranks[0] <= ranks_N) & (ranks_N <= self.ranks[1])
        return time_N, (port_N > 0) & ~(measured_N & ~_outside(port_N, self.port))


def wire_bytes(op: str, bytes_N: ArrayLike, ranks: ArrayLike) -> Floats:
    """Bytes one rank sends in a uniform collective: `bytes*(n-1)/n`, twice that for all_reduce (ring)."""
    ranks_N, rounds = np.asarray(ranks, dtype=np.float64), 2.0 if op == "all_reduce" else 1.0
    return np.asarray(bytes_N, dtype=np.float64) * (ranks_N - 1) / ranks_N * rounds


def _outside(bytes_N: Floats, port: Port) -> Bools:
    return (bytes_N > 0) & ((bytes_N < port.valid_B[0]) | (bytes_N > port.valid_B[1]))


def pick_curve(curves: Sequence[CollectiveCurve], *, op: str, ranks: int) -> CollectiveCurve:
    """The curve of `op` measured at `ranks`, else the one measured nearest to it (ratio of rank counts).

    Raises ProfileError when no curve serves the op.
    """
    known = [curve for curve in curves if curve.op == op]
    if not known:
        raise ProfileError(f"no curve for {op} among {len(curves)} curves; calibrate or use another profile")
    return min(known, key=lambda curve: max(curve.ranks[0] / ranks, ranks / curve.ranks[1], 1.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """What every device sends and receives through: `link` inside its node, `nic` between nodes, if any."""

    link: Port
    nic: LinearPort | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PortLoads:
    """bytes_PNG, messages_PNG [4, ..., G] of the `PORTS`; largest_LNG [2, ..., G] of the link alone."""

    bytes_PNG: Floats
    messages_PNG: Floats
    largest_LNG: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class AllToAllTime:
    """Time of all-to-alls and the port that set each.

    time_s_N in all; link_s_N, nic_s_N busiest port of each tier; port_N index into `PORTS` and device_N its
    device (-1 where nothing is sent); extrapolated_N a port that sets the time is outside its measured bytes.
    """

    time_s_N: Floats
    link_s_N: Floats
    nic_s_N: Floats
    port_N: Ints
    device_N: Ints
    extrapolated_N: Bools

    def bottleneck(self, *index: int) -> str:
        """The busiest port of one case, as in "nic in of device 5"; "nothing sent" without traffic."""
        port = int(self.port_N[index])
        return "nothing sent" if port < 0 else f"{PORTS[port]} of device {int(self.device_N[index])}"


def all_to_all_time(
    traffic_NGG: ArrayLike,
    node_G: ArrayLike,
    ports: Ports,
    *,
    algorithm: Algorithm = "flat",
    node_traffic_NGM: ArrayLike | None = None,
) -> AllToAllTime:
    """Time of a skewed all-to-all: the busiest port of the busiest tier.

        t_tier = max over devices and directions of port(bytes, messages)
        t      = max(t_link, t_nic)      flat, forwarded: the tiers work at the same time
        t      = t_link + t_nic          hierarchical: one phase after the other

    flat: every pair directly (NCCL; DeepEP low latency, whose traffic holds one copy per chosen expert).
    hierarchical: first to the device of the own node with the destination's local index, then between equal
    indices. forwarded: one copy per destination node to the equal index there, then over the link (DeepEP
    normal). A combine is the dispatch backwards and loads the same ports: scale the dispatch matrices to its
    element bytes.

    Shapes: traffic_NGG [..., G, G] bytes from device to device (diagonal: local, free), node_G [G] node of
    each device, node_traffic_NGM [..., G, M] bytes from device to node, one copy per token and node
    (forwarded only; nodes in ascending order, own node free). Errors: InputError on shapes, negative bytes,
    traffic that needs a NIC that is not there, unequal nodes where indices are paired, node bytes the matrix
    cannot give.
    """
    loads = port_loads(traffic_NGG, node_G, algorithm=algorithm, node_traffic_NGM=node_traffic_NGM)
    nodes = np.asarray(node_G)
    local = int(np.unique(nodes, return_counts=True)[1].max())
    time_PNG = np.zeros_like(loads.bytes_PNG)
    outside_PNG = np.zeros(loads.bytes_PNG.shape, dtype=bool)
    for first, port, ranks in ((0, ports.link, local), (2, ports.nic, nodes.size)):
        tier = slice(first, first + 2)
        load_PNG = loads.bytes_PNG[tier]
        if port is not None:
            pattern = {"messages_N": loads.messages_PNG[tier], "largest_N": loads.largest_LNG}
            time_PNG[tier] = port.time_s(load_PNG, **pattern, ranks=ranks)
            outside_PNG[tier] = _outside(load_PNG, port)
        elif load_PNG.any():
            raise InputError("traffic crosses nodes but ports.nic is None; describe the NIC of the cluster")
    link_N, nic_N = time_PNG[:2].max(axis=(0, -1)), time_PNG[2:].max(axis=(0, -1))
    time_N = link_N + nic_N if algorithm == "hierarchical" else np.maximum(link_N, nic_N)
    tier_PN = (link_N, link_N, nic_N, nic_N) if algorithm == "hierarchical" else (time_N,) * 4
    time_NQ = np.moveaxis(time_PNG, 0, -2).reshape(*link_N.shape, 4 * nodes.size)
    busiest_N, sent_N = time_NQ.argmax(axis=-1), (link_N > 0) | (nic_N > 0)
    return AllToAllTime(
        time_s_N=time_N,
        link_s_N=link_N,
        nic_s_N=nic_N,
        port_N=np.where(sent_N, busiest_N // nodes.size, -1),
        device_N=np.where(sent_N, busiest_N % nodes.size, -1),
        extrapolated_N=np.any(outside_PNG & (time_PNG == np.stack(tier_PN)[..., None]), axis=(0, -1)),
    )


def port_loads(
    traffic_NGG: ArrayLike,
    node_G: ArrayLike,
    *,
    algorithm: Algorithm = "flat",
    node_traffic_NGM: ArrayLike | None = None,
) -> PortLoads:
    """Bytes, messages and largest message of every port; arguments and errors as in `all_to_all_time`.

    What leaves the ports of a tier enters the ports of that tier: the sums over out and in are equal.
    """
    traffic, nodes = np.asarray(traffic_NGG, dtype=np.float64), np.asarray(node_G)
    if nodes.ndim != 1 or not nodes.size or traffic.shape[-2:] != (nodes.size, nodes.size):
        raise InputError(f"traffic {traffic.shape}, node_G {nodes.shape}; pass [..., G, G] and [G]")
    if traffic.size and not (traffic.min() >= 0 and np.isfinite(traffic.max())):
        raise InputError(f"traffic of {traffic.min()} to {traffic.max()} bytes; pass finite bytes >= 0")
    if algorithm not in ("flat", "hierarchical", "forwarded"):
        raise InputError(f"algorithm {algorithm!r} is unknown; use flat, hierarchical or forwarded")
    if (node_traffic_NGM is not None) != (algorithm == "forwarded"):
        raise InputError(f"algorithm {algorithm!r}: pass node_traffic_NGM with forwarded, and only then")
    order = np.argsort(nodes, kind="stable")
    if np.any(np.diff(order) < 0):
        traffic = traffic[..., order[:, None], order]
    sizes = np.unique(nodes, return_counts=True)[1]
    if algorithm == "flat":
        loads = _flat_loads(traffic, sizes)
    elif np.any(sizes != sizes[0]):
        raise InputError(f"{algorithm} pairs equal local indices, but nodes have {sizes} devices; use flat")
    else:
        blocks = traffic.reshape(*traffic.shape[:-2], sizes.size, sizes[0], sizes.size, sizes[0])
        if algorithm == "hierarchical":
            link = blocks.sum(axis=-2)  # [..., M, D, D] to the local index of the destination
            nic = np.moveaxis(blocks.sum(axis=-3), -1, -3)  # [..., D, M, M] between equal indices
        else:
            link = np.swapaxes(blocks.sum(axis=-4), -3, -2)  # [..., M, D, D] from the index that received
            nic = np.swapaxes(_node_copies(node_traffic_NGM, blocks, order), -3, -2)  # [..., D, M, M]
        loads = _paired_loads(link, nic)
    back = np.argsort(order)
    bytes_PNG, messages_PNG, largest_LNG = (load[..., back] for load in loads)
    return PortLoads(bytes_PNG=bytes_PNG, messages_PNG=messages_PNG, largest_LNG=largest_LNG)


def _flat_loads(traffic: Floats, sizes: Ints) -> tuple[Floats, Floats, Floats]:
    """Loads when every pair exchanges directly; devices are sorted by node, `sizes` of them in each."""
    *lead, devices, _ = traffic.shape
    bytes_PNG, messages_PNG = np.zeros((2, 4, *lead, devices))
    largest_LNG = np.zeros((2, *lead, devices))
    remote = np.ones((devices, devices))
    for end, size in zip(np.cumsum(sizes), sizes, strict=True):
        own, peers = slice(end - size, end), 1.0 - np.eye(size)
        bytes_PNG[:2, ..., own], messages_PNG[:2, ..., own] = _sides(traffic[..., own, own], peers)
        largest_LNG[..., own] = _largest(traffic[..., own, own], peers)
        remote[own, own] = 0.0
    if sizes.size > 1:
        bytes_PNG[2:], messages_PNG[2:] = _sides(traffic, remote)
    return bytes_PNG, messages_PNG, largest_LNG


def _paired_loads(link: Floats, nic: Floats) -> tuple[Floats, Floats, Floats]:
    """Loads from traffic [..., M, D, D] inside nodes and [..., D, M, M] between equal local indices."""
    *lead, count, local, _ = link.shape
    peers, remote = 1.0 - np.eye(local), 1.0 - np.eye(count)
    link_SL, nic_SL = _sides(link, peers), np.swapaxes(_sides(nic, remote), -1, -2)
    shape = (2, *lead, count * local)
    bytes_PNG, messages_PNG = (
        np.concatenate([inside.reshape(shape), between.reshape(shape)]) for inside, between in zip(link_SL, nic_SL, strict=True)
    )
    return bytes_PNG, messages_PNG, _largest(link, peers).reshape(shape)


def _node_copies(node_traffic_NGM: ArrayLike | None, blocks: Floats, order: Ints) -> Floats:
    """Checked bytes [..., M, D, M] from device to node: from the largest to the sum of its devices'."""
    (*lead, count, local, _, _), copies = blocks.shape, np.asarray(node_traffic_NGM, dtype=np.float64)
    if copies.shape != (*lead, count * local, count):
        raise InputError(f"node_traffic {copies.shape}; pass {(*lead, count * local, count)}, device to node")
    copies = copies[..., order, :].reshape(*lead, count, local, count)
    most = reduce(np.maximum, np.moveaxis(blocks, -1, 0))  # max(axis=-1) is slow on short axes
    possible = (copies <= np.einsum("...d->...", blocks) * (1 + 1e-9)) & (copies >= most * (1 - 1e-9))
    impossible = ~possible & ~np.eye(count, dtype=bool)[:, None, :]
    if impossible.any():
        where = tuple(int(i) for i in np.argwhere(impossible)[0])
        fault = "is below the largest or above the sum of the bytes to that node's devices; count distinct (token, node) pairs"
        raise InputError(f"node_traffic={copies[where]:g} B at [..., node, local, node]={where} {fault}")
    return copies


def _sides(matrix: Floats, mask: Floats) -> Floats:
    """[2, 2, ..., G] bytes and messages, sent and received, of a matrix [..., G, G] where `mask` is 1."""
    sent = matrix > 0  # einsum with a mask: a masked copy of a large batch costs more than all the sums
    return np.stack([np.stack([np.einsum("...gh,gh->...g", each, mask), np.einsum("...gh,gh->...h", each, mask)]) for each in (matrix, sent)])


def _largest(matrix: Floats, mask: Floats) -> Floats:
    """[2, ..., G] largest message sent and received of a matrix [..., G, G] where `mask` [G, G] is 1."""
    largest = np.zeros((2, *matrix.shape[:-1]))
    for peer in range(matrix.shape[-1]):
        np.maximum(largest[0], matrix[..., :, peer] * mask[:, peer], out=largest[0])
        np.maximum(largest[1], matrix[..., peer, :] * mask[peer, :], out=largest[1])
    return largest


def collective(fitted: Fitted) -> CollectiveCurve | Ports:
    """The cost function of a profile's fitted collective.

    Form "protocols" gives a CollectiveCurve: `parameters` are the fields of ProtocolPort, `valid` has ranks,
    port_B. Form "ports" gives Ports: link_* and nic_* fields of two LinearPorts, `valid` has link_B and
    nic_B. Raises ProfileError naming what is missing or unknown.
    """
    form, op = fitted.attributes.get("form"), str(fitted.attributes.get("op"))
    values = fitted.parameters
    try:
        valid = {key: (float(low), float(high)) for key, (low, high) in fitted.valid.items()}
        if form == "protocols":
            fewest, most = valid["ranks"]
            port = ProtocolPort(**values, valid_B=valid["port_B"])
            return CollectiveCurve(name=fitted.name, op=op, port=port, ranks=(int(fewest), int(most)))
        if form == "ports":
            tiers: dict[str, dict[str, float]] = {"link": {}, "nic": {}}
            for key, value in values.items():
                tier, _, name = key.partition("_")
                tiers[tier][name] = value
            link, nic = (LinearPort(**tiers[tier], valid_B=valid[f"{tier}_B"]) for tier in tiers)
            return Ports(link=link, nic=nic)
    except (KeyError, TypeError, ValueError) as error:
        raise ProfileError(f"collective {fitted.name!r} {op}: {error}; write it as calibrated") from error
    raise ProfileError(f"collective {fitted.name!r} {op}: unknown form {form!r}; use protocols or ports")
