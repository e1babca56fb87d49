"""Section: the model that was trained to record routing from."""

from __future__ import annotations

from functools import partial

from moesim.report.blocks import Drawing, Facts, Gallery, Section
from moesim.report.plots import draw_line
from moesim.report.schema import Document
from moesim.report.text import quantity


def training(document: Document) -> Section | None:
    """Loss curve and size of the training, if the document has one."""
    part = document.training
    if part is None:
        return None
    domains = ", ".join(f"{name} ({quantity(size, 'B')})" for name, size in part.domains.items())
    pairs = [
        ("model", part.model),
        ("parameters", quantity(part.parameters)),
        ("steps", f"{part.steps:,}"),
        ("text", domains or "–"),
        *([("time", quantity(part.seconds, "s"))] if part.seconds is not None else []),
    ]
    blocks: list[Facts | Gallery] = [Facts(pairs=pairs)]
    lead = ""
    if part.loss:
        first, last = part.loss[0], part.loss[-1]
        lead = f"The loss went from {first:.3f} to {last:.3f} nats per token in {part.steps:,} steps."
        curve = partial(draw_line, x=range(1, len(part.loss) + 1), y=part.loss, xlabel="step", ylabel="loss, nats per token", floor=None)
        blocks.append(Gallery(drawings=[Drawing(caption="Training loss", alt=f"Line: {lead}", draw=curve)]))
    return Section(key="training", title="Training", lead=lead, blocks=blocks)
