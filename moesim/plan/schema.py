"""What a plan file may say: pydantic models used only while reading JSON."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

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
