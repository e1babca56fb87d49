"""`moesim report`: one HTML page of what moesim found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesim.cli.options import AsJson, Force

NAME = "report"
EPILOG = "Example: moesim report demo-out/result.json validation.json -o report.html"


def run(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="JSON written by other verbs (-o, --result), or the folder of a `demo` or `sweep`, in the order to show.", metavar="FILE…"
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The HTML file to write.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option("--title", help="Title of the page; default: that of the only document.")] = None,
    json: AsJson = False,
    force: Force = False,
) -> None:
    """Write one self-contained HTML page: the answer first, then the figures, then what they were made from.

    Nothing is fetched when it is read, and it holds no script. The JSON files stay the data; the page is a view of them.
    """
    from moesim.cli.screen import emit_json, progress
    from moesim.files import check_output, write_text
    from moesim.report import read_document, render
    from moesim.report.sections import sections

    check_output(output, force=force)
    documents = [read_document(path) for path in files]
    with progress("drawing"):
        write_text(output, render(documents, title=title))
    shown = [[section.key for section in sections(document)] for document in documents]
    if json:
        emit_json({"report": str(output), "documents": [{"file": str(path), "sections": keys} for path, keys in zip(files, shown, strict=True)]})
        return
    print(f"wrote {output}: {sum(map(len, shown))} sections of {len(files)} document{'' if len(files) == 1 else 's'}; open it in a browser")
