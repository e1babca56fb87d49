"""Parts of documents about many cases, and about serving over time."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator


class Part(BaseModel):
    """A piece of a document: immutable, finite numbers only."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, extra="ignore")


class FigurePart(Part):
    """A figure that the cases of a sweep are compared by; `less` of it is better, or more. Unit "%": a share."""

    name: str
    label: str
    unit: str = ""
    less: bool = True


class CasePart(Part):
    """One case of a sweep: the values in which cases differ, and what it found."""

    case: str
    status: Literal["ok", "infeasible", "failed"]
    values: dict[str, JsonValue]
    figures: dict[str, float | None] = {}
    error: str = ""


class SweepPart(Part):
    """Cases of a sweep. `choices` are the axes one decides on, the other axes are conditions; `common` is equal in all cases."""

    kind: str
    says: str = ""
    axes: list[str]
    choices: list[str] = []
    common: dict[str, JsonValue] = {}
    figures: list[FigurePart] = Field(min_length=1)
    cases: list[CasePart] = Field(min_length=1)

    @model_validator(mode="after")
    def _axes(self) -> SweepPart:
        for i, case in enumerate(self.cases):
            if list(case.values) != self.axes:
                raise ValueError(f"cases[{i}].values are {list(case.values)}, the axes are {self.axes}")
        return self


class CapacityPart(Part):
    """Which deployment to buy: the sweep's cases under `baseline` conditions, the cheapest that keeps the SLO among them.

    `rate_per_s` are requests per second in intervals of `rate_bin_s`. `devices` are those of the chosen deployment, `placed_by` the plan of its
    experts among those compared, `unscaled` why no scaling was planned for it.
    """

    slo: str
    share: float
    baseline: dict[str, JsonValue]
    chosen: str | None
    priced: bool
    requests: int
    span_s: float
    rate_bin_s: float = Field(gt=0)
    rate_per_s: list[float]
    prompt_tokens: float
    output_tokens: float
    devices: list[str] = []
    placed_by: str | None = None
    unscaled: str = ""


class SeriesPart(Part):
    """Means over intervals of `bin_s` seconds."""

    bin_s: float = Field(gt=0)
    waiting: list[float]
    running: list[float]
    cache: list[float]
    output_tokens_per_s: list[float]


class SpreadPart(Part):
    """Mean and percentiles of seconds; null where nothing was served."""

    mean: float | None
    p50: float | None
    p99: float | None


class ServedPart(Part):
    """`moesim.serving.ServingResult.summary()`, what is shown of it."""

    name: str = "deployment"
    requests: int
    served: int
    attainment: float
    meets_slo: bool
    ttft_s: SpreadPart
    tpot_s: SpreadPart
    latency_s: SpreadPart
    requests_per_s: float | None = None
    output_tokens_per_s: float | None = None
    utilisation: float | None = None
    sent_back: int = 0
    device_hours: float | None = None


class TurnPart(Part):
    """A change of the deployment while it served."""

    at_s: float
    kind: str = ""


class AgainstPart(Part):
    """A statistic of a quantity (ttft, tpot, latency), simulated and as a real engine had it; error = simulated / measured - 1."""

    quantity: str
    statistic: str
    simulated_s: float
    measured_s: float
    error: float


class ServingPart(Part):
    """`moesim.serving.ServingResult.to_dict()`, and how a real engine served the same requests, where that was measured."""

    summary: ServedPart
    slo: dict[str, float | None] | None = None
    step_parts_s: dict[str, float] = {}
    series: SeriesPart
    changes: list[TurnPart] = []
    measured: list[AgainstPart] = []
    notes: list[str] = []
    inputs: dict[str, JsonValue] = {}


class IntervalPart(Part):
    """One interval of a scaling plan."""

    start_s: float
    demand_per_s: float
    devices: int
    capacity_per_s: float
    attainment: float | None = None


class ResizingPart(Part):
    """One change of size."""

    at_s: float
    before: int
    after: int
    method: str
    seconds: float
    pause_s: float = 0.0
    down_s: float = 0.0
    moved_B: float = 0.0
    loaded_B: float = 0.0


class EventPart(ResizingPart):
    """A change of size as it was served, in intervals of `bin_s` from `start_s`; `slowest_first_s` of the requests that arrive in each."""

    start_s: float
    bin_s: float = Field(gt=0)
    waiting: list[float] = Field(min_length=1)
    running: list[float]
    slowest_first_s: list[float | None]
    limit_s: float | None = None

    @model_validator(mode="after")
    def _lengths(self) -> EventPart:
        if len({len(self.waiting), len(self.running), len(self.slowest_first_s)}) > 1:
            raise ValueError("waiting, running and slowest_first_s differ in length")
        return self


class ScalingPlanPart(Part):
    """What is shown of `moesim.plan.ScalingPlan.to_dict()`."""

    name: str
    interval_s: float = Field(gt=0)
    changes: list[ResizingPart] = []
    made_from: dict[str, JsonValue] = {}


class BillPart(Part):
    """What a policy costs."""

    total: float
    rent: float
    attainment: float
    device_hours: float
    changes: int


class OutlookPart(Part):
    """The plan served as it is, or what if."""

    case: str
    served: ServedPart
    bill: BillPart


class ScalingPart(Part):
    """`moesim.optimize.scale.Scaling.to_dict()`; of each of `instances`, where there are several."""

    plan: ScalingPlanPart
    currency: str
    solvers: dict[str, BillPart]
    timeline: list[IntervalPart] = Field(min_length=1)
    outlooks: list[OutlookPart] = []
    instances: int = Field(default=1, ge=1)
    event: EventPart | None = None
    notes: list[str] = []
