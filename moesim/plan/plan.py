"""Plan: a placement with what it was made from, as one JSON file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import PlanError
from moesim.files import check_output, digest, read_json, validated, write_json
from moesim.model import ModelSpec
from moesim.plan.placement import Placement

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """A named placement for one model and device count.

    `made_from` names the inputs by digest (trace, selection, cluster), the solver, its seed and versions; `solution`
    holds the solver's objective, bound, gap, status and seconds.
    """

    name: str
    model: str
    model_digest: str
    placement: Placement
    made_from: Mapping[str, Any] = field(default_factory=dict)
    solution: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Names the decision, whatever it was made from."""
        p = self.placement
        return digest(self.model_digest, p.slots_LP.tobytes(), p.slots_G.tobytes(), p.dispatch)

    def check_fits(self, model: ModelSpec, devices: int, *, place: str = "plan") -> None:
        """Raise PlanError unless the plan is for this model's shape and this number of devices."""
        if self.model_digest != model.digest:
            p = self.placement
            raise PlanError(
                f"{place}: made for {self.model!r} ({len(p.layers)} MoE layers x {p.experts} experts), not for {model.name!r} "
                f"({len(model.moe_layers)} x {model.experts}); make a plan from this model's trace"
            )
        if self.placement.devices != devices:
            raise PlanError(f"{place}: made for {self.placement.devices} devices, the cluster has {devices}; choose another cluster or plan again")

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the plan as JSON; OutputExists unless `force`."""
        target, p = check_output(Path(path), force=force), self.placement
        write_json(
            target,
            {
                "schema_version": SCHEMA_VERSION,
                "kind": "placement",
                "name": self.name,
                "model": {"name": self.model, "digest": self.model_digest, "experts": p.experts, "moe_layers": list(p.layers)},
                "dispatch": p.dispatch,
                "slots_per_device": p.slots_G.tolist(),
                "slots": p.slots_LP.tolist(),
                "made_from": dict(self.made_from),
                "solution": dict(self.solution),
            },
        )
        return target


def load_plan(path: str | Path) -> Plan:
    """Read a plan; PlanError lists every mistake with its path in the file."""
    from moesim.plan.schema import PlanFile

    file = Path(path)
    parsed = validated(PlanFile, read_json(file, PlanError), place=str(file), error=PlanError)
    try:
        if len({len(row) for row in parsed.slots}) > 1:
            raise PlanError(f"$.slots: rows have {sorted({len(row) for row in parsed.slots})} slots; every layer needs the same number")
        placement = Placement(
            slots_LP=np.asarray(parsed.slots, np.int64),
            slots_G=np.asarray(parsed.slots_per_device, np.int64),
            experts=parsed.model.experts,
            layers=tuple(parsed.model.moe_layers),
            dispatch=parsed.dispatch,
        )
    except PlanError as problem:
        raise PlanError(f"{file}: {problem}") from None
    return Plan(
        name=parsed.name,
        model=parsed.model.name,
        model_digest=parsed.model.digest,
        placement=placement,
        made_from=parsed.made_from,
        solution=parsed.solution,
    )
