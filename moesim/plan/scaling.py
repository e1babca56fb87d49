"""ScalingPlan: how many devices serve when, and what each change of size costs, as one JSON file.

Suffixes: N intervals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import PlanError
from moesim.files import check_output, digest, read_json, validated, write_json

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Resizing:
    """One change of size: when it is ordered, from and to how many devices, until the new size serves.

    pause_s seconds without intake, down_s without service; moved_B bytes between devices, loaded_B from disk or host.
    """

    at_s: float
    before: int
    after: int
    method: str
    seconds: float
    pause_s: float = 0.0
    down_s: float = 0.0
    moved_B: float = 0.0
    loaded_B: float = 0.0
    keeps_cache: bool = True


@dataclass(frozen=True, kw_only=True, eq=False)
class ScalingPlan:
    """Devices of every interval, and the changes between them.

    devices_N   int32, devices in use in each interval of `interval_s` seconds, from 0
    changes     one `Resizing` for each change of devices_N, at the start of its interval

    Raises PlanError when sizes are not whole numbers >= 1 or the changes are not those of devices_N.
    """

    name: str
    model: str
    model_digest: str
    interval_s: float
    devices_N: NDArray[np.int32]
    changes: tuple[Resizing, ...] = ()
    made_from: Mapping[str, Any] = field(default_factory=dict)
    solution: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        raw = np.asarray(self.devices_N)
        if raw.ndim != 1 or not raw.size or raw.dtype.kind not in "iu" or (raw < 1).any():
            raise PlanError(f"sizes {raw.dtype} {raw.shape}: expected a row of whole numbers >= 1, one for each interval")
        if not (math.isfinite(self.interval_s) and self.interval_s > 0):
            raise PlanError(f"interval_s={self.interval_s!r}: expected finite seconds > 0")
        devices = raw.astype(np.int32)
        devices.setflags(write=False)
        object.__setattr__(self, "devices_N", devices)
        turns = np.flatnonzero(np.diff(devices)) + 1
        expected = [(float(n * self.interval_s), int(devices[n - 1]), int(devices[n])) for n in turns]
        listed = [(change.at_s, change.before, change.after) for change in self.changes]
        same = len(listed) == len(expected) and all(
            math.isclose(a[0], b[0], rel_tol=1e-9, abs_tol=1e-9) and a[1:] == b[1:] for a, b in zip(listed, expected, strict=True)
        )
        if not same:
            raise PlanError(f"changes {listed[:4]} (at, from, to) are not those of the sizes, {expected[:4]}; list one for each")
        for change in self.changes:
            numbers = (change.seconds, change.pause_s, change.down_s, change.moved_B, change.loaded_B)
            if not all(math.isfinite(number) and number >= 0 for number in numbers):
                raise PlanError(f"change at {change.at_s:g} s: {numbers} must be finite numbers >= 0")

    @property
    def span_s(self) -> float:
        """Seconds that are planned."""
        return len(self.devices_N) * self.interval_s

    @property
    def digest(self) -> str:
        """Names the decision, whatever it was made from."""
        return digest(self.model_digest, repr(self.interval_s), self.devices_N.tobytes(), *(change.method for change in self.changes))

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the plan as JSON; OutputExists unless `force`."""
        target = check_output(Path(path), force=force)
        write_json(target, self.to_dict())
        return target

    def to_dict(self) -> dict[str, Any]:
        """The file's content, JSON-ready."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "scaling",
            "name": self.name,
            "model": {"name": self.model, "digest": self.model_digest},
            "interval_s": self.interval_s,
            "devices": self.devices_N.tolist(),
            "changes": [asdict(change) for change in self.changes],
            "made_from": dict(self.made_from),
            "solution": dict(self.solution),
        }


def load_scaling_plan(path: str | Path) -> ScalingPlan:
    """Read a scaling plan; PlanError lists every mistake with its path in the file."""
    from moesim.plan.schema import ScalingPlanFile

    file = Path(path)
    parsed = validated(ScalingPlanFile, read_json(file, PlanError), place=str(file), error=PlanError)
    try:
        return ScalingPlan(
            name=parsed.name,
            model=parsed.model.name,
            model_digest=parsed.model.digest,
            interval_s=parsed.interval_s,
            devices_N=np.asarray(parsed.devices, np.int64),
            changes=tuple(Resizing(**change.model_dump()) for change in parsed.changes),
            made_from=parsed.made_from,
            solution=parsed.solution,
        )
    except PlanError as problem:
        raise PlanError(f"{file}: {problem}") from None
