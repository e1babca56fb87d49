"""Sweeps: many cases from one spec file, on local processes or a Dask cluster, kept as they finish.

spec.py      the file edge: what a spec may say, and the cases it stands for
fields.py    types of a case's values, with how their content is named
kinds/       what a case can do, one file each
shelf.py     what a process has opened: traces, clusters, costs, plans
work.py      one case to one row, whatever happens
crew.py      who does the work: local processes, or a Dask cluster
journal.py   rows on disk, durable and checked
run.py       the sweep itself: what is missing is done, and kept
table.py     rows as a table and as a report's document
conclude.py  what follows from the cases of a capacity sweep
closer.py    a closer look at the deployment it chose
stats.py     statistics of a large trace by the same crews
"""

from __future__ import annotations

from moesim.sweep.crew import Crew, DaskCrew, LocalCrew
from moesim.sweep.run import Outcome, sweep
from moesim.sweep.spec import Case, Spec, load_spec
from moesim.sweep.stats import stats_of
from moesim.sweep.table import results

__all__ = ["Case", "Crew", "DaskCrew", "LocalCrew", "Outcome", "Spec", "load_spec", "results", "stats_of", "sweep"]
