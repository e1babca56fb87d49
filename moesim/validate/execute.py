"""Plans carried out, beyond their ranks' times: caches, migrations, processes; each judged exactly where it can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moesim.cost.copies import CopyPath
from moesim.cost.experts import ComputePeak
from moesim.errors import InputError, PlanError
from moesim.files import read_json
from moesim.model import ModelSpec
from moesim.plan import CachePlan, Plan, load_cache_plan, load_plan
from moesim.plan.cache import NVME
from moesim.replay import Prefetcher
from moesim.systems.residency import foreseeing
from moesim.trace import NO_EXPERT, Trace
from moesim.units import human
from moesim.validate.backends import Backend
from moesim.validate.calibrate import kernel_of
from moesim.validate.ceilings import fit_copies, measure_copies
from moesim.validate.migrate import execute_migration
from moesim.validate.offload import execute_cache
from moesim.validate.processes import execute_processes
from moesim.validate.ranks import shares
from moesim.validate.score import predict_case
from moesim.validate.stalls import measure_way
from moesim.validate.timing import Progress
from moesim.validate.validate import layer_rows, read_tokens
from moesim.validate.weights import DTYPES, ExpertWeights, pinned


def load_plans(paths: Sequence[Path]) -> tuple[list[Plan], list[CachePlan]]:
    """Placements and cache plans among the files, by their kind. InputError without a placement."""
    placements, caches = [], []
    for path in paths:
        data = read_json(path, PlanError)
        if isinstance(data, dict) and data.get("kind") == "cache":
            caches.append(load_cache_plan(path))
        else:
            placements.append(load_plan(path))
    if not placements:
        raise InputError("no placement among the plans: ranks are executed as a placement says; give one that `moesim place` wrote")
    return placements, caches


def placement_of(cache: CachePlan, placements: Sequence[Plan], model: ModelSpec) -> Plan:
    """The placement a cache plan was made for, else the first; PlanError where it fits neither that nor the model."""
    plan = next((each for each in placements if each.digest == cache.placement), placements[0])
    cache.check_fits(model, plan, place=f"cache plan {cache.name!r}")
    return plan


def execute(
    trace: Trace,
    placements: Sequence[Plan],
    caches: Sequence[CachePlan],
    found: Mapping[str, Any],
    *,
    sizes: ModelSpec | None = None,
    device: str = "cpu",
    tokens: int = 2048,
    layers: Sequence[int] | None = None,
    step_tokens: int = 1,
    migrate: bool = False,
    processes: bool = False,
    seed: int = 0,
    progress: Progress = lambda share, what: None,
) -> list[dict[str, Any]]:
    """Carry out cache plans, the migrations from each placement to the next, and placements with a process per device.

    `found` is the validation (`validate`): its back-end and dtype are used. Cache plans serve steps of `step_tokens` tokens.
    Migrations and processes run the first of `layers`. Each entry has kind, name, a sentence `detail`, measured_s and
    predicted_s where both exist, and all figures. Raises what the executions raise: ValidationError for anything that is not
    exactly as it must be.
    """
    shape = sizes or trace.model
    rows = layer_rows(trace.model, layers)
    backend, dtype = found["backend"], found["dtype"]
    done: list[dict[str, Any]] = []
    if not (caches or processes or (migrate and len(placements) > 1)):
        return done
    ids, gates = read_tokens(trace, min(tokens, trace.tokens))
    make = partial(_experts, shape, dtype, seed)
    for cache in caches:
        done.append(_cache(cache, placement_of(cache, placements, trace.model), ids, gates, rows, make, device, backend, step_tokens, progress))
    row, layer = next(iter(rows.items()))
    path = inside_path(device) if migrate and len(placements) > 1 else None
    for old, new in pairwise(placements) if migrate else ():
        one = execute_migration(
            old.placement, new.placement, row, make(layer, device), ids[:, row], gates[:, row],
            device=device, backend=backend, path=path, seed=seed, progress=progress,
        )  # fmt: skip
        slower = "nothing moved" if one["slowdown"] is None else f"serving beside a copy x {one['slowdown']:.2f} (noise {one['noise_floor']:.0%})"
        detail = f"{one['moves']} experts, {human(one['bytes'], 'B')} of layer {layer}; outputs equal to {one['deviation']:.0e} throughout; {slower}"
        done.append({"kind": "migration", "name": f"{old.name} to {new.name}", "detail": detail, "measured_s": one["copy_s"],
                     "predicted_s": one["predicted_copy_s"], "figures": one})  # fmt: skip
    for plan in placements if processes else ():
        one = execute_processes(
            plan.placement, row, ids, gates, hidden=shape.hidden, intermediate=shape.intermediate, gated=shape.gated,
            dtype=dtype, device=device, backend=backend, seed=seed,
        )  # fmt: skip
        predicted = _predicted(plan, ids, gates, row, found)
        for each, seconds in zip(one["per_rank"], predicted, strict=False):
            each["predicted_compute_s"] = seconds
        slowest = max(each["compute_s"] for each in one["per_rank"])
        detail = (
            f"{one['ranks']} ranks over {one['transport']}, layer {layer}: outputs equal to {one['deviation']:.0e}, copies as simulated; "
            f"slowest rank: dispatch {human(max(r['dispatch_s'] for r in one['per_rank']), 's')}, compute {human(slowest, 's')}, "
            f"combine {human(max(r['combine_s'] for r in one['per_rank']), 's')}"
        )
        done.append({"kind": "processes", "name": plan.name, "detail": detail, "measured_s": slowest,
                     "predicted_s": max(predicted) if predicted else None, "figures": one})  # fmt: skip
    return done


def _predicted(plan: Plan, ids: NDArray[np.uint16], gates: NDArray[np.float32], row: int, found: Mapping[str, Any]) -> list[float]:
    """Seconds of every rank's computation by the calibration of a validation, empty without one; exchanges have no prediction here."""
    known = found.get("calibration")
    if not known:
        return []
    peak, kernel = ComputePeak(**known["peak"]), kernel_of(known["kernel"])
    parts = [part for part in shares(plan.placement, ids, gates, node_G=np.zeros(plan.placement.devices, np.int64)) if part.layer == row]
    cases = [{"counts": part.counts_P.tolist(), "received": len(part.received_R)} for part in parts]
    return [predict_case(case, found["model"], peak, kernel, cold=found["flush_B"] > 0) for case in cases]


def inside_path(device: str) -> CopyPath:
    """Copies from device to device as they are on this machine now, or inside the one device."""
    fits = fit_copies(measure_copies(device, sizes_B=(2**20, 2**22, 2**24)))
    way = "device-to-device" if "device-to-device" in fits else "inside-device"
    return CopyPath(latency_s=fits[way]["latency_s"], bandwidth_Bps=fits[way]["bandwidth_Bps"], bottleneck=way)


def prefetcher_of(cache: CachePlan) -> tuple[Prefetcher | None, tuple[str, ...]]:
    """The prefetcher a cache plan names, and a remark where it cannot be executed from a trace alone."""
    try:
        found = foreseeing(cache.prefetcher, cache.distance, cache.recall)
    except InputError:
        return None, (f"prefetcher {cache.prefetcher!r} needs more than this trace: executed without prefetching",)
    early = (f"experts were copied one layer ahead, the plan says {cache.distance}",) if found and cache.distance != 1 else ()
    return found, early


def _cache(
    cache: CachePlan, plan: Plan, ids: NDArray[np.uint16], gates: NDArray[np.float32], rows: Mapping[int, int], make: Any,
    device: str, backend: Backend, step_tokens: int, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """One cache plan, device after device: each sees the selections that its placement sends it."""
    chosen = list(rows)
    prefetcher, notes = prefetcher_of(cache)
    if (cache.tier_LE == NVME).any():
        notes = (*notes, "experts on NVMe were executed from host memory")
    hosts = [pinned(host) if device.startswith("cuda") else host for host in (make(layer, "cpu") for layer in rows.values())]
    if set(np.unique(cache.bits_LE[chosen])) != {8.0 * hosts[0].up.element_size()}:
        notes = (*notes, f"weights were held in {hosts[0].up.dtype}, not in the plan's bits")
    way = measure_way(hosts[0], device, total_B=sum(part.nbytes for host in hosts for part in host.parts))
    per_device = []
    parts = shares(plan.placement, ids, gates, node_G=np.zeros(plan.placement.devices, np.int64))
    for rank in range(plan.placement.devices):
        mine = np.full(ids.shape, NO_EXPERT, np.uint16)
        for part in parts:
            if part.rank == rank:
                token_N, k_N = np.divmod(part.place_N.numpy(), ids.shape[2])
                mine[token_N, part.layer, k_N] = ids[token_N, part.layer, k_N]
        pinned = (cache.pinned_LE & plan.placement.holds_LGE[:, rank])[chosen]
        one = execute_cache(
            mine[:, chosen], gates[:, chosen], hosts, policy=cache.policy, slots=cache.slots_LG[chosen, rank], tokens_per_step=step_tokens,
            prefetcher=prefetcher, pinned_LE=pinned, device=device, backend=backend, way=way, progress=progress,
        )  # fmt: skip
        per_device.append(one)
        notes = (*notes, *one.pop("notes"))
    accesses, hits = (sum(one[name] for one in per_device) for name in ("accesses", "hits"))
    measured, predicted = (float(sum(one[name]["total"] for one in per_device)) for name in ("stall_s", "predicted_stall_s"))
    detail = f"{hits:,} of {accesses:,} accesses hit, every one as simulated; outputs as resident; stall {human(measured, 's')} in all"
    return {
        "kind": "cache", "name": cache.name, "detail": detail, "measured_s": measured, "predicted_s": predicted, "notes": list(dict.fromkeys(notes)),
        "figures": {"policy": cache.policy, "per_device": per_device, "step_tokens": step_tokens},
    }  # fmt: skip


def _experts(shape: ModelSpec, dtype: str, seed: int, layer: int, device: str) -> ExpertWeights:
    kind: torch.dtype = DTYPES[dtype]
    return ExpertWeights.random(
        experts=shape.experts, hidden=shape.hidden, intermediate=shape.intermediate, gated=shape.gated, dtype=kind, device=device, seed=seed + layer
    )
