"""What a hardware file may say: pydantic models used only while reading TOML.

Every table with numbers names its `source` and its `confidence`; a single number may override them as
`{ value = "460 GB/s", source = "…", confidence = "…" }`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeFloat, PositiveInt, model_validator

from moesim.units import parse

Confidence = Literal["datasheet", "paper", "measured", "fitted", "empirical", "unverified", "assumed"]

MOST_DEVICES = 2**16  # a larger number is a mistake, and would fill the memory


def _quantity(unit: str) -> BeforeValidator:
    def convert(value: Any) -> Any:
        if isinstance(value, Mapping):
            if "value" not in value or "source" not in value or "confidence" not in value:
                raise ValueError("a number with its own provenance needs value, source and confidence")
            if extra := sorted(set(value) - {"value", "source", "confidence"}):
                raise ValueError(f"unknown keys {extra} beside value, source and confidence")
            if value["confidence"] not in Confidence.__args__:  # type: ignore[attr-defined]
                raise ValueError(f"confidence must be one of {', '.join(Confidence.__args__)}")  # type: ignore[attr-defined]
            value = value["value"]
        if not isinstance(value, (int, float, str)):
            raise ValueError(f"expected a quantity in {unit}")
        number = parse(value, unit)
        if number < 0:
            raise ValueError("must not be negative")
        return number

    return BeforeValidator(convert)


Bytes = Annotated[float, _quantity("B"), Field(gt=0)]
Bandwidth = Annotated[float, _quantity("B/s"), Field(gt=0)]
Rate = Annotated[float, _quantity("FLOP/s"), Field(gt=0)]
Seconds = Annotated[float, _quantity("s")]
Watts = Annotated[float, _quantity("W"), Field(gt=0)]
Dollars = Annotated[float, _quantity("$/h"), Field(gt=0)]


class Table(BaseModel):
    """A TOML table: unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Sourced(Table):
    """A table whose numbers come from somewhere."""

    source: str = Field(min_length=4)
    confidence: Confidence


class ComputeTable(Sourced):
    """Dense peaks per dtype (never sparse figures) and what shapes them."""

    flops: dict[Literal["fp32", "bf16", "fp16", "fp8", "int8", "fp4"], Rate] = Field(min_length=1)
    units: PositiveInt | None = None  # streaming multiprocessors, cores, DSP slices
    cache: Bytes | None = None  # last-level on-chip cache


class MemoryTable(Sourced):
    """One memory tier, fastest first in the file."""

    name: Literal["sram", "hbm", "gddr", "ddr", "lpddr", "cxl", "nvme"]
    capacity: Bytes
    bandwidth: Bandwidth
    channels: PositiveInt = 1


class PowerTable(Sourced):
    """Board power under load."""

    board: Watts


class PriceTable(Sourced):
    """Rent of one device."""

    rent: Dollars


class FittedTable(Sourced):
    """Parameters fitted to measurements, with what they were fitted on and how well."""

    name: str
    date: str
    parameters: dict[str, float | list[float]]
    residuals: dict[str, float]
    valid: dict[str, list[float | str]]


class KernelTable(FittedTable):
    """Expert-compute kernel of one dtype; parameters are those of cost/experts.py."""

    style: Literal["loop", "grouped", "fused"]
    dtype: Literal["fp32", "bf16", "fp16", "fp8", "fp8_block", "int8", "int4", "fp4"]
    framework: str = ""
    version: str = ""


class CollectiveTable(FittedTable):
    """Collective of one library; parameters are those of cost/collectives.py."""

    op: str
    form: str
    ranks: PositiveInt | None = None
    link: str = ""  # scale-up link it was measured on, if not the device's own


class DeviceFile(Table):
    """`hw_profiles/devices/<name>.toml`."""

    name: str
    title: str
    kind: Literal["gpu", "npu", "rdu", "fpga", "cpu"]
    compute: ComputeTable
    memories: list[MemoryTable] = Field(min_length=1)
    link: str = ""  # the scale-up port its kernels and collectives were measured with
    power: PowerTable | None = None
    price: PriceTable | None = None
    kernels: list[KernelTable] = []
    collectives: list[CollectiveTable] = []


class LinkTable(Sourced):
    """One port of a link: bandwidth per direction."""

    title: str
    bandwidth: Bandwidth
    latency: Seconds


class HostTable(Table):
    """What feeds the devices of a node: memories, fastest first, through one slot of kind `link` per device."""

    title: str
    memories: list[MemoryTable] = Field(min_length=1)
    link: str


class NodeTable(Table):
    """`repeat` equal nodes of `devices` devices on one switch (every device has one port to it).

    `nic` overrides the network's link for these nodes; `host` names a table of hosts.toml or of this file.
    """

    device: str
    devices: PositiveInt
    repeat: PositiveInt = 1
    link: str
    nic: str | None = None
    host: str | None = None


class EdgeTable(Table):
    """One more link between two places of the graph ("g0", "node1", "rail0", "spine"), such as a bridge of two devices."""

    between: tuple[str, str]
    link: str


class NetworkTable(Table):
    """Between nodes: every device has one NIC to its rail; leaves to spine carry 1/oversubscription of their ports."""

    link: str
    oversubscription: Annotated[NonNegativeFloat, Field(ge=1)] = 1.0


class ClusterFile(Table):
    """`hw_profiles/clusters/<name>.toml`."""

    name: str
    title: str
    nodes: list[NodeTable] = Field(min_length=1)
    network: NetworkTable | None = None
    links: dict[str, LinkTable] = {}
    hosts: dict[str, HostTable] = {}
    edges: list[EdgeTable] = []

    @model_validator(mode="after")
    def _connected(self) -> ClusterFile:
        if (devices := sum(node.repeat * node.devices for node in self.nodes)) > MOST_DEVICES:
            raise ValueError(f"{devices:,} devices in all; clusters of up to {MOST_DEVICES:,} are simulated")
        if self.network is None and sum(node.repeat for node in self.nodes) > 1:
            raise ValueError("several nodes need a [network] with a link between them")
        if self.network is None and any(node.nic for node in self.nodes):
            raise ValueError("nodes have a nic but there is no [network] it joins")
        return self
