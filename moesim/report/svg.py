"""A drawing as inline SVG that follows the page: its colours are CSS variables, its text is the page's font."""

from __future__ import annotations

import io
import re
import warnings
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from moesim.report.plots import COLOURS, INK, LINE

if TYPE_CHECKING:
    from moesim.report.blocks import Drawing

_HEX = re.compile(r"#[0-9a-f]{6}\b")
_FONT = re.compile(r"font: (?P<weight>bold |700 )?(?P<size>[\d.]+px)[^;]*")
_LINK = re.compile(r"(url\(#|^#)")
SETTINGS = {
    "svg.fonttype": "none",  # text stays text: searchable, readable aloud, in the page's font
    "svg.hashsalt": "moesim",  # same drawing, same bytes
    "text.parse_math": False,  # a `$` in a plan's name is a `$`
    "font.size": 10,
    "axes.labelsize": 10,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
}


def inline_svg(drawing: Drawing, *, key: str) -> str:
    """SVG element of a drawing, for the body of an HTML page. `key` keeps its ids apart from other drawings'."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's browser has the font
        figure = Figure(figsize=(drawing.width / 72, drawing.height / 72), layout="constrained")
        drawing.draw(figure.add_subplot())
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", transparent=True, dpi=144)
    root = ElementTree.fromstring(stream.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib.update(_adapted(dict(element.attrib), key))
        for name in [name for name in element.attrib if name.startswith("{")]:
            element.attrib[name.rpartition("}")[2]] = element.attrib.pop(name)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib.update({"role": "img", "aria-label": drawing.alt})
    return ElementTree.tostring(root, encoding="unicode")


def _adapted(attributes: dict[str, str], key: str) -> dict[str, str]:
    """Attributes with ids made unique, colours made variables and the page's font."""
    changed = {}
    for name, value in attributes.items():
        text = f"{key}-{value}" if name == "id" else value
        if name != "aria-label" and not value.startswith("data:"):
            text = _LINK.sub(rf"\g<1>{key}-", text) if "#" in text and not _HEX.fullmatch(text) else text
            text = _HEX.sub(lambda found: f"var(--{COLOURS[found[0]]}, {found[0]})" if found[0] in COLOURS else found[0], text)
        if name == "style":
            text = _FONT.sub(lambda found: f"font-size: {found['size']}" + ("; font-weight: 600" if found["weight"] else ""), text)
        changed[name] = text
    return changed
