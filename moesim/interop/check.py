"""check: what users trip over between a placement file and a running engine. Each finding names figures and a remedy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesim.errors import PlanError
from moesim.hardware import Cluster
from moesim.interop.balance import imbalance_L
from moesim.interop.layout import Engine, Finding, Layout, default_row
from moesim.interop.plans import moe_rows
from moesim.interop.sidecar import Sidecar, load_sidecar
from moesim.model import ModelSpec
from moesim.plan import Placement

GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What the file is held against; None where not given."""

    model: ModelSpec | None = None
    cluster: Cluster | None = None
    devices: int | None = None
    redundant: int | None = None  # R of the launch flags
    dispatch: str | None = None  # rule the engine is told to run
    load_LE: NDArray[np.int64] | None = None  # expected traffic


def check_placement(engine: Engine, path: Path, wanted: Wanted) -> list[Finding]:
    """Findings on a placement file; PlanError when it cannot be read at all."""
    layout = engine.read(path)
    try:
        sidecar, stale = load_sidecar(path, engine.name), None
    except PlanError as problem:
        sidecar, stale = None, Finding(level="fail", check="sidecar", message=str(problem))
    found = [stale] if stale else []
    found += layout.findings
    found += _origin(sidecar, wanted)
    experts, known = _experts(layout, sidecar, wanted)
    found += [] if known else [_remark("model", f"no sidecar and no --model: took {experts} experts from the ids", "give --model")]
    slots = Counter(len(row) for row in layout.rows)
    if len(slots) > 1:
        usual = slots.most_common(1)[0][0]
        odd = next(name for name, row in zip(layout.names, layout.rows, strict=True) if len(row) != usual)
        found.append(_fail("slots", f"layer {odd} does not have {usual} slots as most layers do", "give every layer the same number"))
    kept, remarks = _layers(engine, layout, sidecar, wanted)
    found += remarks
    coverage = list(_coverage(layout, kept, experts))
    found += coverage
    found += _redundancy(layout, experts, sidecar, wanted)
    devices = wanted.devices or (wanted.cluster.size if wanted.cluster else None) or layout.devices or (sidecar.devices if sidecar else None)
    if devices is None:
        found.append(_remark("divide", "the number of expert-parallel ranks is unknown", "give --devices or --cluster"))
    else:
        found += _devices(layout, kept, experts, devices, sidecar, wanted)
    found += _dispatch(engine, layout, experts, sidecar, wanted)
    broken = len(slots) > 1 or any(finding.level == "fail" for finding in coverage)
    if devices and not broken and kept and len(layout.rows[0]) % devices == 0:
        found += _traffic(engine, layout, kept, experts, devices, sidecar, wanted)
    found += [_remark("engine", text) for text in engine.preconditions]
    return found


def _fail(check: str, message: str, remedy: str) -> Finding:
    return Finding(level="fail", check=check, message=message, remedy=remedy)


def _remark(check: str, message: str, remedy: str = "") -> Finding:
    return Finding(level="remark", check=check, message=message, remedy=remedy)


def _ok(check: str, message: str) -> Finding:
    return Finding(level="ok", check=check, message=message)


def _experts(layout: Layout, sidecar: Sidecar | None, wanted: Wanted) -> tuple[int, bool]:
    if wanted.model or sidecar:
        return wanted.model.experts if wanted.model else sidecar.experts if sidecar else 0, True
    if layout.redundant is not None:
        return max(len(layout.rows[0]) - layout.redundant, 1), True
    return min(max(max(row) for row in layout.rows) + 1, min(map(len, layout.rows))), False  # every expert needs a slot


def _origin(sidecar: Sidecar | None, wanted: Wanted) -> Iterator[Finding]:
    """Plan made from another model or device count."""
    if sidecar is None:
        yield _remark("origin", "no sidecar, so it is unknown from which model, traffic and dispatch rule the placement was made")
        return
    if wanted.model and sidecar.model_digest != wanted.model.digest:
        yield _fail(
            "origin",
            f"made for {sidecar.model!r} ({len(sidecar.moe_layers)} MoE layers x {sidecar.experts} experts, digest {sidecar.model_digest}), "
            f"not for {wanted.model.name!r} ({len(wanted.model.moe_layers)} x {wanted.model.experts}, digest {wanted.model.digest})",
            "make a plan from this model's trace",
        )
    elif wanted.model:
        yield _ok("origin", f"made for {sidecar.model!r} from trace {sidecar.made_from.get('trace', 'unknown')}")
    expected = wanted.devices or (wanted.cluster.size if wanted.cluster else None)
    if expected and expected != sidecar.devices:
        yield _fail("origin", f"made for {sidecar.devices} devices, to be run on {expected}", "plan again for this device count")


def _layers(engine: Engine, layout: Layout, sidecar: Sidecar | None, wanted: Wanted) -> tuple[list[int] | None, list[Finding]]:
    if not wanted.model and not sidecar:
        return list(range(len(layout.rows))), []
    layers = wanted.model.moe_layers if wanted.model else sidecar.moe_layers if sidecar else ()
    decoder = wanted.model.layers if wanted.model else sidecar.decoder_layers if sidecar else 0
    kept, notes = moe_rows(engine, layout, layers, decoder)
    if kept is None:
        return None, [_fail("layers", notes[0], "rows must be those of the model that runs")]
    found = [_ok("layers", f"all {len(layers)} MoE layers are there"), *(_remark("layers", note) for note in notes)]
    if engine.draft and max(layout.names) < decoder:
        found.append(_remark("layers", f"no row for a draft layer {decoder}", "if multi-token prediction runs, export with --draft-layers 1"))
    return kept, found


def _coverage(layout: Layout, kept: list[int] | None, experts: int) -> Iterator[Finding]:
    """Ids in range, every expert somewhere; slots named instead of experts."""
    rows = {layout.names[index]: layout.rows[index] for index in (kept if kept is not None else range(len(layout.rows)))}
    wide = {name: row for name, row in rows.items() if max(row) >= experts or min(row) < 0}
    if wide:
        name, row = next(iter(wide.items()))
        slot = next(index for index, expert in enumerate(row) if not 0 <= expert < experts)
        physical = sum(len(set(row)) == len(row) and max(row) < len(row) for row in wide.values())
        yield _fail(
            "ids",
            f"layer {name}, slot {slot}: expert {row[slot]} is outside 0..{experts - 1} ({len(wide)} of {len(rows)} layers)"
            + ("; every slot names a different number below the slot count: these are physical slots, not logical experts" if physical else ""),
            "write physical_to_logical (slot → expert), not its inverse, and apply it once" if physical else "is this the right --model?",
        )
    lacking = {name: missing for name, row in rows.items() if (missing := sorted(set(range(experts)) - set(row)))}
    if lacking:
        name, missing = next(iter(lacking.items()))
        shown = f"{missing[:8]}{' …' if len(missing) > 8 else ''}"
        yield _fail(
            "coverage",
            f"layer {name}: experts {shown} have no slot ({len(lacking)} of {len(rows)} layers lack experts)",
            "every expert needs a slot in every layer: engines do not notice, tokens come out wrong",
        )
    if not wide and not lacking:
        yield _ok("coverage", f"every one of {experts} experts has a slot in all {len(rows)} layers")


def _redundancy(layout: Layout, experts: int, sidecar: Sidecar | None, wanted: Wanted) -> Iterator[Finding]:
    actual = len(layout.rows[0]) - experts
    if layout.redundant is not None and layout.redundant != actual:
        yield _fail("redundant", f"the file states {layout.redundant} redundant experts, its rows hold {actual} (P - E)", "make them equal")
    if wanted.redundant is not None and wanted.redundant != actual:
        yield _fail(
            "redundant",
            f"the flags say R = {wanted.redundant}, so {experts + wanted.redundant} slots; the file holds {len(layout.rows[0])}, so R = {actual}",
            f"launch with R = {actual}",
        )
    elif wanted.redundant is not None:
        yield _ok("redundant", f"R = {actual} in file and flags")


def nearest(value: int, step: int, least: int) -> tuple[int, ...]:
    """Multiples of `step` next to `value`, none below `least`."""
    low = value - value % step
    return tuple(number for number in (low, low + step) if number >= least)


def _devices(layout: Layout, kept: list[int] | None, experts: int, devices: int, sidecar: Sidecar | None, wanted: Wanted) -> Iterator[Finding]:
    slots = len(layout.rows[0])
    if layout.devices is not None and layout.devices != devices:
        yield _fail("devices", f"the file is for {layout.devices} ranks, to be run on {devices}", "export for this number of ranks")
    if slots % devices:
        works = " or ".join(f"R = {number - experts}" for number in nearest(slots, devices, experts))
        yield _fail("divide", f"{slots} slots ({experts} experts + R = {slots - experts}) do not divide over {devices} ranks", f"use {works}")
        return
    yield _ok("divide", f"{slots} slots over {devices} ranks: {slots // devices} each")
    if wanted.cluster and wanted.cluster.nodes > 1:
        yield from _nodes(slots, experts, devices, wanted.cluster.nodes, wanted.model)
    per = slots // devices
    double = [
        (layout.names[index], expert, rank)
        for index in (kept if kept is not None else range(len(layout.rows)))
        if len(layout.rows[index]) == slots
        for rank in range(devices)
        for expert, times in Counter(layout.rows[index][rank * per : (rank + 1) * per]).items()
        if times > 1
    ]
    if double:
        layer, expert, rank = double[0]
        message = f"layer {layer}: rank {rank} holds expert {expert} more than once ({len(double)} such cases): the copies buy nothing"
        yield Finding(level="warn", check="doubles", message=message, remedy="put replicas on different ranks")
    if wanted.model and wanted.cluster:
        yield from _memory(slots, experts, devices, wanted.model, wanted.cluster)


def _nodes(slots: int, experts: int, devices: int, nodes: int, model: ModelSpec | None) -> Iterator[Finding]:
    """What hierarchical EPLB asserts; engines that rebalance by themselves run into it."""
    rules = [("ranks", devices, "nodes", nodes), ("slots", slots, "nodes", nodes)]
    if model and model.expert_groups > 1:
        rules += [("expert groups", model.expert_groups, "nodes", nodes), ("experts", experts, "expert groups", model.expert_groups)]
    for what, total, by, parts in rules:
        if total % parts:
            remedy = "keep online rebalancing off, or use the global algorithm" if what != "ranks" else f"use {nearest(total, parts, parts)} ranks"
            yield Finding(level="warn", check="divide", message=f"{total} {what} do not divide over {parts} {by}: hierarchical EPLB refuses",
                          remedy=remedy)  # fmt: skip


def _memory(slots: int, experts: int, devices: int, model: ModelSpec, cluster: Cluster) -> Iterator[Finding]:
    layers, each_B = len(model.moe_layers), model.expert_B
    held_B, extra_B = slots / devices * layers * each_B, (slots - experts) / devices * layers * each_B
    have_B = min(device.memories[0].capacity_B for device in cluster.devices)
    text = f"experts take {held_B / GIB:.1f} of {have_B / GIB:.1f} GiB per device, before attention, embeddings and activations"
    if held_B > have_B:
        yield _fail("memory", text, "use more devices, fewer redundant slots or fewer bits per weight")
    elif held_B > 0.8 * have_B:
        yield Finding(level="warn", check="memory", message=text, remedy="little is left for the KV cache; use fewer redundant slots")
    else:
        yield _ok("memory", text)
    if extra_B:
        lost = f"{slots - experts} redundant slots take {extra_B / GIB:.2f} GiB per device"
        if model.attention and (low := lost_kv_tokens(model, extra_B, 1)):
            high = lost_kv_tokens(model, extra_B, devices)
            lost += f": {low:,.0f} KV tokens fewer with whole attention per device" + (
                f", {high:,.0f} with heads split over {devices}" if high > low else ""
            )
        yield _remark("memory", lost, "weigh that against the balance they buy")


def lost_kv_tokens(model: ModelSpec, bytes_B: float, split: int) -> float:
    """Tokens of KV cache that fit into `bytes_B` of one device, attention split over `split` devices by KV heads.

    Per token and layer: 2·heads·dim values (MHA, GQA), or the latent and rope part (MLA), which cannot be split.
    """
    a = model.attention
    if a is None:
        return 0.0
    values = a.kv_rank + a.rope_dim if a.kv_rank else 2 * -(-a.kv_heads // split) * a.head_dim
    per_token_B = values * model.layers * model.activation_bits / 8
    return bytes_B / per_token_B if per_token_B else 0.0


def _dispatch(engine: Engine, layout: Layout, experts: int, sidecar: Sidecar | None, wanted: Wanted) -> Iterator[Finding]:
    if len(layout.rows[0]) == experts:
        yield _ok("dispatch", "no replicas, so the dispatch rule does not matter")
        return
    runs = wanted.dispatch or engine.default
    if wanted.dispatch and wanted.dispatch not in engine.rules:
        yield _fail("dispatch", f"{engine.name} has no rule {wanted.dispatch!r}; it runs {', '.join(engine.rules)}", "choose one of them")
    elif sidecar and runs and runs != sidecar.dispatch:
        how = engine.rules.get(sidecar.dispatch)
        told = "" if wanted.dispatch else " unless told otherwise"
        yield Finding(
            level="warn" if how and not wanted.dispatch else "fail",
            check="dispatch",
            message=f"the plan was scored under {sidecar.dispatch!r}, {engine.name} runs {runs!r}{told}: its figures would not hold",
            remedy=f"launch with {how}" if how else f"plan again with --dispatch {runs}",
        )
    elif sidecar and runs:
        yield _ok("dispatch", f"scored under {runs!r}, and the engine runs it")
    elif runs:
        yield _remark("dispatch", f"{engine.name} takes replicas by {runs!r}", "score the plan under that rule")


def _traffic(
    engine: Engine, layout: Layout, kept: list[int], experts: int, devices: int, sidecar: Sidecar | None, wanted: Wanted
) -> Iterator[Finding]:
    """A stale map: on the traffic that is expected it balances no better than the engine's own start."""
    if wanted.load_LE is None:
        return
    if wanted.load_LE.shape != (len(kept), experts):
        message = f"the traffic has {list(wanted.load_LE.shape)} layers and experts, the file {[len(kept), experts]}"
        yield _fail("traffic", message, "give a trace of this model")
        return
    slots = len(layout.rows[0])
    rule = wanted.dispatch or (sidecar.dispatch if sidecar else engine.default or "even")

    def ratio(rows: list[tuple[int, ...]] | NDArray[np.int32]) -> float:
        placement = Placement(
            slots_LP=np.asarray(rows, np.int32),
            slots_G=np.full(devices, slots // devices, np.int32),
            experts=experts,
            layers=tuple(range(len(kept))),
            dispatch=rule,
        )
        assert wanted.load_LE is not None
        return float(imbalance_L(placement, wanted.load_LE).mean())

    rows, default = [layout.rows[index] for index in kept], np.stack([default_row(experts, slots)] * len(kept))
    if np.array_equal(rows, default):
        yield _remark(
            "traffic", f"this is the layout the engine starts with anyway; busiest over mean device {ratio(rows):.3f}", "plan from this trace"
        )
        return
    mine, start = ratio(rows), ratio(default)
    text = f"on this traffic busiest over mean device is {mine:.3f} under {rule!r}, {start:.3f} with the engine's own start"
    if mine >= start:
        yield _fail("traffic", text, "the placement was made from other traffic: plan again from a trace of this one")
    else:
        yield _ok("traffic", text)
