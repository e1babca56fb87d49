"""Every error moesim raises on purpose.

    MoesimError
    ├── InputError            something given to moesim is wrong (the CLI exits with 2)
    │   ├── TraceError        a routing trace
    │   ├── ProfileError      a device, link or cluster description
    │   ├── PlanError         a placement, cache or scaling plan
    │   ├── SpecError         a model description
    │   └── OutputExists      refusing to overwrite without --force
    ├── SolverError           a solver broke its contract (infeasible is a status, not an error)
    ├── PluginError           an entry point is missing, doubled or broken
    ├── CaptureError          routing could not be captured
    ├── ValidationError       the live layer could not be executed or disagreed
    └── SimulationError       an invariant of a simulation broke

A message says what (the value) → where (file, path, index) → what to do.
"""

from __future__ import annotations


class MoesimError(Exception):
    """Root of all errors raised on purpose."""


class InputError(MoesimError):
    """Something given to moesim is wrong."""


class TraceError(InputError):
    """A routing trace is missing, damaged or does not fit its model."""


class ProfileError(InputError):
    """A hardware description is wrong; lists every mistake with its path in the file."""


class PlanError(InputError):
    """A plan is invalid or was made for something else."""


class SpecError(InputError):
    """A model description is unknown or inconsistent."""


class OutputExists(InputError):  # noqa: N818 - reads as what happened
    """The output path exists and --force was not given."""


class SolverError(MoesimError):
    """A solver returned something that breaks the solver contract."""


class PluginError(MoesimError):
    """An entry point is missing, registered twice or does not load."""


class CaptureError(MoesimError):
    """Routing could not be captured from the running model."""


class ValidationError(MoesimError):
    """The live layer could not be executed, or its outputs disagree."""


class SimulationError(MoesimError):
    """An invariant of a simulation does not hold."""
