"""The command line: one file per verb."""

from __future__ import annotations

import warnings
from typing import Any

import typer

from moesim.cli import (
    cache,
    calibrate,
    capture,
    check,
    compare,
    demo,
    export,
    import_,
    inspect,
    models,
    place,
    profiles,
    report,
    scale,
    score,
    serve,
    simulate,
    solvers,
    sweep,
    systems,
    validate,
)
from moesim.cli.screen import guarded, note
from moesim.errors import InputError, MoesimError

app = typer.Typer(
    name="moesim",
    help="Where should the experts of a Mixture-of-Experts model live, and was the answer right on the real hardware?\n\n"
    "Start with `moesim demo`: the whole story on this machine. Then: `import` or `capture` a trace, `inspect` it, `place` its experts, "
    "`score` or `simulate` the plans on other tokens, `validate` them by executing the real layer, and `report`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (
    demo,
    capture,
    import_,
    export,
    check,
    inspect,
    place,
    score,
    compare,
    cache,
    simulate,
    serve,
    scale,
    sweep,
    validate,
    calibrate,
    report,
    solvers,
    systems,
    profiles,
    models,
):
    app.command(module.NAME, epilog=module.EPILOG)(guarded(module.run))


def main() -> None:
    """Entry point: errors raised on purpose become one line on stderr and exit code 2 (bad input) or 1 (a failed check).

    So does what the system refuses: a folder that cannot be written, a full disk, too little memory.
    """

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        note(f"warning: {message}")

    warnings.showwarning = show
    try:
        app()
    except InputError as problem:
        note(f"error: {problem}")
        raise SystemExit(2) from None
    except MoesimError as problem:
        note(f"error: {problem}")
        raise SystemExit(1) from None
    except OSError as problem:
        place = f"{problem.filename}: " if problem.filename else ""
        note(f"error: {place}{problem.strerror or problem}; check the path, its permissions and the space left")
        raise SystemExit(2) from None
    except MemoryError:
        note("error: not enough memory; select fewer tokens (--tokens) or layers")
        raise SystemExit(1) from None
    except SystemExit as stop:  # typer ends an interrupted verb without a word
        if stop.code == 130:
            note("interrupted")
        raise
