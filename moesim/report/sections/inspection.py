"""Section: what the routing looks like."""

from __future__ import annotations

from functools import partial

import numpy as np

from moesim.report.blocks import Block, Drawing, Facts, Gallery, Group, Section, Table, cells
from moesim.report.plots import draw_heat, draw_line, draw_matrix, heat_limit, relative
from moesim.report.schema import Document, InspectionPart, LocalityPart, PairPart

PAIRS = 10  # shown of all layers


def inspection(document: Document) -> Section | None:
    """Heat map of expert loads, skew and affinity per layer, drift between domains and over steps, locality, co-activation."""
    part = document.inspection
    if part is None:
        return None
    worst = int(np.argmax(part.skew))
    unused = sum(part.unused_experts)
    lead = (
        f"The hottest expert of a layer takes {np.mean(part.skew):.2f} times the mean load on average, "
        f"{part.skew[worst]:.2f} times in layer {part.layers[worst]}, the most uneven one."
    )
    pairs = [
        ("model", part.model),
        ("tokens", f"{part.tokens:,}"),
        ("routing", f"{len(part.layers)} MoE layers × {part.experts} experts, top-{part.top_k}"),
        ("experts never chosen", f"{unused:,} of {len(part.layers) * part.experts:,}"),
        ("empty selections", f"{part.empty_selections:,}"),
        ("tokens that repeat the one before", f"{part.repeated_share:.1%}".replace("%", " %")),
    ]
    blocks: list[Block] = [Facts(pairs=pairs), Gallery(drawings=_drawings(part))]
    if part.locality and (near := _locality(part.locality)):
        blocks.append(Gallery(heading="Locality: experts of neighbouring tokens", drawings=near))
    if part.coactivation:
        blocks.append(_together(part.coactivation))
    return Section(key="inspection", title="Routing", lead=lead, blocks=blocks)


def _locality(part: LocalityPart) -> list[Drawing]:
    drawings = []
    known = [(m, srp, low, high) for m, srp, (low, high) in zip(part.windows, part.srp, part.srp_interval, strict=True) if srp is not None]
    if known:
        windows, srp, lows, highs = zip(*known, strict=True)
        sure = None not in lows + highs
        drawings.append(
            Drawing(
                caption="SRP: best F1 score of switching experts on or off for a whole window of tokens"
                + ("; band is the 95 % interval" if sure else ""),
                alt=f"Line over windows of {windows[0]} to {windows[-1]} tokens, from {srp[0]:.3f} to {srp[-1]:.3f}; 1 if experts never change.",
                draw=partial(draw_line, x=windows, y=srp, xlabel="window, tokens", ylabel="SRP", band=(lows, highs) if sure else None),
            )
        )
    for segment, row in zip(part.segments, part.sch, strict=True):
        hits = [hit for hit in row if hit is not None]
        if len(hits) == len(row):
            drawings.append(
                Drawing(
                    caption=f"SCH: hit rate of an expert cache that looks {segment} tokens ahead",
                    alt=f"Line over caches of {part.rhos[0]} to {part.rhos[-1]} times a token's experts, from {hits[0]:.3f} to {hits[-1]:.3f}.",
                    draw=partial(draw_line, x=part.rhos, y=hits, xlabel="slots / experts of a token (rho)", ylabel="hit rate"),
                )
            )
    return drawings


def _together(pairs: list[PairPart]) -> Table:
    most = sorted(pairs, key=lambda pair: pair.tokens / pair.lift - pair.tokens)[:PAIRS]
    rows = [cells(pair.layer, f"{pair.experts[0]} + {pair.experts[1]}", f"{pair.tokens:,}", f"{pair.lift:.2f}") for pair in most]
    return Table(
        caption="Experts chosen together",
        columns=["MoE layer", "experts", "tokens", "lift"],
        align="rlrr",
        groups=[Group(rows=rows)],
        note="Lift: how many times as many tokens choose both as if the two were independent.",
    )


def _drawings(part: InspectionPart) -> list[Drawing]:
    ratio_LE = relative(part.load)
    hot = np.unravel_index(int(ratio_LE.argmax()), ratio_LE.shape)
    drawings = [
        Drawing(
            caption="Load of each expert over the mean of its layer",
            alt=f"Heat map, {len(part.layers)} MoE layers by {part.experts} experts; "
            f"the hottest is expert {hot[1]} of layer {part.layers[hot[0]]} at {ratio_LE[hot]:.2f} times the mean.",
            draw=partial(draw_heat, ratio_RC=ratio_LE, rows=part.layers, xlabel="expert", limit=heat_limit([ratio_LE])),
            height=max(240, min(360, 6 * len(part.layers) + 80)),
        ),
        Drawing(
            caption="Skew: hottest expert over the mean expert",
            alt=f"Line over MoE layers, from {min(part.skew):.2f} to {max(part.skew):.2f}; 1 would be perfect balance.",
            draw=partial(draw_line, x=part.layers, y=part.skew, xlabel="MoE layer", ylabel="hottest / mean", floor=1),
        ),
    ]
    if part.affinity_bits:
        bits = part.affinity_bits
        drawings.append(
            Drawing(
                caption="Affinity: what a layer's experts tell about the next layer's",
                alt=f"Line over MoE layers of the mutual information with the next layer, from {min(bits):.2f} to {max(bits):.2f} bits.",
                draw=partial(draw_line, x=part.layers[:-1], y=bits, xlabel="MoE layer", ylabel="bits"),
            )
        )
    if len(part.domains) > 1:
        drift_DD = np.asarray(part.domain_drift_bits)
        a, b = np.unravel_index(int(drift_DD.argmax()), drift_DD.shape)
        names = [name or "(none)" for name in part.domains]
        drawings.append(
            Drawing(
                caption="Drift between domains: Jensen-Shannon divergence of loads, bits",
                alt=f"Matrix over {len(names)} domains; the farthest are {names[a]} and {names[b]} at {drift_DD[a, b]:.3f} bits.",
                draw=partial(draw_matrix, value_RC=drift_DD, names=names if len(names) <= 16 else (), unit="", top=float(drift_DD.max())),
                height=280,
            )
        )
    if part.step_drift_bits:
        drift_SL = np.asarray(part.step_drift_bits)
        mean_S = drift_SL.mean(axis=1)
        band = (drift_SL.min(axis=1), drift_SL.max(axis=1))
        drawings.append(
            Drawing(
                caption="Drift over steps: each stretch against the one before; line is the mean, band all layers",
                alt=f"Line from {mean_S[0]:.4f} to {mean_S[-1]:.4f} bits.",
                draw=partial(draw_line, x=part.step_edges[1:], y=mean_S, xlabel="step", ylabel="bits", band=band),
            )
        )
    return drawings
