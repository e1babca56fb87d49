"""What a plan file may say: pydantic models used only while reading JSON."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

SlotId = Annotated[int, Field(ge=-1, lt=2**31)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelEntry(_Table):
    """The model a plan is for."""

    name: str
    digest: str
    experts: Annotated[int, Field(ge=1, le=65535)]
    moe_layers: Annotated[list[int], Field(min_length=1)]


class PlanFile(_Table):
    """A placement plan."""

    schema_version: Literal[1]
    kind: Literal["placement"]
    name: str
    model: ModelEntry
    dispatch: str
    slots_per_device: Annotated[list[SlotId], Field(min_length=1)]
    slots: Annotated[list[list[SlotId]], Field(min_length=1)]
    made_from: dict[str, Any]
    solution: dict[str, Any]


class PrefetchEntry(_Table):
    """What is copied ahead."""

    name: Annotated[str, Field(min_length=1)]
    distance: Annotated[int, Field(ge=0, lt=2**16)]
    recall: Annotated[float, Field(ge=0, le=1)]


class CachePlanFile(_Table):
    """A cache plan: rows of `slots` are devices, those of `tiers` and `bits` experts."""

    schema_version: Literal[1]
    kind: Literal["cache"]
    name: str
    model: ModelEntry
    placement: str
    policy: Annotated[str, Field(min_length=1)]
    prefetch: PrefetchEntry
    slots: Annotated[list[list[Annotated[int, Field(ge=0, lt=2**16)]]], Field(min_length=1)]
    tiers: Annotated[list[list[Literal["hbm", "host", "nvme"]]], Field(min_length=1)]
    bits: Annotated[list[list[Annotated[float, Field(gt=0, le=64)]]], Field(min_length=1)]
    made_from: dict[str, Any]
    solution: dict[str, Any]

    @model_validator(mode="after")
    def _shapes(self) -> CachePlanFile:
        layers, experts = len(self.model.moe_layers), self.model.experts
        wrong = [f"$.{name} has {len(rows)} rows for {layers} MoE layers" for name, rows in self._rows() if len(rows) != layers]
        for name, rows in self._rows():
            width = len(self.slots[0]) if name == "slots" else experts
            if (i := next((i for i, row in enumerate(rows) if len(row) != width), None)) is not None:
                wrong.append(f"$.{name}[{i}] has {len(rows[i])} entries, expected {width}")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def _rows(self) -> list[tuple[str, list[list[Any]]]]:
        return [("slots", self.slots), ("tiers", self.tiers), ("bits", self.bits)]


class ScaledModelEntry(_Table):
    """The model that is scaled."""

    name: str
    digest: str


class ResizingEntry(_Table):
    """One change of size."""

    at_s: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    before: Annotated[int, Field(ge=1, lt=2**31)]
    after: Annotated[int, Field(ge=1, lt=2**31)]
    method: Annotated[str, Field(min_length=1)]
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    pause_s: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    down_s: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    moved_B: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    loaded_B: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    keeps_cache: bool


class ScalingPlanFile(_Table):
    """A scaling plan: devices of each interval."""

    schema_version: Literal[1]
    kind: Literal["scaling"]
    name: str
    model: ScaledModelEntry
    interval_s: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    devices: Annotated[list[Annotated[int, Field(ge=1, lt=2**31)]], Field(min_length=1)]
    changes: list[ResizingEntry]
    made_from: dict[str, Any]
    solution: dict[str, Any]
