"""Lockstep engine: every layer is dispatch, slowest device, combine. Vectorised over steps x layers x devices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from moesim.cost import CostModel
from moesim.cost.collectives import PORTS
from moesim.errors import TraceError
from moesim.hardware import Cluster
from moesim.plan import Plan
from moesim.result import Result
from moesim.sim.layers import layer_times, sent_LGG
from moesim.systems.slicing import Sliced
from moesim.systems.transforms import Edit
from moesim.trace import Trace

CHUNK_TOKENS = 1 << 16
CHUNK_COUNTS = 1 << 23  # pairs of devices counted at a time: 64 MiB
_Item = TypeVar("_Item")


def simulate(
    trace: Trace,
    plan: Plan,
    cluster: Cluster,
    *,
    tokens_per_device: int = 4096,
    cost: CostModel | None = None,
    slices: int = 1,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Result:
    """Result of running a trace's selected tokens under a plan, `tokens_per_device` tokens of each device per step.

    With `slices`, experts are cut over as many devices (`moesim.systems.Sliced`).

    The tokens are cut into steps of equal length nearest to that size, and each step is scaled to it, so that every token
    counts; `inputs["token_weight"]` says how many tokens one token stands for. Streams the trace: memory is bounded by
    `chunk_tokens` and `CHUNK_COUNTS`, beside a few numbers per step, layer and device. Raises PlanError when the plan is for something else.
    """
    plan.check_fits(trace.model, cluster.size, place=f"plan {plan.name!r}")
    costs = cost or CostModel.of(cluster, trace.model)
    placement = plan.placement
    parts: list[tuple[NDArray[np.float64], ...]] = []
    bytes_LGG = np.zeros((len(placement.layers), cluster.size, cluster.size))
    fan_L, node_fan_L = np.zeros(len(placement.layers)), np.zeros(len(placement.layers))
    busiest: Counter[str] = Counter()
    outside = 0
    full = tokens_per_device * cluster.size
    steps = max(1, round(trace.tokens / full))
    most_steps = max(1, CHUNK_COUNTS // (len(placement.layers) * cluster.size**2))
    router = Sliced(slices=slices).router(placement, cluster.node_G, gatherable=0, selections=costs.way.per_selection)
    for experts, ends_S in step_chunks(trace, steps, chunk_tokens, most_steps):
        routed = router(experts, ends_S, full)
        traffic, times = routed.traffic, layer_times(costs, routed)
        load = traffic.device_tokens_SLG(routed.placement) / slices
        parts.append((times.dispatch.time_s_N, times.compute_s_SLG, times.combine.time_s_N, load))
        moving = sent_LGG(costs.copies_SLGG(traffic), slices)
        bytes_LGG += moving * costs.dispatch_B + np.swapaxes(moving, 1, 2) * costs.combine_B
        fan_L += traffic.fanout_devices_L * len(ends_S)
        node_fan_L += traffic.fanout_nodes_L * len(ends_S)
        outside += int(times.extrapolated_SLG.any(axis=2).sum()) + int(times.dispatch.extrapolated_N.sum())
        for port, times_seen in zip(*np.unique(times.dispatch.port_N, return_counts=True), strict=True):
            busiest[PORTS[port] if port >= 0 else "nothing sent"] += int(times_seen)
    notes = [*costs.memory(placement, tokens_per_device=tokens_per_device).notes(), *costs.notes]
    weight = full * steps / trace.tokens
    if weight > 2:
        notes.append(f"the trace holds fewer tokens than one step needs: every token stands for {weight:.3g}")
    if outside:
        notes.append(
            f"extrapolated: {outside} of {2 * steps * len(placement.layers)} layer computations and exchanges lie outside the calibrated range"
        )
    dispatch, compute, combine, load = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Result(
        name=plan.name,
        engine="lockstep",
        model=trace.model.name,
        cluster=cluster.name,
        layers=placement.layers,
        dispatch_s_SL=dispatch,
        compute_s_SLG=compute,
        combine_s_SL=combine,
        tokens_SLG=load,
        traffic_B_LGG=bytes_LGG / steps,
        fanout_devices_L=fan_L / steps,
        fanout_nodes_L=node_fan_L / steps,
        tokens_per_step=float(full),
        bottlenecks=dict(busiest),
        notes=tuple(notes),
        inputs=inputs_of(trace, plan, costs, tokens_per_device, weight) | ({"slices": slices} if slices > 1 else {}),
    )


def inputs_of(trace: Trace, plan: Plan, cost: CostModel, tokens_per_device: int, token_weight: float) -> dict[str, Any]:
    """What a simulation was made from, by digest: the `inputs` of its result."""
    return {
        "trace": trace.digest,
        "selection": trace.selection,
        "plan": plan.digest,
        "cluster": cost.cluster.digest,
        "tokens_per_device": tokens_per_device,
        "token_weight": token_weight,
        "transport": cost.transport,
        "dispatch": plan.placement.dispatch,
    }


def step_chunks(
    trace: Trace, steps: int, chunk_tokens: int, most_steps: int | None = None, *, edit: Edit | None = None
) -> Iterator[tuple[NDArray[np.uint16], NDArray[np.int64]]]:
    """The trace's T tokens as `steps` runs of T/steps tokens (to one token): several runs at a time, with their ends.

    At most `most_steps` runs at a time. The next batch is read while the caller works on this one. `edit` changes the
    choices of tokens by their gate weights as they are read; TraceError for a trace without weights then, and for
    one without tokens.
    """
    if not trace.tokens:
        raise TraceError(f"{trace.path}: holds no tokens, so there is no step to run; record or select some")
    ends = np.arange(1, steps + 1) * trace.tokens // steps
    waiting: list[NDArray[np.uint16]] = []
    held, given = 0, 0  # tokens waiting; steps given out
    for batch in _ahead(trace.batches(rows=min(chunk_tokens, CHUNK_TOKENS), weights=edit is not None)):
        weights_TLK = batch.weights_TLK
        waiting.append(batch.experts_TLK if edit is None or weights_TLK is None else edit(batch.experts_TLK, weights_TLK))
        held += len(batch)
        first = int(ends[given - 1]) if given else 0
        ready = int(np.searchsorted(ends, first + held, side="right"))
        if ready == given or (held < chunk_tokens and ready < steps):
            continue
        merged = waiting[0] if len(waiting) == 1 else np.concatenate(waiting)
        start = 0
        for begin in range(given, ready, most_steps or ready):
            until = min(ready, begin + (most_steps or ready))
            cut = int(ends[until - 1]) - first
            yield merged[start:cut], ends[begin:until] - first - start
            start = cut
        held -= start
        given, waiting = ready, [merged[start:]] if held else []


def _ahead(items: Iterator[_Item]) -> Iterator[_Item]:
    """The same items, the next one being made in a thread meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item
