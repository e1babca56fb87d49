"""What a document for a report may hold: the file edge of the report room. Unknown keys are left alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pydantic import Field, JsonValue, model_validator

from moesim.report.cache_parts import CachingPart
from moesim.report.measured_parts import Validation
from moesim.report.parts import CapacityPart, Part, ScalingPart, ServingPart, SweepPart

Row = list[float]
KINDS = ("held-out", "cross-domain", "in-sample")  # strongest evidence first


class Machine(Part):
    """Where the figures were made."""

    cpu: str | None = None
    cores: int | None = None
    memory_B: float | None = None
    gpu: str | None = None
    system: str | None = None


class Training(Part):
    """A model trained before its routing was recorded; `loss` per step, `domains` bytes of text of each domain."""

    model: str
    parameters: int
    steps: int
    loss: list[float]
    domains: dict[str, int]
    seconds: float | None = None


class PairPart(Part):
    """Two experts of a layer that tokens choose together."""

    layer: int
    experts: tuple[int, int]
    tokens: int
    lift: float


class LocalityPart(Part):
    """`moesim.trace.locality.Locality.to_dict()`, figures of the whole model; null where no sequence is long enough."""

    windows: list[int]
    segments: list[int]
    rhos: list[int]
    srp: list[float | None]
    srp_interval: list[tuple[float | None, float | None]]
    sch: list[list[float | None]]
    sequences: int
    cached_tokens: int

    @model_validator(mode="after")
    def _shapes(self) -> LocalityPart:
        _long("srp", self.srp, len(self.windows))
        _long("srp_interval", self.srp_interval, len(self.windows))
        _long("sch", self.sch, len(self.segments))
        for row in self.sch:
            _long("a row of sch", row, len(self.rhos))
        return self


class InspectionPart(Part):
    """`moesim.trace.inspect.Inspection.to_dict()`."""

    model: str
    tokens: int
    layers: list[int] = Field(min_length=1)
    experts: int
    top_k: int
    skew: list[float]
    unused_experts: list[int]
    affinity_bits: list[float]
    domains: list[str]
    domain_drift_bits: list[Row]
    step_edges: list[int]
    step_drift_bits: list[Row]
    empty_selections: int
    repeated_share: float
    load: list[Row]
    coactivation: list[PairPart] = []
    locality: LocalityPart | None = None

    @model_validator(mode="after")
    def _shapes(self) -> InspectionPart:
        layers = len(self.layers)
        _sized("load", self.load, layers, self.experts)
        _sized("domain_drift_bits", self.domain_drift_bits, len(self.domains), len(self.domains))
        _sized("step_drift_bits", self.step_drift_bits, None, layers)
        _long("skew", self.skew, layers)
        _long("unused_experts", self.unused_experts, layers)
        _long("affinity_bits", self.affinity_bits, layers - 1)
        _long("step_edges", self.step_edges, len(self.step_drift_bits) + 1 if self.step_drift_bits else len(self.step_edges))
        return self


class Summary(Part):
    """`moesim.result.Result.summary()`: the figures people compare."""

    name: str
    engine: str
    max_load_ratio: float
    worst_layer_load_ratio: float
    fanout_devices: float
    fanout_nodes: float
    a2a_bytes: float
    layer_time_s: float = Field(gt=0)
    dispatch_s: float
    compute_s: float
    combine_s: float
    step_time_s: float
    tokens_per_s: float


class ScoredPart(Part):
    """Plans scored on one set of tokens."""

    label: str
    kind: Literal["in-sample", "held-out", "cross-domain"]
    tokens: int
    plans: list[Summary] = Field(min_length=1)


class SolutionPart(Part):
    """What a solver said about its own answer; infeasible ones have no objective."""

    name: str
    status: str
    seconds: float | None = None
    objective: float | None = None
    bound: float | None = None
    gap: float | None = None


class Comparison(Part):
    """Several plans on several sets of tokens."""

    cluster: str
    cluster_title: str | None = None
    learnt_from: str
    tokens_per_device: int
    scored_on: list[ScoredPart] = Field(min_length=1)
    solutions: list[SolutionPart] = []


class ResultPart(Part):
    """`moesim.result.Result.to_dict()`."""

    model: str
    cluster: str
    steps: int
    tokens_per_step: float
    summary: Summary
    layers: list[int] = Field(min_length=1)
    layer_s: list[float]
    device_tokens: list[Row]
    traffic_B: list[Row]
    load_ratio: list[float]
    bottlenecks: dict[str, int] = {}
    notes: list[str] = []
    inputs: dict[str, JsonValue] = {}

    @model_validator(mode="after")
    def _shapes(self) -> ResultPart:
        layers, devices = len(self.layers), len(self.traffic_B)
        _long("layer_s", self.layer_s, layers)
        _long("load_ratio", self.load_ratio, layers)
        _sized("device_tokens", self.device_tokens, layers, devices)
        _sized("traffic_B", self.traffic_B, devices, devices)
        return self


class Document(Part):
    """One document: provenance, and any of the sections."""

    schema_version: Literal[1]
    title: str | None = None
    created: str | None = None
    command: str | list[str] | None = None
    versions: dict[str, str] = {}
    machine: Machine | None = None
    notes: list[str] = []
    training: Training | None = None
    inspection: InspectionPart | None = None
    comparison: Comparison | None = None
    results: list[ResultPart] = []
    validation: Validation | None = None
    caching: CachingPart | None = None
    sweep: SweepPart | None = None
    capacity: CapacityPart | None = None
    serving: list[ServingPart] = []
    scaling: ScalingPart | None = None

    @model_validator(mode="after")
    def _cases(self) -> Document:
        if self.capacity and not self.sweep:
            raise ValueError("capacity without the sweep whose cases it speaks of")
        return self


SECTIONS = ("training", "inspection", "comparison", "results", "validation", "caching", "sweep", "capacity", "serving", "scaling")


def _long(name: str, values: Sequence[Any], length: int) -> None:
    if len(values) != length:
        raise ValueError(f"{name} has {len(values)} entries, expected {length}")


def _sized(name: str, rows: Sequence[Sequence[float]], height: int | None, width: int) -> None:
    if height is not None:
        _long(name, rows, height)
    wrong: Iterable[int] = (i for i, row in enumerate(rows) if len(row) != width)
    if (i := next(iter(wrong), None)) is not None:
        raise ValueError(f"{name}[{i}] has {len(rows[i])} entries, expected {width}")
