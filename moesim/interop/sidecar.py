"""`<file>.moesim.json`: what a placement format cannot carry, bound to the file by its digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from moesim.errors import PlanError
from moesim.files import read_json, validated, write_json

SCHEMA_VERSION = 1
RANKS = "rank ids follow the engine's expert-parallel group, not the host's device numbers"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sidecar:
    """The plan's name, model, dispatch rule, devices and origin; `draft_layers` rows of the file are no decoder layers."""

    format: str
    name: str
    model: str
    model_digest: str
    experts: int
    moe_layers: tuple[int, ...]
    decoder_layers: int
    draft_layers: int
    devices: int
    dispatch: str
    made_from: Mapping[str, Any]
    solution: Mapping[str, Any]


def sidecar_path(file: Path) -> Path:
    """Where the sidecar of `file` is."""
    return file.with_name(file.name + ".moesim.json")


def save_sidecar(file: Path, sidecar: Sidecar) -> Path:
    """Write it beside `file`, with the digest of `file` as it is now."""
    path = sidecar_path(file)
    values = {name: getattr(sidecar, name) for name in Sidecar.__dataclass_fields__}
    values |= {"moe_layers": list(sidecar.moe_layers), "made_from": dict(sidecar.made_from), "solution": dict(sidecar.solution)}
    write_json(path, {"schema_version": SCHEMA_VERSION, "kind": "sidecar", "file_sha256": _sha256(file), "ranks": RANKS, **values})
    return path


def load_sidecar(file: Path, format: str) -> Sidecar | None:
    """The sidecar of `file`, None if there is none.

    Raises PlanError when it is malformed, is of another format, or `file` was changed since: its dispatch rule and
    digests would then speak for another placement.
    """
    from pydantic import BaseModel, ConfigDict, Field

    class SidecarFile(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)
        schema_version: Literal[1]
        kind: Literal["sidecar"]
        file_sha256: str
        ranks: str
        format: str
        name: str
        model: str
        model_digest: str
        experts: Annotated[int, Field(ge=1, le=65535)]
        moe_layers: Annotated[list[Annotated[int, Field(ge=0, lt=65536)]], Field(min_length=1)]
        decoder_layers: Annotated[int, Field(ge=1, le=65536)]
        draft_layers: Annotated[int, Field(ge=0, le=64)]
        devices: Annotated[int, Field(ge=1)]
        dispatch: str
        made_from: dict[str, Any]
        solution: dict[str, Any]

    path = sidecar_path(file)
    if not path.exists() or not file.exists():
        return None
    parsed = validated(SidecarFile, read_json(path, PlanError), place=str(path), error=PlanError)
    if parsed.format != format:
        raise PlanError(f"{path}: describes a file of format {parsed.format!r}, not {format!r}; name the right format")
    if parsed.file_sha256 != _sha256(file):
        raise PlanError(
            f"{file}: was changed after it was exported, so {path.name} (dispatch rule, digests) no longer speaks for it; "
            "export again, or delete the sidecar and give --model and --devices"
        )
    values = parsed.model_dump(exclude={"schema_version", "kind", "file_sha256", "ranks"})
    return Sidecar(**(values | {"moe_layers": tuple(parsed.moe_layers)}))


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
