"""Section: simulations in detail."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from moesim.report.blocks import Drawing, Facts, Gallery, Group, Section, Table, cells
from moesim.report.plots import draw_heat, draw_matrix, draw_split, heat_limit, relative
from moesim.report.schema import Document, ResultPart
from moesim.report.sections.comparison import plan_rows, plan_table
from moesim.report.text import percent, quantity

DETAILED = 12  # plans with heat maps of their own; the table holds all


def results(document: Document) -> Section | None:
    """Time split, load and traffic of every simulated plan; heat maps share their scales, so that plans compare."""
    found = document.results
    if not found:
        return None
    where = {(r.model, r.cluster) for r in found}
    lead = "; ".join(f"{model} on {cluster}" for model, cluster in sorted(where)) + "."
    blocks: list[Table | Gallery | Facts] = []
    if len(found) > 1:
        blocks.append(plan_table("Simulated plans", [Group(rows=plan_rows([r.summary for r in found]))]))
    blocks += [Gallery(drawings=[_split(found)]), _loads(found[:DETAILED])]
    if any(len(r.traffic_B) > 1 for r in found):
        blocks.append(_traffic(found[:DETAILED]))
    if len(found) > DETAILED:
        lead += f" The maps show the first {DETAILED} of {len(found)} plans."
    blocks.append(_bottlenecks(found))
    return Section(key="results", title="Simulation", lead=lead, blocks=blocks)


def _split(found: Sequence[ResultPart]) -> Drawing:
    summaries = [r.summary for r in found]
    slowest = max(summaries, key=lambda s: s.layer_time_s)
    seconds = {kind: [getattr(s, f"{kind}_s") for s in summaries] for kind in ("dispatch", "compute", "combine")}
    overlapping = any(summary.engine == "event" for summary in summaries)
    return Drawing(
        caption="Work of a MoE layer, mean over steps and layers; parts overlap, so a bar can be longer than the layer takes"
        if overlapping
        else "Time of a MoE layer, mean over steps and layers",
        alt=f"Stacked bars of dispatch, compute and combine; the longest is {slowest.name} at {quantity(slowest.layer_time_s, 's')}.",
        width=460,
        draw=partial(draw_split, names=[s.name for s in summaries], seconds=seconds),
        height=70 + 30 * len(found),
    )


def _loads(found: Sequence[ResultPart]) -> Gallery:
    ratios = [relative(r.device_tokens) for r in found]
    limit = heat_limit(ratios)
    drawings = []
    for result, ratio_LG in zip(found, ratios, strict=True):
        layer, device = np.unravel_index(int(ratio_LG.argmax()), ratio_LG.shape)
        drawings.append(
            Drawing(
                caption=result.summary.name,
                alt=f"Heat map, {len(result.layers)} MoE layers by {ratio_LG.shape[1]} devices; "
                f"the busiest is device {device} in layer {result.layers[layer]} at {ratio_LG[layer, device]:.2f} times the mean.",
                draw=partial(draw_heat, ratio_RC=ratio_LG, rows=result.layers, xlabel="device", limit=limit),
                height=270,
            )
        )
    return Gallery(heading="Load of each device over the mean of its layer", drawings=drawings)


def _traffic(found: Sequence[ResultPart]) -> Gallery:
    traffic = [np.asarray(r.traffic_B) / len(r.layers) for r in found]
    top = max(float(t.max()) for t in traffic)
    return Gallery(
        heading="Bytes between devices, mean layer and step",
        drawings=[
            Drawing(
                caption=result.summary.name,
                alt=f"Matrix over {len(traffic_GG)} devices, from row to column; {quantity(float(traffic_GG.sum()), 'B')} in all, "
                f"{quantity(float(traffic_GG.max()), 'B')} between the busiest pair.",
                draw=partial(draw_matrix, value_RC=traffic_GG, names=(), unit="B", top=top, xlabel="to device", ylabel="from device"),
                height=270,
            )
            for result, traffic_GG in zip(found, traffic, strict=True)
        ],
    )


def _bottlenecks(found: Sequence[ResultPart]) -> Table:
    rows = []
    for result in found:
        total = sum(result.bottlenecks.values())
        ports = sorted(result.bottlenecks.items(), key=lambda item: -item[1])
        waits = ", ".join(f"{port} ({percent(count / total)})" for port, count in ports) if total else "not recorded"
        s = result.summary
        times = (quantity(s.step_time_s, "s"), quantity(s.tokens_per_s))
        rows.append(cells(s.name, s.engine, f"{result.steps:,}", *times, f"{s.worst_layer_load_ratio:.3f}", waits))
    return Table(
        caption="Steps and what the exchange waits for",
        columns=[
            "plan",
            "engine",
            "steps",
            "MoE time/step",
            "tokens/s",
            "worst layer, busiest/mean",
            "port that sets the dispatch time, share of layers and steps",
        ],
        align="llrrrrl",
        groups=[Group(rows=rows)],
    )
