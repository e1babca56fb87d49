"""Statistics of a large trace by a crew: parts of the trace are counted apart and added up, for `TraceStats` is a monoid."""

from __future__ import annotations

from dataclasses import replace

from moesim.errors import MoesimError, TraceError
from moesim.sweep.crew import Crew, Died
from moesim.trace import Trace, TraceStats


def stats_of(trace: Trace, crew: Crew) -> TraceStats:
    """What `TraceStats.of(trace)` gives, each part file counted by whoever of the crew is free.

    Raises TraceError for a range of tokens (which part holds them is not known before reading), and what reading a part raises.
    """
    if trace.tokens_range != ":":
        raise TraceError(f"{trace.path}: tokens {trace.tokens_range} cannot be counted part by part; select by domain, phase or steps")
    total = TraceStats.empty(trace.model)
    for part, found in crew.run(_count, [replace(trace, parts=(part,)) for part in trace.parts]):
        if isinstance(found, Died):
            raise TraceError(f"{part.parts[0]}: every one of {found.tries} workers that read it died; is a part larger than a worker's memory?")
        if isinstance(found, MoesimError):
            raise found
        total = total + found
    return total


def _count(part: Trace) -> TraceStats | MoesimError:
    try:
        return TraceStats.of(part)
    except MoesimError as problem:
        return problem


__all__ = ["stats_of"]
