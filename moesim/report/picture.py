"""A drawing as a picture file of its own."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

from moesim.errors import InputError
from moesim.files import write_text
from moesim.report.blocks import Drawing
from moesim.report.svg import SETTINGS


def save_drawing(drawing: Drawing, path: Path) -> Path:
    """Write a drawing as .svg or .png (two pixels for each of its own), with its caption; an existing file is replaced."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    if path.suffix not in (".svg", ".png"):
        raise InputError(f"{path}: drawings are written as .svg or .png; give one of these")
    with mpl.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=(drawing.width / 72, drawing.height / 72), layout="constrained")
        drawing.draw(figure.add_subplot())
        figure.suptitle(drawing.caption, fontsize=10)
        stream = io.BytesIO()
        svg = path.suffix == ".svg"
        figure.savefig(stream, format=path.suffix[1:], dpi=144, metadata={"Date": None} if svg else None)  # same drawing, same bytes
    if svg:
        write_text(path, stream.getvalue().decode())
    else:
        path.write_bytes(stream.getvalue())
    return path
