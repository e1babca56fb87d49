"""What a file of placement rules may say: pydantic models used only while reading JSON."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Whole = Annotated[int, Field(ge=0, lt=2**31)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class PinEntry(_Table):
    """Experts that one device must hold; in these layers, else in all."""

    experts: Annotated[list[Whole], Field(min_length=1)]
    device: Whole
    layers: Annotated[list[Whole], Field(min_length=1)] | None = None


class ApartEntry(_Table):
    """Experts of which no device may hold two; in these layers, else in all."""

    experts: Annotated[list[Whole], Field(min_length=2)]
    layers: Annotated[list[Whole], Field(min_length=1)] | None = None


class RulesFile(_Table):
    """Pins and sets kept apart."""

    schema_version: Literal[1] = 1
    pinned: list[PinEntry] = Field(default_factory=list)
    apart: list[ApartEntry] = Field(default_factory=list)
