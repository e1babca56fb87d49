"""serve: a stream of requests through a deployment, changes included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import InputError, SimulationError
from moesim.serving.arrivals import Arrivals
from moesim.serving.changes import Change
from moesim.serving.deployment import Deployment
from moesim.serving.result import PARTS, Series, ServingResult
from moesim.serving.routing import Routing
from moesim.serving.slo import Slo
from moesim.serving.steps import StepLaw
from moesim.trace import Trace

if TYPE_CHECKING:
    from moesim.serving import kernel

Floats = NDArray[np.float64]
_SERIES = 2048  # intervals aimed at
MOST_UNITS = 1 << 28  # of the prefix cache, on all ranks: 12 bytes each
ENERGY_NOTE = "energy is an estimate: board power while a device computes or exchanges, none while it waits; at most: board power all the time"


def serve(
    arrivals: Arrivals,
    deployment: Deployment,
    *,
    routing: Routing | Trace | None = None,
    seed: int = 0,
    changes: Sequence[Change] = (),
    slo: Slo | None = None,
) -> ServingResult:
    """Serve the arrivals until the last is done.

    `routing` is where expert choices come from (None: a typical one, said in the notes); a deployment that was `prepared`, or has a
    plain law, needs none. Requests that exceed the cache or the batch of a rank are refused at once and counted.
    `changes` are in time order. Same arrivals, deployment, routing and seed: same bytes. Cost: about a microsecond per
    step and rank, and some nanoseconds per token; memory: some numbers per request.

    Raises InputError when changes are out of order or name another model, or no request fits.
    """
    if seed < 0:
        raise InputError(f"seed={seed} must be 0 or above")
    if list(changes) != sorted(changes, key=lambda change: change.at_s):
        raise InputError("changes are not in the order of their times; sort them by at_s")
    source = Routing.of(routing) if isinstance(routing, Trace) else routing
    if deployment.prefill is not None and any(change.restart for change in changes):
        raise InputError(
            f"deployment {deployment.name!r}: a restart of instances with separate prefill is not modelled; restart instances that do both"
        )
    known: dict[int, Deployment] = {}

    def ready(stage: Deployment) -> Deployment:
        return known.setdefault(id(stage), stage.prepared(source, seed=seed))

    stages, stage_C = [ready(deployment)], []
    for change in changes:
        if change.to is not None:
            _check_same(deployment, change.to)
            stages.append(ready(change.to))
        stage_C.append(len(stages) - 1)
    room = min(_room(stage) for stage in stages)
    fits_R = arrivals.prompt_R + arrivals.output_R <= room
    if not fits_R.any():
        raise InputError(f"{arrivals.name}: no request fits the key-value cache of a rank, {room:,} tokens; give more memory or shorter requests")
    found = _run(arrivals, fits_R, stages, stage_C, changes, seed)
    notes = [note for stage in stages for law in _laws(stage) for note in law.notes] + list(arrivals.notes)
    notes.append(_said_of_prefixes(arrivals, deployment, found))
    refused = int((~fits_R).sum())
    if refused:
        notes.append(f"{refused} of {len(arrivals)} requests exceed the key-value cache of a rank ({room:,} tokens) and were refused")
    if found.lost_output_tokens:
        notes.append(
            f"restarts lost {found.lost_output_tokens:,} output tokens; requests under way began again, and their first token is the last they got"
        )
    times = np.asarray([0.0, *(change.at_s for change in changes)])
    return replace(
        found,
        slo=slo,
        refused=refused,
        changes=tuple(change.to_dict() for change in changes),
        notes=tuple(dict.fromkeys(notes)),
        inputs={
            "arrivals": arrivals.digest,
            "deployment": deployment.to_dict(),
            "stages": [{"at_s": float(at), "name": stages[z].name} for at, z in zip(times, [0, *stage_C], strict=True)],
            "plan": _plan_digest(deployment),
            "cluster": deployment.cluster.digest,
            **{key: value for law in _laws(stages[0]) for key, value in law.inputs},
        },
    )


def _said_of_prefixes(arrivals: Arrivals, deployment: Deployment, found: ServingResult) -> str:
    if deployment.prefix_cache:
        whole = int(found.prompt_R[np.isfinite(found.end_s_R)].sum())
        return f"prefix cache: {found.reused_R.sum() / whole:.1%} of prompt tokens were found in the cache of the rank their request went to"
    known = "the requests name blocks that prompts share" if arrivals.prefixes else "the requests do not say which prompts begin alike"
    return f"prefix cache: off, every prompt is computed in full ({known})"


def _plan_digest(deployment: Deployment) -> str | None:
    from moesim.files import digest

    placement = deployment.experts
    return digest(deployment.model.digest, placement.slots_LP.tobytes(), placement.slots_G.tobytes(), placement.dispatch)


def _check_same(first: Deployment, other: Deployment) -> None:
    for what, mine, theirs in (
        ("model", first.model.digest, other.model.digest),
        ("balance", first.balance, other.balance),
        ("ahead", first.ahead, other.ahead),
        ("block_tokens", first.block_tokens, other.block_tokens),
        ("prefix_cache", first.prefix_cache, other.prefix_cache),
        ("separate prefill", first.prefill is not None, other.prefill is not None),
    ):
        if mine != theirs:
            raise InputError(f"change to {other.name!r}: its {what} is {theirs!r}, that of {first.name!r} is {mine!r}; a change keeps it")


def _laws(stage: Deployment) -> list[StepLaw]:
    return [law for law in (stage.law, stage.prefill.law if stage.prefill else None) if law is not None]


def _pools(stage: Deployment) -> list[Deployment | None]:
    return [stage, stage.prefill]


def _room(stage: Deployment) -> int:
    """Tokens of the longest request a rank of every pool can hold."""
    return min(pool.cache_tokens_per_rank // pool.block_tokens * pool.block_tokens for pool in _pools(stage) if pool)


def _run(
    arrivals: Arrivals, fits_R: NDArray[np.bool_], stages: list[Deployment], stage_C: list[int], changes: Sequence[Change], seed: int
) -> ServingResult:
    from moesim.serving import kernel

    per_pool = [_pools(stage) for stage in stages]

    def table(value: Callable[[Deployment], int]) -> NDArray[np.int64]:
        return np.asarray([[value(pool) if pool else 0 for pool in pools] for pools in per_pool], np.int64)

    ranks_Z2, blocks_Z2 = table(lambda pool: pool.ranks), table(lambda pool: pool.cache_tokens_per_rank // pool.block_tokens)
    rows = int(ranks_Z2.max(axis=0).sum())
    first_unit_R, unit_A, unit_tokens = _units(arrivals, fits_R, stages[0], rows)
    req = kernel.Requests.of(arrivals.arrival_s_R[fits_R], arrivals.prompt_R[fits_R], arrivals.output_R[fits_R], first_unit_R, unit_A)
    limits = kernel.Stages(
        ranks_Z2=ranks_Z2,
        width_Z2=table(lambda pool: pool.width),
        seqs_Z2=table(lambda pool: pool.max_seqs),
        tokens_Z2=table(lambda pool: pool.max_batch_tokens),
        blocks_Z2=blocks_Z2,
        hand_Z2=np.asarray([_hand_over(stage) for stage in stages]),
        block_tokens=stages[0].block_tokens,
        unit_tokens=unit_tokens,
        shared=stages[0].balance == "shared",
        ahead=stages[0].ahead,
    )
    state = kernel.Ranks.of(rows, int(limits.seqs_Z2.max()), int(unit_A.max(initial=-1)) + 1)
    sums = kernel.Found.of(2 * len(stages), max(float(req.arrival_R[-1]) / _SERIES, 1e-9))
    left = kernel.run(np.uint64(seed), req, state, limits, _kernel_laws(stages), _kernel_changes(changes, stage_C, rows), sums)
    if left:
        raise SimulationError(f"{left} of {len(req.arrival_R)} requests were never served: no rank could take them")
    return _result(arrivals, fits_R, stages, stage_C, changes, seed, req, sums, float((blocks_Z2 * ranks_Z2).sum(axis=1).max()))


def _units(arrivals: Arrivals, fits_R: NDArray[np.bool_], deployment: Deployment, ranks: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Where each request's units of the prefix cache begin, their numbers from 0, and tokens of one (0: no prefix cache)."""
    if not deployment.prefix_cache:
        return np.zeros(int(fits_R.sum()) + 1, np.int64), np.zeros(0, np.int64), 0
    if arrivals.prefixes is None:
        raise InputError(f"{arrivals.name}: does not say which prompts begin alike, as Mooncake's hash_ids do; serve it without a prefix cache")
    alike = arrivals.prefixes.take(np.flatnonzero(fits_R))
    if alike.tokens % deployment.block_tokens:
        raise InputError(f"{arrivals.name}: units of {alike.tokens} tokens are no whole blocks of {deployment.block_tokens}; change block_tokens")
    names, number_A = np.unique(alike.ids_A, return_inverse=True)
    if len(names) * ranks > MOST_UNITS:
        raise InputError(f"{arrivals.name}: {len(names):,} units of prompts on {ranks} ranks exceed {MOST_UNITS:,}; serve the first requests only")
    return alike.starts_R, number_A.astype(np.int64), alike.tokens


def _kernel_changes(changes: Sequence[Change], stage_C: list[int], ranks: int) -> kernel.Changes:
    from moesim.serving import kernel

    lost = np.zeros((len(changes), ranks + 1), bool)
    for c, change in enumerate(changes):
        if any(rank >= ranks for rank in change.lost):
            raise InputError(f"change at {change.at_s:g} s: lost={change.lost} names a rank beyond the {ranks} there are")
        lost[c, list(change.lost)] = True

    def column(name: str) -> Floats:
        return np.asarray([getattr(change, name) for change in changes], np.float64)

    return kernel.Changes(
        at_C=column("at_s"),
        stage_C=np.asarray(stage_C, np.int64),
        pause_C=column("pause_s"),
        down_C=column("down_s"),
        slow_C=column("slow"),
        slow_s_C=column("slow_s"),
        keep_C=column("keep_cache").astype(bool),
        restart_C=column("restart").astype(bool),
        lost_CW=lost,
    )


def _kernel_laws(stages: Sequence[Deployment]) -> kernel.Laws:
    """The step laws of all stages as one set of arrays; tables shorter than the longest are padded, and never read there."""
    from moesim.serving import kernel

    laws: list[StepLaw] = []
    for stage in stages:
        first = stage.law
        second = stage.prefill.law if stage.prefill else first
        if first is None or second is None:
            raise SimulationError(f"deployment {stage.name!r} has no step law; prepare it first")
        laws += [first, second]
    windows = laws[0].window_H
    if any(not np.array_equal(law.window_H, windows) for law in laws):
        raise InputError("stages were prepared with routings whose mix changes at different times; prepare all with one routing")
    points, draws = max(len(law.grid_B) for law in laws), max(law.compute_s_HMBD.shape[3] for law in laws)
    count_T = np.arange(max(int(law.grid_B[-1]) for law in laws) + 1)
    place, part, dense, head = np.zeros((len(laws), len(count_T)), np.int64), *(np.zeros((len(laws), len(count_T))) for _ in range(3))
    drawn = np.zeros((len(laws), len(windows), points + 1, draws, 2, 3))
    for x, law in enumerate(laws):
        n = len(law.grid_B)
        place[x] = np.clip(np.searchsorted(law.grid_B, count_T, side="right") - 1, 0, n - 2)
        part[x] = np.clip((count_T - law.grid_B[place[x]]) / (law.grid_B[place[x] + 1] - law.grid_B[place[x]]), 0.0, 1.0)
        dense[x] = np.interp(count_T, law.grid_B, law.dense_s_B)
        head[x, 1:] = np.interp(count_T[1:], law.grid_B, law.head_s_B)
        turn = np.arange(draws) % law.compute_s_HMBD.shape[3]
        for i, table_HMBD in enumerate((law.compute_s_HMBD, law.busy_s_HMBD, law.exchange_s_HMBD)):
            drawn[x, :, :n, :, :, i] = np.moveaxis(table_HMBD[..., turn], 1, 3)
    return kernel.Laws(
        place_XT=place,
        part_XT=part,
        dense_XT=dense,
        head_XT=head,
        fixed_X=np.asarray([law.fixed_s for law in laws]),
        context_X2=np.asarray([(law.context_s, law.mixed_s) for law in laws]),
        pair_X=np.asarray([law.pair_s for law in laws]),
        drawn_XHBDM3=drawn,
        window_H=windows,
    )


def _hand_over(stage: Deployment) -> tuple[float, float]:
    """Latency, and seconds per prompt token, of handing a prompt's keys and values over from a prefill rank."""
    if stage.prefill is None:
        return 0.0, 0.0
    from moesim.cost.attention import kv_token_B

    cluster = stage.prefill.cluster
    link = cluster.nic_G[0] if cluster.nic_G else cluster.intra_G[0]
    rate_Bps = (stage.hand_over_Bps or link.bandwidth_Bps) * stage.prefill.tp  # every device of a rank sends its share
    return link.latency_s, kv_token_B(stage.model) * stage.model.layers / rate_Bps


def _result(
    arrivals: Arrivals,
    fits_R: NDArray[np.bool_],
    stages: list[Deployment],
    stage_C: list[int],
    changes: Sequence[Change],
    seed: int,
    req: Any,
    sums: Any,
    blocks: float,
) -> ServingResult:
    def all_R(values: NDArray[Any], missing: float) -> NDArray[Any]:
        whole = np.full(len(arrivals), missing, values.dtype)
        whole[fits_R] = values
        return whole

    end_s = max(float(req.end_R.max()), arrivals.span_s)
    stage_s = _stage_seconds(end_s, [0, *stage_C], [0.0, *(change.at_s for change in changes)], len(stages))
    device_s, cost, energy, most = 0.0, 0.0, 0.0, 0.0
    priced = powered = True
    busy_s = 0.0
    for z, stage in enumerate(stages):
        for pool, part in enumerate(_pools(stage)):
            if part is None:
                continue
            devices, device = part.replicas * part.cluster.size, part.cluster.devices[0]
            there = devices * stage_s[z]
            rate = part.price_per_hour if part.price_per_hour is not None else device.rent_per_hour
            busy = float(sums.busy_s_X[2 * z + pool]) * part.cluster.size
            device_s, busy_s = device_s + there, busy_s + busy
            priced, powered = priced and rate is not None, powered and device.power_W is not None
            cost += there / 3600 * (rate or 0.0)
            energy, most = energy + busy * (device.power_W or 0.0), most + there * (device.power_W or 0.0)
    bins = min(int(end_s // sums.bin_s[0]) + 1, sums.series_5N.shape[1])
    series = sums.series_5N[:, :bins] / sums.bin_s[0]
    return ServingResult(
        name=stages[0].name,
        arrival_s_R=arrivals.arrival_s_R,
        prompt_R=arrivals.prompt_R,
        output_R=arrivals.output_R,
        seen_s_R=all_R(req.seen_R, np.nan),
        start_s_R=all_R(req.start_R, np.nan),
        first_s_R=all_R(req.first_R, np.nan),
        end_s_R=all_R(req.end_R, np.nan),
        again_R=all_R(req.again_R, 0),
        reused_R=all_R(req.reused_R, 0),
        refused=0,
        slo=None,
        series=Series(
            bin_s=float(sums.bin_s[0]),
            waiting_N=series[0],
            running_N=series[1],
            cache_N=series[2] / blocks,
            output_tokens_per_s_N=series[3],
            prompt_tokens_per_s_N=series[4],
        ),
        steps=int(sums.steps_X.sum()),
        step_parts_s=dict(zip(PARTS, sums.parts_X5.sum(axis=0).tolist(), strict=True)),
        device_s=device_s,
        busy_s=busy_s,
        energy_J=energy if powered else None,
        most_energy_J=most if powered else None,
        cost=cost if priced else None,
        computed_prompt_tokens=int(sums.tokens_X2[:, 1].sum()),
        lost_output_tokens=int(sums.tokens_X2[:, 0].sum() - req.output_R.sum()),
        seed=seed,
    )


def _stage_seconds(end_s: float, stage_C: list[int], at_C: list[float], stages: int) -> Floats:
    """Seconds each stage lasted."""
    seconds = np.zeros(stages)
    for z, start, stop in zip(stage_C, at_C, [*at_C[1:], end_s], strict=True):
        seconds[z] += max(0.0, min(stop, end_s) - min(start, end_s))
    return seconds
