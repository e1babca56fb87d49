"""Section: an expert cache, what it holds and what missing experts cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.report.blocks import Block, Drawing, Facts, Gallery, Group, Section, Table, Tile, cells, change
from moesim.report.cache_parts import CachingPart
from moesim.report.plots import BLACK, BLUE, FAINT, GREEN, LINE, VERMILLION, label, opened
from moesim.report.schema import Document
from moesim.report.text import percent, quantity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BOUNDS = ("optimal", "belady", "lookahead", "static", "pinned-lru")  # policies that know the tokens they are judged on
SHARES = (0.125, 0.25, 0.5, 0.75)  # of a layer's experts, in the table of policies


def caching(document: Document) -> Section | None:
    """Scores beside equal slots, slots and pins of every layer, miss-ratio curves of every policy."""
    part = document.caching
    if part is None:
        return None
    last = part.scored[-1]
    held, whole = sum(part.held_B), sum(part.all_B)
    lead = (
        f"{quantity(held, 'B')} of {quantity(whole, 'B')} of experts are in fast memory, {percent(1 - held / whole)} less than all. "
        f"Of the experts that steps ask for, {percent(last.plan.hit_ratio)} are in place on {last.label} ({last.kind}); "
        f"copying the others makes a step {quantity(last.plan.stall_s, 's')} longer "
        f"({percent(change(last.plan.step_s, last.plan.base_s), signed=True)})."
    )
    blocks: list[Block] = [
        Facts(pairs=_facts(part)),
        _scores(part),
        Gallery(drawings=[curves_drawing(part.curves.model_dump(), part.policy), _slots(part)]),
    ]
    blocks.append(_policies(part))
    return Section(key="caching", title="Expert cache", lead=lead, blocks=blocks)


def kept(part: CachingPart, sentences: list[str], tiles: list[Tile], cautions: list[str]) -> None:
    """What of a cache belongs at the top: what it saves, what it costs, whether planning it was worth it."""
    last, held, whole = part.scored[-1], sum(part.held_B), sum(part.all_B)
    mine, equal = last.plan, last.equal
    longer = change(mine.step_s, mine.base_s)
    sentences.append(
        f"With {percent(held / whole)} of the experts' bytes in fast memory, a step takes {percent(longer)} longer than with all of them."
    )
    against = f"{percent(equal.hit_ratio)} with equal slots" if equal else ""
    tone = "plain" if not equal else "good" if mine.hit_ratio > equal.hit_ratio else "bad" if mine.hit_ratio < equal.hit_ratio else "plain"
    tiles += [
        Tile(label="memory saved", value=quantity(whole - held, "B"), detail=f"of {quantity(whole, 'B')}"),
        Tile(label="experts in place when asked for", value=percent(mine.hit_ratio), detail=against, tone=tone),
        Tile(label="stall of a step", value=quantity(mine.stall_s, "s"), detail=f"of {quantity(mine.step_s, 's')}"),
    ]
    if equal and mine.hit_ratio > equal.hit_ratio and mine.stall_s >= equal.stall_s:
        cautions.append("The plan finds more experts in place than equal slots do, but its steps are no shorter: something else hides the copies.")
    if last.kind == "in-sample":
        cautions.append("The plan was judged only on the tokens it learnt from.")


def _facts(part: CachingPart) -> list[tuple[str, str]]:
    ahead = part.prefetch
    pairs = [
        ("model", part.model),
        ("cluster", part.cluster),
        ("plan", f"{part.solver}, {part.status} in {part.seconds:.2f} s"),
        ("policy", part.policy),
        ("copied ahead", "nothing" if ahead.name == "none" else f"by {ahead.name}, {ahead.distance} layers, assumed recall {percent(ahead.recall)}"),
        ("memory for experts", f"{quantity(min(part.budget_B), 'B')} of each device, {quantity(part.expert_B, 'B')} an expert"),
        ("home of experts", ", ".join(f"{count:,} in {tier}" for tier, count in part.tiers.items())),
        ("tokens of each device in a step", f"{part.tokens_per_device:,}"),
    ]
    if len(part.bits) > 1 or part.loss:
        bits = ", ".join(f"{count:,} at {bit} bits" for bit, count in part.bits.items())
        pairs.append(("precision", f"{bits}; rounding noise {part.loss:.3g} (a proxy, no statement about quality)"))
    if event := part.event:
        pairs.append(
            (
                "event engine",
                f"stall {quantity(event.stall_s, 's')} in {event.steps:,} steps, closed form {quantity(event.closed_stall_s, 's')} "
                f"({percent(event.error, signed=True)})",
            )
        )
    return pairs


def _scores(part: CachingPart) -> Table:
    groups = []
    for scored in part.scored:
        rows = []
        for name, row in ((part.solver, scored.plan), ("equal slots", scored.equal)):
            if row:
                copied = (quantity(row.demand_B, "B"), quantity(row.ahead_B, "B"))
                rows.append(cells(name, percent(row.hit_ratio), quantity(row.stall_s, "s"), quantity(row.step_s, "s"), *copied))
        groups.append(Group(title=f"{scored.label} ({scored.kind}, {scored.tokens:,} tokens, {scored.steps:,} steps)", rows=rows))
    return Table(
        caption="Experts in place, and what the others cost a step",
        columns=["plan", "hit ratio", "stall", "step", "copied on demand", "copied ahead"],
        align="lrrrrr",
        groups=groups,
        note="Stall: by how much a step is longer than with all experts in place. Caches begin empty but for what is pinned.",
    )


def _policies(part: CachingPart) -> Table:
    slots, found = np.asarray(part.curves.slots), part.curves.miss_ratio
    at = [int(np.abs(slots - share * slots[-1]).argmin()) for share in SHARES]
    order = sorted(found, key=lambda name: (name in BOUNDS, found[name][at[len(at) // 2]], name))
    groups = [
        Group(title=title, rows=[cells(name, *(percent(found[name][i]) for i in at)) for name in order if (name in BOUNDS) == known])
        for title, known in (("know only what was", False), ("know these very tokens: bounds, no plans", True))
    ]
    return Table(
        caption=f"Miss ratio of every policy, by slots of every layer and device ({part.curves.tokens:,} judged tokens)",
        columns=["policy", *(f"{slots[i]} slots" for i in at)],
        align="l" + "r" * len(at),
        groups=[group for group in groups if group.rows],
    )


def curves_drawing(curves: Mapping[str, Any], policy: str) -> Drawing:
    """Miss ratio over slots: the plan's policy, the best and the bound by name, the others grey."""
    found, slots = curves["miss_ratio"], curves["slots"]
    middle = len(slots) // 2
    return Drawing(
        caption="Miss ratio of every policy by slots of every layer and device",
        alt=f"Falling lines from 1 at no slots; with {slots[middle]} slots {policy} misses {found[policy][middle]:.1%}, "
        f"the best policy {min(found[name][middle] for name in found if name not in BOUNDS):.1%}.",
        draw=partial(draw_curves, slots=slots, miss_ratio=found, policy=policy),
        height=300,
    )


def draw_curves(ax: Axes, *, slots: Sequence[int], miss_ratio: Mapping[str, Sequence[float]], policy: str) -> Axes:
    """Lines from an empty cache; dashed ones know the tokens they are judged on."""
    causal = [name for name in miss_ratio if name not in BOUNDS]
    best = min(causal, key=lambda name: (sum(miss_ratio[name]), name)) if causal else policy
    named = {"optimal": (BLACK, "--"), "static": (GREEN, "--"), best: (VERMILLION, "-"), policy: (BLUE, "-")}
    others = [name for name in causal if name not in named]
    for index, name in enumerate(others):
        ax.plot(slots, miss_ratio[name], color=FAINT, linewidth=0.8, label=f"{len(others)} other policies" if not index else None)
    words = {"optimal": "optimal (bound)", "static": "static (knows these loads)", best: f"{best} (best here)"}
    for name, (colour, style) in named.items():
        if name in miss_ratio:
            text = f"{policy}, of the plan" if name == policy else words[name]
            ax.plot(slots, miss_ratio[name], style, color=colour, linewidth=2.2 if name == policy else 1.4, label=label(text, 40))
    ax.set_xlim(0, slots[-1] or 1)
    ax.set_ylim(0, 1)
    ax.set_xlabel("slots of every layer and device")
    ax.set_ylabel("miss ratio")
    ax.grid(color=LINE, linewidth=0.6)
    ax.legend(loc="upper right", handlelength=1.8, borderpad=0)
    return opened(ax)


def _slots(part: CachingPart) -> Drawing:
    slots_L, pinned_L = (np.asarray(rows).sum(axis=1) for rows in (part.slots, part.pinned))
    most, least = int(slots_L.argmax()), int(slots_L.argmin())
    return Drawing(
        caption="Slots of every layer, all devices together",
        alt=f"Bars over {len(slots_L)} MoE layers, from {slots_L[least]} slots in layer {part.layers[least]} to {slots_L[most]} in layer "
        f"{part.layers[most]}; {int(pinned_L.sum())} of {int(slots_L.sum())} are pinned.",
        draw=partial(draw_slots, layers=part.layers, slots_L=slots_L, pinned_L=pinned_L),
        height=300,
    )


def draw_slots(ax: Axes, *, layers: Sequence[int], slots_L: Sequence[int], pinned_L: Sequence[int]) -> Axes:
    """A bar per layer: pinned experts below, slots that follow the policy above."""
    pinned, free = np.asarray(pinned_L), np.asarray(slots_L) - np.asarray(pinned_L)
    at = np.arange(len(layers))
    if pinned.any():
        ax.bar(at, pinned, color=BLACK, width=0.72, label="pinned")
    ax.bar(at, free, bottom=pinned, color=BLUE, width=0.72, label="by policy")
    ax.axhline(float(np.mean(slots_L)), color=VERMILLION, linewidth=1.2, linestyle="--", label="equal")
    every = -(-len(layers) // 12)
    ax.set_xticks(at[::every], [str(layer) for layer in layers[::every]])
    ax.set_xlabel("MoE layer")
    ax.set_ylabel("slots")
    ax.grid(axis="y", color=LINE, linewidth=0.6)
    ax.figure.legend(loc="outside upper left", ncols=3, handlelength=1.2, handletextpad=0.5, columnspacing=1.4, borderpad=0)
    return opened(ax)
