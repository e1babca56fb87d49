"""validate: predict what each rank of each plan takes, then execute the real layer and compare."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moesim.errors import InputError, PlanError, TraceError
from moesim.hardware import Cluster
from moesim.model import ModelSpec
from moesim.plan import Plan
from moesim.trace import NO_EXPERT, Trace
from moesim.validate.backends import Backend, pick_backend
from moesim.validate.calibrate import Calibration, awakener, calibrate
from moesim.validate.engines import Predicted, predict_plans
from moesim.validate.kept import Kept
from moesim.validate.layer import moe_layer
from moesim.validate.machine import check_device, check_free, clocks, hardware, on_device
from moesim.validate.ranks import Share, run, same_output, shares
from moesim.validate.score import TARGET, predict_case, summarise
from moesim.validate.timing import HOW, Graphs, Progress, flush_size, measure, typical
from moesim.validate.weights import DTYPES, ROUNDING, ExpertWeights

MODELLED = "network between ranks: no bytes leave the device; dispatch and combine times over links are not part of any measured figure"
LOST = "one device runs the ranks one after the other: contention with communication kernels, congestion and stragglers are not seen"
_LEAST_TOKENS = 16


def validate(
    trace: Trace,
    plans: Sequence[Plan],
    *,
    device: str = "cpu",
    weights: Mapping[int, ExpertWeights] | None = None,
    shape: ModelSpec | None = None,
    layers: Sequence[int] | None = None,
    cluster: Cluster | None = None,
    calibration: Calibration | None = None,
    backend: Backend | None = None,
    dtype: str | None = None,
    tokens: int | Sequence[int] = 2048,
    repeats: int = 15,
    flush: bool | None = None,
    seed: int = 0,
    keep: Path | None = None,
    progress: Progress = lambda share, what: None,
) -> dict[str, Any]:
    """Execute every rank of every layer of every plan on `device`, and compare with the prediction made before.

    Batches of `tokens` tokens of the trace are routed by each plan; each rank's resident experts compute the tokens it
    receives, in random order, `repeats` times. Outputs summed over ranks must equal the unplaced layer.

    weights   the model's own experts by absolute layer (default: random ones)
    shape     a model whose expert sizes are executed instead of the trace's own; its experts must be as many
    layers    absolute MoE layers to execute (default: all)
    cluster   where the exchanges that are not executed are modelled
    flush     write over the caches before every run (default: on a GPU)
    keep      file of finished batches, which are not measured again

    Without a `calibration` the device is calibrated first, on other expert shapes and other loads. Returns the validation
    section of a report, JSON-ready. Raises ValidationError when outputs differ or the device fails or is busy, TraceError
    when the trace has too few tokens.
    """
    check_device(device)
    check_free(device)
    sizes = _sizes(trace, shape)
    names = [plan.name for plan in plans]
    for plan in plans:
        plan.check_fits(trace.model, plan.placement.devices, place=f"plan {plan.name!r}")
    if not plans or repeats < 2 or len(set(names)) < len(names):
        raise InputError(f"plans {names} and repeats(={repeats}): give plans of different names, and two repeats to know the noise")
    rows = layer_rows(trace.model, layers)
    kind = dtype or ("bf16" if device.startswith("cuda") else "fp32")
    wanted: Backend = backend or ("grouped" if device.startswith("cuda") else "loop")
    used, notes = pick_backend(wanted, device=device, dtype=DTYPES[kind], gated=sizes.gated)
    cold = device.startswith("cuda") if flush is None else flush
    wanted_tokens = [tokens] if isinstance(tokens, int) else list(tokens)
    found = calibration or calibrate_for(
        sizes,
        device=device,
        backend=used,
        dtype=kind,
        resident=max(1, max(int(plan.placement.slots_G.max()) for plan in plans)),
        most_selections=2 * max(wanted_tokens) * sizes.top_k // min(plan.placement.devices for plan in plans),
        flush=cold,
        seed=seed + 1,
        keep=keep.with_name(keep.name + ".calibration") if keep else None,
        progress=lambda share, what: progress(share / 2, f"calibrating {what}"),
    )
    if (found.flush_B > 0) != cold or found.dtype != kind or found.backend != used:
        made, now = (", ".join(way) for way in (_way(found.backend, found.dtype, found.flush_B > 0), _way(used, kind, cold)))
        notes = (*notes, f"the calibration was made with {made}; this run with {now}")
    settings = {
        "what": "validation", "trace": trace.digest, "plans": [plan.digest for plan in plans], "shape": sizes.digest, "device": device,
        "hardware": hardware(device), "backend": used, "dtype": kind, "repeats": repeats, "cold": cold, "seed": seed, "layers": list(rows),
        "graphs": "counted", "halves": "kept",
    }  # fmt: skip
    kept = Kept(keep, settings)
    before = clocks(device)
    setting = _Setting(
        trace=trace, plans=plans, sizes=sizes, rows=rows, device=device, backend=used, dtype=kind, found=found,
        flush_B=flush_size(device) if cold else 0, repeats=repeats, seed=seed, own=weights, cluster=cluster,
    )  # fmt: skip
    batches = []
    with on_device(device, "validation"):
        for index, size in enumerate(wanted_tokens):
            share = partial(_part, progress, 0.5 + 0.5 * index / len(wanted_tokens), 0.5 / len(wanted_tokens), f"{size} tokens")
            batches.append(kept.step(f"{size} tokens", partial(_batch, setting, size, share)))
    cases = [{"batch": batch["batch"], **case} for batch in batches for case in batch.pop("cases")]
    summary = summarise(cases, found.table)
    worst = max(batch["deviation"] for batch in batches)
    notes = (*notes, *dict.fromkeys(note for batch in batches for note in batch["notes"]))
    if not cold:
        notes = (*notes, "caches were warm; the engines take weights to come from memory, and differ from moesim's prediction where weights fit")
    noise = summary["ranking"]["noise_floor"]
    if noise > TARGET["median_ape"]:
        notes = (*notes, f"noise floor {noise:.1%} exceeds the target of {TARGET['median_ape']:.0%} for errors: no error below it is a finding")
    return {
        "device": device,
        "backend": used,
        "dtype": kind,
        "hardware": found.hardware,
        "date": datetime.date.today().isoformat(),
        "timing": HOW[device.split(":")[0]],
        "clocks": [before, clocks(device)],
        "flush_B": setting.flush_B,
        "tokens": batches[-1]["tokens"],
        "repeats": repeats,
        "seed": seed,
        "trace": {"digest": trace.digest, "selection": trace.selection, "model": trace.model.name},
        "model": {
            "name": sizes.name,
            "hidden": sizes.hidden,
            "intermediate": sizes.intermediate,
            "gated": sizes.gated,
            "experts": sizes.experts,
            "top_k": trace.model.top_k,
        },
        "plans": [{"name": plan.name, "digest": plan.digest, "devices": plan.placement.devices} for plan in plans],
        "target": TARGET,
        "calibration": found.to_dict(),
        "batches": batches,
        "cases": cases,
        **summary,
        "checks": [
            {"name": "outputs equal the unplaced layer", "ok": True, "detail": f"largest relative deviation {worst:.1e} over {len(plans)} plans"},
            {"name": "lockstep and event engine agree", "ok": _engines_agree(cases), "detail": "on every rank's computation, without overlap"},
        ],
        "modelled": [MODELLED, *([f"exchanges modelled on {cluster.name}: column network_s of the batches' plans"] if cluster else []), LOST],
        "notes": list(notes),
    }


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Setting:
    """What every batch of a validation shares. `rows`: row in the trace → absolute layer; `own`: given experts by layer."""

    trace: Trace
    plans: Sequence[Plan]
    sizes: ModelSpec
    rows: Mapping[int, int]
    device: str
    backend: Backend
    dtype: str
    found: Calibration
    flush_B: int
    repeats: int
    seed: int
    own: Mapping[int, ExpertWeights] | None
    cluster: Cluster | None

    def weights(self, layer: int) -> ExpertWeights:
        """The experts of one layer: the given ones, or random ones."""
        if self.own is not None:
            return self.own[layer]
        s = self.sizes
        return ExpertWeights.random(
            experts=s.experts, hidden=s.hidden, intermediate=s.intermediate, gated=s.gated, dtype=DTYPES[self.dtype], device=self.device,
            seed=self.seed + layer,
        )  # fmt: skip


def _batch(setting: _Setting, size: int, progress: Progress) -> dict[str, Any]:
    """One batch: predicted, then executed layer by layer. JSON-ready."""
    trace, plans = setting.trace, setting.plans
    whole = math.lcm(*(plan.placement.devices for plan in plans))
    kept = min(size, trace.tokens) // whole * whole if min(size, trace.tokens) >= whole else min(size, trace.tokens)
    if kept < min(_LEAST_TOKENS, size // whole * whole or size):
        raise TraceError(f"{trace.path}: {trace.tokens} tokens are too few to validate with; select more")
    notes = [f"batch of {size}: {kept} tokens were executed, a whole number for every device"] if kept != size else []
    ids, gates = read_tokens(trace, kept)
    engines = predict_plans(trace.select(tokens=f"0:{kept}"), plans, setting.found, shape=setting.sizes, cluster=setting.cluster)
    work = [
        share
        for index, plan in enumerate(plans)
        for share in shares(plan.placement, ids, gates, node_G=_nodes(plan, setting.cluster), plan=index, device=setting.device)
        if share.layer in setting.rows
    ]
    cases = [_case(setting, share, engines) for share in work]
    predicted_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    deviation, graphs = 0.0, Graphs()
    for index, (row, layer) in enumerate(setting.rows.items()):
        mine = [i for i, share in enumerate(work) if share.layer == row]
        share_of = partial(_part, progress, index / len(setting.rows), 1 / len(setting.rows), f"layer {layer}")
        found, local, apart = _layer(setting, setting.weights(layer), [work[i] for i in mine], ids[:, row], gates[:, row], graphs, share_of)
        deviation = max(deviation, apart)
        for i, samples, (gather_s, combine_s) in zip(mine, found, local, strict=True):
            halves = [float(typical(samples[start::2], setting.device)) for start in (0, 1)]
            cases[i] |= {"measured_s": float(typical(samples, setting.device)), "halves_s": halves, "cv": float(samples.std() / samples.mean())}
            cases[i] |= {"gather_s": float(gather_s), "combine_s": float(combine_s), "samples_s": [round(float(s), 10) for s in samples]}
    network = [None if each.network_s_L is None else [float(each.network_s_L[row]) for row in setting.rows] for each in engines]
    return {
        "batch": size,
        "tokens": kept,
        "predicted_at": predicted_at,
        "measured_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "deviation": deviation,
        "network_s": dict(zip([plan.name for plan in plans], network, strict=True)),
        "cases": [case for case in cases if case["tokens"]],  # a rank nobody sends tokens to takes no time, predicted and measured
        "graphs": asdict(graphs),
        "notes": [*notes, *graphs.note(f"batch of {size}")],
    }


def _case(setting: _Setting, share: Share, engines: Sequence[Predicted]) -> dict[str, Any]:
    sizes, found = setting.sizes, setting.found
    shape = {"hidden": sizes.hidden, "intermediate": sizes.intermediate, "gated": sizes.gated, "top_k": setting.trace.model.top_k}
    case = {
        "plan": setting.plans[share.plan].name,
        "layer": setting.rows[share.layer],
        "rank": share.rank,
        "tokens": len(share.slots_N),
        "received": len(share.received_R),
        "counts": share.counts_P.tolist(),
        "experts": len(share.experts),
        "lockstep_s": float(engines[share.plan].lockstep_s_LG[share.layer, share.rank]),
        "event_s": float(engines[share.plan].event_s_LG[share.layer, share.rank]),
    }
    return case | {"predicted_s": predict_case(case, shape, found.peak, found.fit.kernel, cold=setting.flush_B > 0)}


def _layer(
    setting: _Setting, own: ExpertWeights, work: Sequence[Share], ids_TK: NDArray[np.uint16], gates_TK: NDArray[np.float32],
    graphs: Graphs, progress: Progress,
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:  # fmt: skip
    """Seconds of every rank's computation [shares, repeats], of its local gather and combine [shares, 2], and the deviation.

    One pool of slots and one of rows hold each rank's experts and tokens in turn, so memory does not grow with ranks and plans.
    """
    device = setting.device
    hidden = torch.randn(len(ids_TK), own.up.shape[2], generator=torch.Generator().manual_seed(setting.seed)).to(device, own.activations)
    pool = own.like(max(1, max(len(share.experts) for share in work)))
    resident = [pool.first(len(share.experts)) for share in work]
    arrived = torch.empty(max(len(share.received_R) for share in work), hidden.shape[1], dtype=hidden.dtype, device=device)
    received = [arrived[: len(share.received_R)] for share in work]

    def fill(share: Share) -> None:
        for slot, expert in enumerate(share.experts):
            pool.put(slot, own, expert, non_blocking=True)
        torch.index_select(hidden, 0, share.received_R, out=arrived[: len(share.received_R)])

    fills = [partial(fill, share) for share in work]
    with torch.inference_mode():
        deviation = _check_outputs(work, resident, fills, own, hidden, ids_TK, gates_TK, setting.backend)
        computing = [_quiet(partial(run, share, rows, mine, setting.backend)) for share, rows, mine in zip(work, received, resident, strict=True)]
        times = measure(
            computing, repeats=setting.repeats, seed=setting.seed, device=device, flush_B=setting.flush_B, before=fills,
            awake=awakener(device, setting.backend, setting.dtype, own.gated), graphs=graphs, progress=progress,
        )  # fmt: skip
        out = torch.zeros_like(hidden)
        local = [_quiet(partial(torch.index_select, hidden, 0, share.received_R)) for share in work]
        local += [_quiet(partial(out.index_add_, 0, share.received_R, rows)) for share, rows in zip(work, received, strict=True)]
        again = max(3, setting.repeats // 3)
        moved = measure(local, repeats=again, seed=setting.seed, device=device, flush_B=setting.flush_B, before=[*fills, *fills], graphs=graphs)
    return times, typical(moved, device).reshape(2, -1).T, deviation


def _check_outputs(
    work: Sequence[Share], resident: Sequence[ExpertWeights], fills: Sequence[Callable[[], None]], own: ExpertWeights, hidden: torch.Tensor,
    ids_TK: NDArray[np.uint16], gates_TK: NDArray[np.float32], backend: Backend,
) -> float:  # fmt: skip
    """Largest deviation of any plan's summed ranks from the layer that holds all experts."""
    rows, columns = np.nonzero(ids_TK != NO_EXPERT)
    slots, tokens = (torch.as_tensor(x.astype(np.int64), device=hidden.device) for x in (ids_TK[rows, columns], rows))
    whole = moe_layer(hidden, slots, tokens, torch.as_tensor(gates_TK[rows, columns], device=hidden.device), own, backend=backend)
    worst = 0.0
    for plan in dict.fromkeys(share.plan for share in work):  # one at a time: their outputs together need not fit
        parts = []
        for share, mine, fill in zip(work, resident, fills, strict=True):
            if share.plan == plan:
                fill()
                parts.append((share, run(share, hidden[share.received_R], mine, backend)))
        worst = max(worst, same_output(parts, whole, tolerance=ROUNDING[hidden.dtype]))
    return worst


def calibrate_for(
    model: ModelSpec,
    *,
    device: str,
    resident: int,
    most_selections: int,
    backend: Backend = "loop",
    dtype: str | None = None,
    flush: bool | None = None,
    loads: int = 24,
    seed: int = 1,
    keep: Path | None = None,
    progress: Progress = lambda share, what: None,
) -> Calibration:
    """Calibrate a device around a model's experts, on neighbouring shapes: never the validated shape itself.

    `resident` experts per measured layer, up to `most_selections` selections in all.
    """
    hidden, width = model.hidden, model.intermediate
    neighbours = [(hidden // 2, width), (hidden, width // 2), (2 * hidden, width), (hidden, 2 * width)]
    return calibrate(
        device,
        [(max(16, h // 8 * 8), max(16, f // 8 * 8)) for h, f in neighbours],
        experts=resident,
        top_k=min(model.top_k, resident),
        most_tokens=max(64, most_selections),
        backend=backend,
        dtype=dtype or ("bf16" if device.startswith("cuda") else "fp32"),
        gated=model.gated,
        loads=loads,
        flush=flush,
        seed=seed,
        keep=keep,
        progress=progress,
    )


def _sizes(trace: Trace, shape: ModelSpec | None) -> ModelSpec:
    """The trace's model with the expert sizes of `shape`."""
    if shape is None:
        return trace.model
    if shape.experts != trace.model.experts:
        raise PlanError(f"--shape {shape.name!r} has {shape.experts} experts, the trace {trace.model.experts}; choose a model with as many")
    return replace(trace.model, name=shape.name, hidden=shape.hidden, intermediate=shape.intermediate, gated=shape.gated)


def layer_rows(model: ModelSpec, layers: Sequence[int] | None) -> dict[int, int]:
    """Row in the trace → absolute layer, of the layers to execute."""
    chosen = model.moe_layers if layers is None else tuple(layers)
    if not chosen or (unknown := sorted(set(chosen) - set(model.moe_layers))):
        raise InputError(f"layers {list(chosen)}: {model.name!r} has MoE layers {list(model.moe_layers)}{'' if not chosen else f', not {unknown}'}")
    return {model.moe_layers.index(layer): layer for layer in chosen}


def read_tokens(trace: Trace, tokens: int) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    """First `tokens` selected tokens: ids [T, L, K] and gate weights, equal ones where the trace has none."""
    ids: list[NDArray[np.uint16]] = []
    gates: list[NDArray[Any]] = []
    for batch in trace.batches(rows=tokens, weights=trace.info.weights):
        ids.append(batch.experts_TLK)
        gates.append(np.full(batch.experts_TLK.shape, 1 / trace.info.top_k, np.float32) if batch.weights_TLK is None else batch.weights_TLK)
        if sum(map(len, ids)) >= tokens:
            break
    return np.concatenate(ids)[:tokens], np.concatenate(gates)[:tokens].astype(np.float32)


def _nodes(plan: Plan, cluster: Cluster | None) -> NDArray[np.int64]:
    return np.zeros(plan.placement.devices, np.int64) if cluster is None else cluster.node_G.astype(np.int64)


def _way(backend: str, dtype: str, cold: bool) -> tuple[str, str, str]:
    return backend, dtype, "caches flushed" if cold else "caches warm"


def _engines_agree(cases: Sequence[Mapping[str, Any]]) -> bool:
    pairs = np.array([(case["lockstep_s"], case["event_s"]) for case in cases])
    return bool(np.allclose(pairs[:, 0], pairs[:, 1], rtol=1e-9, atol=0))


def _part(progress: Progress, start: float, share: float, what: str, done: float, _: str) -> None:
    progress(start + share * done, what)


def _quiet(call: Callable[[], object]) -> Callable[[], object]:
    def without_gradients() -> object:
        with torch.inference_mode():
            return call()

    return without_gradients
