"""validate: predict what each rank of each plan takes, then execute the real layer and compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moesim.cost.experts import ComputePeak, ExpertKernel, expert_time_s
from moesim.errors import InputError, TraceError
from moesim.model import ModelSpec
from moesim.plan import Plan
from moesim.trace import NO_EXPERT, Trace
from moesim.validate.agreement import errors, ranking
from moesim.validate.calibrate import Calibration, Progress, calibrate, check_device
from moesim.validate.layer import Backend, ExpertWeights, moe_layer
from moesim.validate.ranks import Share, measure, run, same_output, shares

MODELLED = ("network between ranks: no bytes leave the device, dispatch and combine times are not part of any figure here",)


def validate(
    trace: Trace,
    plans: Sequence[Plan],
    *,
    device: str = "cpu",
    weights: Mapping[int, ExpertWeights] | None = None,
    calibration: Calibration | None = None,
    backend: Backend = "loop",
    tokens: int = 2048,
    repeats: int = 15,
    seed: int = 0,
    progress: Progress = lambda share, what: None,
) -> dict[str, Any]:
    """Execute every rank of every layer of every plan on `device`, and compare with the prediction made before.

    A batch of `tokens` tokens of the trace is routed by each plan; each rank's resident experts compute the tokens it
    receives, in random order, `repeats` times. `weights` are the model's own experts by absolute layer (default: random
    ones of its shape). Without a `calibration` the device is calibrated first, on other expert shapes and other loads.
    Outputs summed over ranks must equal the unplaced layer. Returns the validation section of a report, JSON-ready.

    Raises ValidationError when outputs differ or the device fails, TraceError when the trace has too few tokens.
    """
    check_device(device)
    model = trace.model
    for plan in plans:
        plan.check_fits(model, plan.placement.devices, place=f"plan {plan.name!r}")
    if not plans or repeats < 2:
        raise InputError(f"{len(plans)} plans and repeats(={repeats}): give at least one plan, and two repeats to know the noise")
    ids, gates = _batch(trace, tokens)
    own = weights or _random_weights(model, device, seed)
    found = calibration or calibrate_for(
        model,
        device=device,
        backend=backend,
        resident=max(1, max(int(plan.placement.slots_G.max()) for plan in plans)),
        most_selections=2 * len(ids) * model.top_k // min(plan.placement.devices for plan in plans),
        seed=seed + 1,
        progress=lambda share, what: progress(share / 2, "calibrating"),
    )
    hidden = torch.randn(len(ids), model.hidden, generator=torch.Generator().manual_seed(seed)).to(device, own[model.moe_layers[0]].up.dtype)

    work = [
        share
        for index, plan in enumerate(plans)
        for share in shares(plan.placement, ids, gates, node_G=np.zeros(plan.placement.devices, int), plan=index, device=device)
    ]
    predicted = np.array([_predict(share, model, found.peak, found.fit.kernel) for share in work])
    resident = [own[model.moe_layers[share.layer]].take(list(share.experts)) for share in work]
    deviation = _check_outputs(work, resident, own, hidden, ids, gates, model, backend)
    calls = [_quiet(partial(run, share, hidden[share.received_R], held, backend)) for share, held in zip(work, resident, strict=True)]
    times = measure(calls, repeats=repeats, seed=seed, device=device, progress=lambda share, what: progress(0.5 + share / 2, "measuring"))
    busy = np.array([len(share.slots_N) > 0 for share in work])
    measured = np.median(times, axis=1)
    counted = np.array([len(share.slots_N) for share in work], float)
    naive = _tokens_only(found, counted)

    def layer_sums(values: NDArray[np.float64]) -> NDArray[np.float64]:
        """[plans] sum over layers of the slowest rank: what the plan's expert computation takes."""
        slowest = np.zeros((len(plans), len(model.moe_layers)))
        for share, value in zip(work, values, strict=True):
            slowest[share.plan, share.layer] = max(slowest[share.plan, share.layer], value)
        return np.asarray(slowest.sum(axis=1))

    halves = np.stack([layer_sums(np.median(times[:, start::2], axis=1)) for start in (0, 1)])
    noise = float(np.median(np.abs(halves[0] / halves[1] - 1)))
    names = [plan.name for plan in plans]
    return {
        "device": device,
        "backend": backend,
        "hardware": found.hardware,
        "date": found.date,
        "timing": "CUDA events" if device.startswith("cuda") else "processor time of one thread",
        "tokens": len(ids),
        "repeats": repeats,
        "trace": {"digest": trace.digest, "selection": trace.selection},
        "calibration": {key: value for key, value in found.to_dict().items() if key != "table"},
        "cases": [
            {
                "plan": names[share.plan],
                "layer": model.moe_layers[share.layer],
                "rank": share.rank,
                "tokens": int(counted[i]),
                "counts": share.counts_P.tolist(),
                "experts": len(share.experts),
                "predicted_s": float(predicted[i]),
                "measured_s": float(measured[i]),
                "cv": float(times[i].std() / times[i].mean()),
            }
            for i, share in enumerate(work)
            if busy[i]  # a rank nobody sends tokens to takes no time, predicted and measured
        ],
        "summary": errors(predicted[busy], measured[busy]),
        "models": {"moesim": errors(predicted[busy], measured[busy]), "tokens-only": errors(naive[busy], measured[busy])},
        "per_rank_spearman": _per_rank(predicted[busy], measured[busy]),
        "ranking": ranking(names, layer_sums(predicted), layer_sums(measured), noise),
        "ranking_tokens_only": ranking(names, layer_sums(naive), layer_sums(measured), noise),
        "checks": [
            {"name": "outputs equal the unplaced layer", "ok": True, "detail": f"largest relative deviation {deviation:.1e} over {len(plans)} plans"}
        ],
        "modelled": list(MODELLED),
    }


def calibrate_for(
    model: ModelSpec,
    *,
    device: str,
    resident: int,
    most_selections: int,
    backend: Backend = "loop",
    loads: int = 24,
    seed: int = 1,
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
        dtype="bf16" if device.startswith("cuda") else "fp32",
        gated=model.gated,
        loads=loads,
        seed=seed,
        progress=progress,
    )


def _batch(trace: Trace, tokens: int) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    """First `tokens` selected tokens: ids [T, L, K] and gate weights, equal ones where the trace has none."""
    ids: list[NDArray[np.uint16]] = []
    gates: list[NDArray[Any]] = []
    for batch in trace.batches(rows=tokens, weights=trace.info.weights):
        ids.append(batch.experts_TLK)
        gates.append(np.full(batch.experts_TLK.shape, 1 / trace.info.top_k, np.float32) if batch.weights_TLK is None else batch.weights_TLK)
        if sum(map(len, ids)) >= tokens:
            break
    found = np.concatenate(ids)[:tokens]
    if len(found) < 16:
        raise TraceError(f"{trace.path}: {len(found)} tokens are too few to validate with; select more")
    return found, np.concatenate(gates)[:tokens].astype(np.float32)


def _random_weights(model: ModelSpec, device: str, seed: int) -> dict[int, ExpertWeights]:
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    return {
        layer: ExpertWeights.random(
            experts=model.experts,
            hidden=model.hidden,
            intermediate=model.intermediate,
            gated=model.gated,
            dtype=dtype,
            device=device,
            seed=seed + layer,
        )
        for layer in model.moe_layers
    }


def _predict(share: Share, model: ModelSpec, peak: ComputePeak, kernel: ExpertKernel) -> float:
    if not share.experts:
        return 0.0
    time = expert_time_s(
        share.counts_P,
        hidden=model.hidden,
        intermediate=model.intermediate,
        gated=model.gated,
        top_k=model.top_k,
        peak=peak,
        kernel=kernel,
        tokens_N=[len(share.received_R)],
        warm_cache=True,
    )
    return float(time.time_s_N[0])


def _check_outputs(
    work: Sequence[Share], resident: Sequence[ExpertWeights], own: Mapping[int, ExpertWeights], hidden: torch.Tensor, ids: NDArray[np.uint16],
    gates: NDArray[np.float32], model: ModelSpec, backend: Backend,
) -> float:  # fmt: skip
    """Largest deviation of any plan's summed ranks from the layer that holds all experts."""
    worst = 0.0
    chosen = ids != NO_EXPERT
    with torch.inference_mode():
        for layer in range(ids.shape[1]):
            rows, columns = np.nonzero(chosen[:, layer])
            whole = moe_layer(
                hidden,
                torch.as_tensor(ids[rows, layer, columns].astype(np.int64), device=hidden.device),
                torch.as_tensor(rows, device=hidden.device),
                torch.as_tensor(gates[rows, layer, columns], device=hidden.device),
                own[model.moe_layers[layer]],
                backend=backend,
            )
            by_plan: dict[int, list[tuple[Share, torch.Tensor]]] = {}
            for share, held in zip(work, resident, strict=True):
                if share.layer == layer:
                    by_plan.setdefault(share.plan, []).append((share, run(share, hidden[share.received_R], held, backend)))
            tolerance = 1e-4 if hidden.dtype == torch.float32 else 3e-2
            worst = max(worst, *(same_output(parts, whole, tolerance=tolerance) for parts in by_plan.values()))
    return worst


def _tokens_only(found: Calibration, selections: NDArray[np.float64]) -> NDArray[np.float64]:
    """The naive peer: time = a + b x tokens, least relative squares on the same calibration table."""
    n = (found.table["num_tokens"] * found.table["topk"]).to_numpy(float)
    seconds = found.table["latency_ms"].to_numpy(float) / 1e3
    design = np.stack([np.ones_like(n), n], axis=1) / seconds[:, None]
    a, b = np.linalg.lstsq(design, np.ones(len(n)), rcond=None)[0]
    return np.asarray(a + b * selections)


def _per_rank(predicted: NDArray[np.float64], measured: NDArray[np.float64]) -> float | None:
    from scipy.stats import spearmanr

    return float(spearmanr(predicted, measured).statistic) if len(predicted) > 2 else None


def _quiet(call: Callable[[], object]) -> Callable[[], object]:
    def without_gradients() -> object:
        with torch.inference_mode():
            return call()

    return without_gradients
