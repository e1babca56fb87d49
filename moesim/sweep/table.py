"""Rows as a table, and as the document that `moesim report` draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.errors import InputError
from moesim.sweep.kinds import KINDS, Kind
from moesim.sweep.spec import Spec

if TYPE_CHECKING:
    import pandas as pd

RESULTS, DOCUMENT = "results.csv", "result.json"


def results(folder: str | Path) -> pd.DataFrame:
    """The table of a sweep that ran in `folder`, one row per case; InputError when there is none."""
    import pandas as pd

    path = Path(folder) / RESULTS
    if not path.exists():
        raise InputError(f"{path}: no such file; run `moesim sweep SPEC -o {folder}` to its end first")
    return pd.read_csv(path)


def frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per case, in the order given: id, status, fields, figures, remarks in one text. No timings: same cases, same bytes."""
    import pandas as pd

    table = []
    for row in rows:
        told = {"notes": " · ".join(row["notes"]), "error": row["error"]}
        table.append({"case": row["case"], "status": row["status"], **row["fields"], **row["figures"], **told})
    return pd.DataFrame(table)


def contests(spec: Spec, rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Rows that have the kind's first figure, best first, those under equal conditions together, in the order of the spec."""
    kind = KINDS[spec.kind]
    conditions, figure = [name for name in spec.axes if name not in kind.choices], kind.figures[0]
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["status"] == "ok" and row["figures"].get(figure.name) is not None:
            groups.setdefault(tuple(row["fields"][name] for name in conditions), []).append(row)
    return [sorted(group, key=lambda row: row["figures"][figure.name] * (1 if figure.less else -1)) for group in groups.values()]


def concluded(kind: Kind, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What follows from the cases, for the one kind from which something does."""
    if kind.name != "capacity":
        return {}
    from moesim.sweep.conclude import conclude

    return conclude(kind, rows)


def document(spec: Spec, rows: Sequence[Mapping[str, Any]], created: str) -> dict[str, Any]:
    """Document of a finished sweep for `moesim report`."""
    kind, found = KINDS[spec.kind], concluded(KINDS[spec.kind], rows)
    common = {name: value for name, value in spec.cases[0].fields.items() if name not in spec.axes and value is not None}
    return {
        "schema_version": 1,
        "title": spec.title or f"{len(rows):,} cases",
        "created": created,
        "sweep": {
            "kind": spec.kind,
            "says": kind.says,
            "axes": list(spec.axes),
            "choices": [name for name in kind.choices if name in spec.axes],
            "common": common,
            "figures": [{"name": f.name, "label": f.label, "unit": f.unit, "less": f.less} for f in kind.figures],
            "cases": [
                {
                    "case": row["case"],
                    "status": row["status"],
                    "values": {name: row["fields"][name] for name in spec.axes},
                    "figures": {figure.name: row["figures"].get(figure.name) for figure in kind.figures},
                    "error": row["error"],
                }
                for row in rows
            ],
        },
        **found,
        "notes": list(dict.fromkeys([*found.get("notes", ()), *(note for row in rows for note in row["notes"])])),
    }
