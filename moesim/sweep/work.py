"""What one worker does with one case: run it, and make a row of what came out, whatever happens."""

from __future__ import annotations

import math
import time
import traceback
from typing import Any

from moesim.errors import InputError, MoesimError
from moesim.sweep.fields import Fields, sources
from moesim.sweep.kinds import KINDS
from moesim.sweep.spec import Case

ROW_VERSION = 1
_TRACE_LINES = 6  # of a traceback, innermost last


def work(case: Case) -> dict[str, Any]:
    """Row of a case. Errors are recorded, never raised, so that one bad case does not end a sweep."""
    begin = time.perf_counter()
    try:
        row = _found(case)
    except MoesimError as problem:
        row = failed(case, f"{type(problem).__name__}: {problem}")
    except Exception as problem:
        lines = traceback.format_exception(problem)[-_TRACE_LINES:]
        row = failed(case, f"{type(problem).__name__}: {problem}", "".join(lines))
    return {**row, "seconds": round(time.perf_counter() - begin, 6)}


def failed(case: Case, error: str, where: str = "") -> dict[str, Any]:
    """Row of a case that failed: what was said, and where in the program if that was not on purpose."""
    return {**_head(case), "status": "failed", "figures": {}, "notes": [], "error": error, **({"traceback": where} if where else {})}


def _head(case: Case) -> dict[str, Any]:
    return {"version": ROW_VERSION, "case": case.id, "kind": case.kind, "fields": dict(case.fields), "content": dict(case.content)}


def _found(case: Case) -> dict[str, Any]:
    kind = KINDS[case.kind]
    fields = kind.fields.model_validate(dict(case.fields))
    _same_content(case, fields)
    found = kind.run(fields)
    figures, notes = {}, list(found.notes)
    for name, value in found.figures.items():
        finite = not isinstance(value, float) or math.isfinite(value)
        figures[name] = value if finite else None
        if not finite:
            notes.append(f"{name} is {value}, not a number")
    status = "infeasible" if found.infeasible else "ok"
    return {**_head(case), "status": status, "figures": figures, "notes": notes, "error": found.infeasible}


def _same_content(case: Case, fields: Fields) -> None:
    """InputError when a file this process sees is not the one the sweep was started with."""
    for name, source in sources(type(fields)):
        value = case.fields[name]
        if value is not None and (here := source.content(value)) != case.content[name]:
            there = f"{name} = {value!r} holds {here} here, {case.content[name]} where the sweep was started"
            raise InputError(f"{there}; give every worker the same files")
