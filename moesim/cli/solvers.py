"""`moesim solvers`: what can decide."""

from __future__ import annotations

from moesim.cli.options import AsJson

NAME = "solvers"
EPILOG = "A package adds its own through the entry-point group `moesim.solvers`."


def run(json: AsJson = False) -> None:
    """List the installed solvers, what they can do and what they lack."""
    from dataclasses import asdict

    from moesim.cli.screen import emit_json, table
    from moesim.optimize import solver_infos

    infos = solver_infos()
    if json:
        emit_json({"solvers": [{**asdict(info), "available": info.available} for info in infos]})
        return
    rows = [
        [info.name, info.solves, ", ".join(info.capabilities), "yes" if info.available else f"needs {', '.join(info.missing)}", info.summary]
        for info in infos
    ]
    table("Solvers", ["name", "solves", "can", "available", "how"], rows)
