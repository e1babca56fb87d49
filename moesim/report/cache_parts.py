"""What a caching section of a document may hold: the JSON of `moesim cache --result`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from moesim.report.parts import Part

Row = list[float]


class CacheSummary(Part):
    """`moesim.optimize.cache_score.CacheScore.summary()`; bytes and seconds of a mean step."""

    name: str
    hit_ratio: float = Field(ge=0, le=1)
    stall_s: float
    step_s: float = Field(gt=0)
    base_s: float
    demand_B: float
    ahead_B: float
    wrong_B: float


class CacheScored(Part):
    """A plan, and equal slots, on one set of tokens."""

    label: str
    kind: Literal["in-sample", "held-out"]
    tokens: int
    steps: int
    plan: CacheSummary
    equal: CacheSummary | None = None


class CacheCurves(Part):
    """Miss ratio of every policy with `slots` in every layer of every device, and by layer under the plan's policy."""

    tokens: int
    slots: list[int] = Field(min_length=1)
    miss_ratio: dict[str, Row] = Field(min_length=1)
    by_layer: list[Row]

    @model_validator(mode="after")
    def _shapes(self) -> CacheCurves:
        rows = {**{f"miss_ratio.{name}": row for name, row in self.miss_ratio.items()}, **{f"by_layer[{i}]": r for i, r in enumerate(self.by_layer)}}
        for name, row in rows.items():
            if len(row) != len(self.slots):
                raise ValueError(f"{name} has {len(row)} entries, expected {len(self.slots)}")
        return self


class CachePrefetch(Part):
    """What is copied ahead."""

    name: str
    distance: int
    recall: float


class CacheEvents(Part):
    """Some of the judged steps by the event engine."""

    steps: int
    closed_stall_s: float
    stall_s: float
    error: float


class CachingPart(Part):
    """`moesim.optimize.cache_study.study_cache`."""

    model: str
    cluster: str
    solver: str
    status: str
    seconds: float
    tokens_per_device: int
    policy: str
    prefetch: CachePrefetch
    expert_B: float
    budget_B: Row
    held_B: Row
    all_B: Row
    tiers: dict[str, int]
    bits: dict[str, int]
    layers: list[int] = Field(min_length=1)
    experts: int
    slots: list[list[int]]
    pinned: list[list[int]]
    loss: float = 0.0
    scored: list[CacheScored] = Field(min_length=1)
    curves: CacheCurves
    event: CacheEvents | None = None

    @model_validator(mode="after")
    def _shapes(self) -> CachingPart:
        layers, devices = len(self.layers), len(self.budget_B)
        for name, rows in (("slots", self.slots), ("pinned", self.pinned)):
            if len(rows) != layers:
                raise ValueError(f"{name} has {len(rows)} entries, expected {layers}")
            if (i := next((i for i, row in enumerate(rows) if len(row) != devices), None)) is not None:
                raise ValueError(f"{name}[{i}] has {len(rows[i])} entries, expected {devices}")
        if self.policy not in self.curves.miss_ratio:
            raise ValueError(f"curves lack the plan's policy {self.policy!r}")
        return self
