"""The sweep: cases that are not in the journal yet are done, and each is kept as soon as it is."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.files import write_json, write_text
from moesim.sweep.crew import Crew, Died
from moesim.sweep.journal import Journal, read_rows
from moesim.sweep.spec import Case, Spec
from moesim.sweep.table import DOCUMENT, RESULTS, document, frame
from moesim.sweep.work import failed, work

Progress = Callable[[float, str], None]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished sweep: one row per case, in the order of the spec, and how many of them were there before."""

    rows: tuple[dict[str, Any], ...]
    kept: int
    damaged: tuple[str, ...]

    def count(self, status: str) -> int:
        """Cases that ended `ok`, `infeasible` or `failed`."""
        return sum(row["status"] == status for row in self.rows)


def sweep(spec: Spec, folder: str | Path, crew: Crew, *, progress: Progress = lambda share, what: None) -> Outcome:
    """Do every case of `spec` that `folder` does not hold yet, and write results.csv and result.json beside the journal.

    A run may be killed at any moment: the next one goes on with what is missing. Failed cases are tried again; cases of the
    folder that the spec does not have are left alone. Raises InputError when the folder is not a sweep's or in use.
    """
    where = Path(folder)
    wanted = {case.id: case for case in spec.cases}
    with Journal(where) as journal:
        damaged: list[str] = []
        done = {row["case"]: row for row in read_rows(where, damaged) if row["case"] in wanted and row["status"] != "failed"}
        kept = len(done)
        missing = [case for id_, case in wanted.items() if id_ not in done]
        failures = 0
        progress(kept / len(wanted), f"{kept:,} of {len(wanted):,}")
        with closing(crew.run(work, missing)) if missing else nullcontext(()) as finished:  # type: ignore[type-var]
            for case, value in finished:
                row = _deadly(case, value.tries) if isinstance(value, Died) else value
                journal.append([row])
                done[case.id] = row
                failures += row["status"] == "failed"
                progress(len(done) / len(wanted), f"{len(done):,} of {len(wanted):,}" + (f", {failures:,} failed" if failures else ""))
        rows = tuple(done[id_] for id_ in wanted)
        progress(1.0, "concluding")
        write_text(where / RESULTS, frame(rows).to_csv(index=False))
        write_json(where / DOCUMENT, document(spec, rows, datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")))
    return Outcome(rows=rows, kept=kept, damaged=tuple(damaged))


def _deadly(case: Case, tries: int) -> dict[str, Any]:
    error = f"every one of {tries} workers died of it: killed, out of memory, or crashed; give fewer workers or more memory"
    return {**failed(case, error), "seconds": None}
