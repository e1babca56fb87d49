"""What follows from the cases of a capacity sweep: the deployment to buy, and a closer look at it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moesim.sweep import shelf
from moesim.sweep.closer import one_step, placements, scaled
from moesim.sweep.kinds.base import Kind
from moesim.sweep.kinds.capacity import CapacityFields, deployment_of, requests_of, served

Row = Mapping[str, Any]
NEUTRAL = {"traffic": 1.0, "bandwidth": 1.0, "skew": None}  # conditions as they are, where a spec has them
RATE_BINS = 120
IN_ORDER = "linear"  # the solver that places experts as a deployment without one has them


def conclude(kind: Kind, rows: Sequence[Row]) -> dict[str, Any]:
    """Parts of a document: `capacity`, and of the chosen deployment how it serves, the load and traffic of its devices, its way of
    placing experts against others, and its size over time.

    Chosen is, under conditions as they are, the cheapest that keeps the SLO (the fewest devices, where prices are not known).
    """
    from moesim.serving import Slo

    sound = [row for row in rows if row["status"] == "ok"]
    if not sound:
        return {}
    baseline = baseline_of(kind, sound)
    offers = [row for row in sound if all(row["fields"][name] == value for name, value in baseline.items())]
    priced = all(row["figures"]["price_per_hour"] is not None for row in offers)
    keeping = [row for row in offers if row["figures"]["meets_slo"]]
    chosen = min(keeping, key=lambda row: (row["figures"]["price_per_hour" if priced else "devices"], -row["figures"]["attainment"]), default=None)
    shown = chosen or max(offers, key=lambda row: row["figures"]["attainment"])
    fields = CapacityFields.model_validate(dict(shown["fields"]))
    requests = requests_of(fields)
    bin_s = max(1e-9, requests.span_s / RATE_BINS)
    slo = Slo.parse(fields.slo)
    compared, remarks = placements(fields)
    scaling, unscaled = scaled(fields) if chosen else (None, "no deployment keeps the objective")
    return {
        "capacity": {
            "slo": str(slo),
            "share": slo.share,
            "baseline": baseline,
            "chosen": chosen["case"] if chosen else None,
            "priced": priced,
            "requests": len(requests),
            "span_s": requests.span_s,
            "rate_bin_s": bin_s,
            "rate_per_s": requests.per_second(bin_s).tolist(),
            "prompt_tokens": float(requests.prompt_R.mean()),
            "output_tokens": float(requests.output_R.mean()),
            "devices": list(dict.fromkeys(device.name for device in deployment_of(fields).cluster.devices)),
            "placed_by": fields.solver or (shelf.plan_at(fields.plan).name if fields.plan else IN_ORDER),
            "unscaled": unscaled,
        },
        "serving": [served(fields).to_dict(requests=False)],
        "results": one_step(fields),
        "comparison": compared,
        "scaling": scaling,
        "notes": remarks,
    }


def baseline_of(kind: Kind, rows: Sequence[Row]) -> dict[str, Any]:
    """Conditions as they are: the neutral value where a row has it, else that of the first row; equal conditions are left out."""
    first, found = rows[0]["fields"], {}
    for name in first:
        if name in kind.choices or all(row["fields"][name] == first[name] for row in rows):
            continue
        neutral = NEUTRAL.get(name, first[name])
        found[name] = neutral if any(row["fields"][name] == neutral for row in rows) else first[name]
    return found
