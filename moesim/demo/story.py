"""The whole story on one machine: train, capture, inspect, place, simulate, execute, report."""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.cost import CostModel
from moesim.demo.corpus import load_corpus, split
from moesim.demo.train import SEQUENCE, build_model, train
from moesim.errors import ValidationError
from moesim.hardware import Cluster
from moesim.optimize import compare, score, solver_infos
from moesim.plan import Plan
from moesim.trace import NO_EXPERT, Trace, load_trace
from moesim.trace.inspect import inspect
from moesim.validate.calibrate import Calibration
from moesim.validate.validate import calibrate_for, validate
from moesim.validate.weights import ExpertWeights

Progress = Callable[[float, str], None]
HELD_OUT_WINDOWS = 24  # per domain: 3,072 tokens
BATCH = 1536  # tokens of one step, simulated and executed: half of a domain's


@dataclass(frozen=True, kw_only=True)
class Told:
    """What the demo did: the report's document, and where things are."""

    document: dict[str, Any]
    plans: list[Plan]
    trace: Path


def tell(
    out: Path,
    *,
    cluster: Cluster,
    steps: int,
    seed: int = 0,
    device: str | None = None,
    progress: Callable[[str], Progress],
    say: Callable[[str], None],
) -> Told:
    """Run every chapter and return the document of the report. `progress(chapter)` gives a chapter's progress function."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    begin = time.perf_counter()
    corpus = load_corpus()
    parts = {name: split(text) for name, text in corpus.items()}
    model = build_model(seed=seed)
    training = _train(
        model,
        {name: part[0] for name, part in parts.items()},
        out / "trace-training",
        steps=steps,
        seed=seed,
        device=device,
        progress=progress("training"),
    )
    say(f"trained {training['parameters']:,} parameters for {steps} steps: loss {training['loss'][0]:.2f} -> {np.mean(training['loss'][-5:]):.2f}")

    _capture_held_out(model, {name: part[1] for name, part in parts.items()}, out / "trace", device)
    trace = load_trace(out / "trace")
    checked = check_capture(model, {name: part[1] for name, part in parts.items()}, trace, device)
    say(f"captured {trace.tokens:,} held-out tokens of {len(corpus)} domains; {checked:,} expert ids equal those recomputed from the router's logits")
    inspection = inspect(trace)
    home = next(iter(corpus))
    calibration = calibrate_for(
        trace.model,
        device=device,
        resident=-(-trace.model.experts // cluster.size),
        most_selections=BATCH * trace.model.top_k,
        seed=seed + 1,
        progress=progress("calibrating"),
    )
    here = {d.name for d in cluster.devices if d.kind == "cpu" == device}  # the cluster's ranks are cores of this machine
    cost = CostModel.of(cluster, trace.model, measured=dict.fromkeys(here, (calibration.peak, calibration.fit.kernel)))
    names = [info.name for info in solver_infos() if info.available and info.solves == "placement"]
    plans, comparison = compare(
        trace,
        cluster,
        sorted(names, key=lambda name: (name != "linear", name)),
        home=home,
        tokens_per_device=BATCH // cluster.size,
        cost=cost,
        seed=seed,
        time_limit_s=4.0,
        progress=progress("placing"),
    )
    best = min(comparison["scored_on"][1]["plans"], key=lambda row: row["layer_time_s"])
    say(f"placed {trace.model.experts} experts on {cluster.name} with {len(plans)} solvers; fastest on unseen {home} tokens: {best['name']}")

    validation = _validate(
        model, trace.select(domain=home).select(tokens="50%:"), plans, calibration, device=device, seed=seed, progress=progress("executing")
    )
    say(f"executed the real layer rank by rank: {validation['ranking']['verdict']}")
    results = score(trace.select(domain=home).select(tokens="50%:"), plans, cluster, tokens_per_device=BATCH // cluster.size, cost=cost)
    document = {
        "schema_version": 1,
        "title": "A Mixture-of-Experts model, from training to a checked placement",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": f"moesim demo --steps {steps} --seed {seed} --cluster {cluster.name}",
        "versions": {name: version(name) for name in ("moesim", "torch", "transformers", "numpy", "scipy", "numba")}
        | {"python": platform.python_version()},
        "machine": {"system": platform.platform(), "cores": os.cpu_count(), "device": device, **validation["hardware"]},
        "training": {**training, "domains": {name: len(text) for name, text in corpus.items()}},
        "inspection": inspection.to_dict(),
        "comparison": comparison,
        "results": [result.to_dict() for result in results],
        "validation": validation,
        "notes": list(results[0].notes),
        "seconds": round(time.perf_counter() - begin, 1),
    }
    return Told(document=document, plans=plans, trace=out / "trace")


def _train(
    model: Any, texts: Mapping[str, NDArray[np.uint8]], path: Path, *, steps: int, seed: int, device: str, progress: Progress
) -> dict[str, Any]:
    from moesim.capture import capture

    begin = time.perf_counter()
    every = max(1, steps // 20)  # snapshots of twenty steps show how routing settles
    with capture(model, path, every=every) as recorder:
        losses = train(
            model,
            texts,
            steps=steps,
            seed=seed,
            device=device,
            before=lambda step, microbatch, domain: recorder.step(step, microbatch=microbatch, domain=domain),
            progress=lambda step, loss: progress((step + 1) / steps, f"loss {loss:.2f}"),
        )
    seconds = time.perf_counter() - begin
    return {
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "loss": [round(loss, 4) for loss in losses],
        "seconds": round(seconds, 1),
        "capture_overhead": (recorder.overhead_s + recorder.writer_s) / seconds,
        "drift_over_training": inspect(load_trace(path)).drift_over_steps.mean(axis=1).tolist(),
    }


def _windows(text: NDArray[np.uint8]) -> Any:
    import torch

    count = min(HELD_OUT_WINDOWS, len(text) // SEQUENCE)
    starts = np.linspace(0, len(text) - SEQUENCE, count).astype(int)
    return torch.from_numpy(np.stack([text[start : start + SEQUENCE] for start in starts]).astype(np.int64))


def _capture_held_out(model: Any, texts: Mapping[str, NDArray[np.uint8]], path: Path, device: str) -> None:
    """Prefill of held-out windows, domain by domain, and a few decoded tokens of each."""
    import torch

    from moesim.capture import capture

    model.eval()
    with torch.inference_mode(), capture(model, path) as recorder:
        for step, (domain, text) in enumerate(texts.items()):
            recorder.step(step, domain=domain)
            model(input_ids=_windows(text).to(device))


def check_capture(model: Any, texts: Mapping[str, NDArray[np.uint8]], trace: Trace, device: str) -> int:
    """Recompute every expert id from the router's logits in a second pass; returns how many were equal.

    Raises ValidationError at the first difference that is not a tie between equal logits.
    """
    import torch

    model.eval()
    count = 0
    for domain, text in texts.items():
        with torch.inference_mode():
            logits = model(input_ids=_windows(text).to(device), output_router_logits=True).router_logits
        captured = trace.select(domain=domain).experts()
        for index, layer in enumerate(trace.model.moe_layers):
            scores = logits[index].float().cpu().numpy()
            mine = captured[:, index].astype(np.int64)
            expected = np.sort(np.argsort(-scores, axis=1, kind="stable")[:, : mine.shape[1]], axis=1)
            if scores.shape[0] != len(mine) or (mine == NO_EXPERT).any():
                raise ValidationError(f"layer {layer}, {domain}: {len(mine)} tokens captured, {scores.shape[0]} recomputed")
            for token in np.flatnonzero((np.sort(mine, axis=1) != expected).any(axis=1)):
                if not np.allclose(np.sort(scores[token, mine[token]]), np.sort(scores[token, expected[token]]), rtol=1e-5, atol=1e-6):
                    raise ValidationError(
                        f"layer {layer}, {domain}, token {token}: captured {mine[token].tolist()}, the router chose {expected[token].tolist()}"
                    )
            count += mine.size
    return count


def _validate(
    model: Any, trace: Trace, plans: Sequence[Plan], calibration: Calibration, *, device: str, seed: int, progress: Progress
) -> dict[str, Any]:
    """Execute the trained experts themselves under every plan."""
    experts = {layer: model.model.layers[layer].mlp.experts for layer in trace.model.moe_layers}
    weights = {layer: ExpertWeights(up=module.gate_up_proj.detach(), down=module.down_proj.detach(), gated=True) for layer, module in experts.items()}
    return validate(trace, plans, device=device, weights=weights, calibration=calibration, tokens=BATCH, repeats=11, seed=seed, progress=progress)
