"""Types of a case's values. A value that stands for a file names its content, so that a case is what it was made from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from moesim.errors import InputError
from moesim.files import digest
from moesim.sweep import shelf
from moesim.units import parse

_PROCESS = re.compile(r"[a-z]+:\w+=")  # a text that describes arrivals, instead of a path


class Fields(BaseModel):
    """Values of one case. Frozen, no unknown keys, no conversions but from text with a unit."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """In a field's annotation: `content` names what a value stands for, or raises InputError; `is_path` says which values are paths."""

    content: Callable[[str], str]
    is_path: Callable[[str], bool]

    def resolve(self, value: str, root: Path) -> str:
        """The value; a relative path made absolute from `root`, the folder of the spec."""
        return str((root / value).resolve()) if self.is_path(value) else value


@cache
def sources(fields: type[Fields]) -> tuple[tuple[str, Source], ...]:
    """Names of the fields that stand for something else, with their Source."""
    return tuple(
        (name, part) for name, info in fields.model_fields.items() for part in (*info.metadata, *_inner(info.annotation)) if isinstance(part, Source)
    )


def _inner(annotation: Any) -> list[Any]:
    """Metadata of the alternatives of `Annotated[…] | None`."""
    return [part for choice in getattr(annotation, "__args__", ()) for part in getattr(choice, "__metadata__", ())]


def quantity(unit: str) -> BeforeValidator:
    """A number in base `unit`, or text such as "80 GiB"."""
    return BeforeValidator(lambda value: parse(value, unit))


def _solver(name: str) -> str:
    from moesim.optimize import load_solver

    if (solves := load_solver(name).solves) != "placement":
        raise InputError(f"solver {name!r} solves {solves}, not placement; see `moesim solvers`")
    return name


def _policy(name: str) -> str:
    from moesim.replay import load_policy

    load_policy(name)
    return name


def _system(name: str) -> str:
    from moesim.systems import SYSTEMS

    if name not in SYSTEMS:
        raise InputError(f"system {name!r} is unknown; use one of {', '.join(sorted(SYSTEMS))}")
    return name


def _slo(text: str) -> str:
    from moesim.serving import Slo

    return str(Slo.parse(text))


def _model(name: str) -> str:
    """Names all of a model but its name: its own digest leaves out what routing does not depend on."""
    return digest(json.dumps(shelf.model(name).to_dict() | {"name": "", "source": ""}, sort_keys=True))


def _always(value: str) -> bool:
    return True


def _never(value: str) -> bool:
    return False


TracePath = Annotated[str, Source(content=lambda path: shelf.whole(path).digest, is_path=_always)]
PlanPath = Annotated[str, Source(content=lambda path: shelf.plan_at(path).digest, is_path=_always)]
ClusterName = Annotated[str, Source(content=lambda name: shelf.cluster(name).digest, is_path=lambda name: name.endswith(".toml"))]
SolverName = Annotated[str, Source(content=_solver, is_path=_never)]
PolicyName = Annotated[str, Source(content=_policy, is_path=_never)]
SystemName = Annotated[str, Source(content=_system, is_path=_never)]
ArrivalsText = Annotated[str, Source(content=lambda text: shelf.arrivals(text, 0).digest, is_path=lambda text: not _PROCESS.match(text))]
ModelName = Annotated[str, Source(content=_model, is_path=lambda name: name.endswith(".json"))]
SloText = Annotated[str, Source(content=_slo, is_path=_never)]
Range = Annotated[str, Field(pattern=r"^[\d.%\s]*:[\d.%\s]*$")]
Share = Annotated[float, Field(ge=0, le=1), quantity("1")]
Times = Annotated[float, Field(gt=0, le=1000), quantity("1")]
Seconds = Annotated[float, Field(gt=0), quantity("s")]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
