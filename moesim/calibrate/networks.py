"""Fit collective curves to measured tables, score them on sizes left out, write them as profile fragments.

Times are fitted in log space (relative error) with a robust loss: small messages scatter by tens of per cent.
Suffixes: N measured points, P parameters, L tiers (link, nic). Bytes and seconds; errors are fractions.
"""

from __future__ import annotations

import csv
import datetime
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.cost import collectives as cost
from moesim.cost.collectives import CollectiveCurve, Floats, LinearPort, Ports, ProtocolPort
from moesim.errors import InputError

LARGE_B = 2**20
NVLS_RANKS = 8  # from here on NCCL reduces inside the switch, which is another curve
REDUCING = ("all_reduce", "reduce_scatter")
_SCATTER = 0.05  # relative error where the robust loss turns from squares to absolute values
_PRIOR = 0.02  # pull per e-fold towards the start: fixes what a table cannot tell (one rank count)
_PARAMETERS = tuple(name for name in ProtocolPort.__dataclass_fields__ if name != "valid_B")


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """Measured uniform collectives of one op; spread_N is max/min - 1 over the repeats behind each median."""

    op: str
    ranks_N: NDArray[np.int64]
    bytes_N: Floats
    time_s_N: Floats
    spread_N: Floats

    def at(self, where_N: NDArray[np.bool_]) -> Points:
        """The points where the mask is true."""
        names = ("ranks_N", "bytes_N", "time_s_N", "spread_N")
        return replace(self, **{name: getattr(self, name)[where_N] for name in names})


def _rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: {error}; pass a readable CSV table") from error
    if missing or not rows:
        fault = f"column(s) {', '.join(missing)} missing" if missing else "no rows"
        raise InputError(f"{path}: {fault}; pass a table with the columns {', '.join(columns)}")
    return rows


def _number(row: Mapping[str, str], column: str, where: str) -> float:
    try:
        value = float(row[column])
    except (TypeError, ValueError):
        value = float("nan")
    if not (np.isfinite(value) and value > 0):
        raise InputError(f"{where}: {column}={row[column]!r} is not a positive number; drop the row")
    return value


def _count(row: Mapping[str, str], column: str, where: str) -> int:
    value = _number(row, column, where)
    if value != int(value):
        raise InputError(f"{where}: {column}={row[column]!r} is not a whole number; drop the row")
    return int(value)


def split_algorithms(points: Points) -> list[Points]:
    """Parts one curve can describe: all_reduce changes algorithm at `NVLS_RANKS` ranks, other ops do not."""
    inside_N = points.ranks_N >= NVLS_RANKS
    if points.op == "all_reduce" and inside_N.any() and not inside_N.all():
        return [points.at(~inside_N), points.at(inside_N)]
    return [points]


def fit_curve(points: Points, *, name: str = "nccl") -> CollectiveCurve:
    """The protocol curve of one op over all its rank counts: ten parameters p, robust fit of log time.

        min sum soft_l1(log(t_model/t) / 0.05) + sum soft_l1(0.02 log(p/p_start) / 0.05)

    from eight fixed starts around values read off the data. Deterministic. Raises InputError below 8 points.
    """
    if points.time_s_N.size < 8:
        raise InputError(f"{points.op}: {points.time_s_N.size} points; measure at least 8 sizes")
    wire_N = cost.wire_bytes(points.op, points.bytes_N, points.ranks_N)
    valid_B = (float(wire_N.min()), float(wire_N.max()))
    ranks = (int(points.ranks_N.min()), int(points.ranks_N.max()))
    call_s = float(points.time_s_N.min())
    port_Bps = float((wire_N / points.time_s_N).max())
    copy_Bps = float((wire_N * points.ranks_N / (points.ranks_N - 1) / points.time_s_N).max())
    short, long = [call_s, call_s / 10, port_Bps / 50], [2 * call_s, 1.5 * call_s, call_s / 10]
    start_P = np.log([*short, *long, copy_Bps, port_Bps, 0.5, 1e7])

    def curve(log_P: Floats) -> CollectiveCurve:
        port = ProtocolPort(**dict(zip(_PARAMETERS, np.exp(log_P).tolist(), strict=True)), valid_B=valid_B)
        return CollectiveCurve(name=name, op=points.op, port=port, ranks=ranks)

    def predict(log_P: Floats) -> Floats:
        return curve(log_P).time_s(points.bytes_N, ranks=points.ranks_N)[0]

    return curve(_least_squares(predict, points.time_s_N, start_P))


def _least_squares(predict: Callable[[Floats], Floats], time_s_N: Floats, start_P: Floats) -> Floats:
    """Log parameters of the best robust fit of log time, among eight fixed starts around `start_P`."""
    from scipy.optimize import least_squares

    def residual(log_P: Floats) -> Floats:
        return np.concatenate([np.log(predict(log_P) / time_s_N), _PRIOR * (log_P - start_P)])

    rng = np.random.default_rng(0)
    starts = [start_P, *(start_P + rng.normal(0.0, 0.5, start_P.size) for _ in range(7))]
    fits = [least_squares(residual, each, loss="soft_l1", f_scale=_SCATTER) for each in starts]
    return np.asarray(min(fits, key=lambda fit: float(fit.cost)).x)


def evaluate(predicted_N: Floats, measured_N: Floats, extrapolated_N: NDArray[np.bool_]) -> dict[str, float]:
    """Scores of predicted against measured seconds, e = predicted/measured - 1, a = |e|.

    n, median_ape, p90_ape, mape (of a), bias (mean e), worst (e of the largest a), extrapolated (count).
    Raises InputError when the shapes differ or nothing is compared.
    """
    if predicted_N.shape != measured_N.shape or not measured_N.size:
        raise InputError(f"predicted {predicted_N.shape}, measured {measured_N.shape}; pass equal, non-empty")
    error_N = predicted_N / measured_N - 1
    ape_N = np.abs(error_N)
    return {
        "n": int(error_N.size),
        "median_ape": float(np.median(ape_N)),
        "p90_ape": float(np.quantile(ape_N, 0.9)),
        "mape": float(ape_N.mean()),
        "bias": float(error_N.mean()),
        "worst": float(error_N[ape_N.argmax()]),
        "extrapolated": int(extrapolated_N.sum()),
    }


def score_curve(curve: CollectiveCurve, points: Points) -> dict[str, float]:
    """Scores of a curve on measured points."""
    time_N, outside_N = curve.time_s(points.bytes_N, ranks=points.ranks_N)
    return evaluate(time_N, points.time_s_N, outside_N)


def cross_validate(points: Points) -> dict[str, dict[str, float]]:
    """Scores on sizes left out: fitted on every second size and tried on the others, both ways round.

    Keys: "all", "large" (>= 1 MiB), "ranks <n>", "ranks <n> large". A left-out end of the table is
    extrapolated.
    """
    time_N, outside_N = np.empty(points.time_s_N.size), np.empty(points.time_s_N.size, dtype=bool)
    odd_N = np.searchsorted(np.unique(points.bytes_N), points.bytes_N) % 2 == 1
    for held_N in (odd_N, ~odd_N):
        curve, held = fit_curve(points.at(~held_N)), points.at(held_N)
        time_N[held_N], outside_N[held_N] = curve.time_s(held.bytes_N, ranks=held.ranks_N)
    large_N = points.bytes_N >= LARGE_B
    groups = {"all": np.ones_like(large_N), "large": large_N}
    for ranks in np.unique(points.ranks_N):
        here_N = points.ranks_N == ranks
        groups |= {f"ranks {ranks}": here_N, f"ranks {ranks} large": here_N & large_N}
    kept = {key: here_N for key, here_N in groups.items() if here_N.any()}
    return {key: evaluate(time_N[on], points.time_s_N[on], outside_N[on]) for key, on in kept.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One measured DeepEP dispatch or combine under uniform random routing, as the port model sees it."""

    mode: str
    op: str
    ranks: int
    time_s: float
    traffic_GG: Floats
    node_G: NDArray[np.int64]
    node_traffic_GM: Floats | None

    @property
    def pattern(self) -> dict[str, Any]:
        """How it travels: one copy per chosen expert (low latency) or one per node, forwarded (normal)."""
        algorithm = "flat" if self.node_traffic_GM is None else "forwarded"
        return {"algorithm": algorithm, "node_traffic_NGM": self.node_traffic_GM}

    def predict(self, ports: Ports) -> cost.AllToAllTime:
        """What the port model gives."""
        return cost.all_to_all_time(self.traffic_GG, self.node_G, ports, **self.pattern)


def read_deepep(path: Path, *, experts: int = 256) -> list[Exchange]:
    """Exchanges from DeepEP's published tables: mode normal (GB/s only) and low_latency (microseconds).

    Traffic is what DeepEP's own benchmarks send: `experts` scored at random, top-k within the best
    `topk_groups` nodes. They print logical GB/s, own device and own node included, so time = logical bytes /
    bandwidth with distinct devices per token inside one node, distinct nodes across nodes. Bytes per token:
    hidden*(1 + 4/128) in fp8 (+16 in low latency), 2*hidden in bf16. Columns: mode, ep_size, gpus_per_node,
    op, tokens_per_rank, hidden, topk, topk_groups, dtype, bandwidth_GBps, latency_us. Raises InputError on
    missing columns and bad rows. Source: deepseek-ai/DeepEP dd758ca, docs/legacy.md, tests/legacy (MIT).
    """
    sizes = ("ep_size", "gpus_per_node", "tokens_per_rank", "hidden", "topk")
    exchanges = []
    rows = _rows(path, ("mode", "op", "dtype", *sizes, "topk_groups", "bandwidth_GBps", "latency_us"))
    for line, row in enumerate(rows, start=2):
        where = f"{path}, line {line}"
        if row["mode"] not in ("normal", "low_latency") or row["dtype"] not in ("fp8", "bf16"):
            known = "normal, low_latency; fp8, bf16"
            raise InputError(f"{where}: mode {row['mode']!r} in {row['dtype']!r} is unknown; known: {known}")
        ranks, local, tokens, hidden, topk = (_count(row, column, where) for column in sizes)
        if ranks % local or experts % ranks or topk > experts:
            raise InputError(f"{where}: {ranks} ranks, nodes of {local}, {experts} experts must divide")
        nodes, low_latency = ranks // local, row["mode"] == "low_latency"
        token_B = hidden * (1 + 4 / 128) + 16 * low_latency if row["dtype"] == "fp8" else 2.0 * hidden
        if low_latency:
            to_devices, node_GM = float(topk), None
            time_s = _number(row, "latency_us", where) * 1e-6
        else:
            groups = min(nodes, _count(row, "topk_groups", where))
            to_devices, to_nodes = distinct_destinations(experts, topk, ranks, nodes, groups)
            node_GM = np.full((ranks, nodes), tokens * token_B * to_nodes / nodes)
            logical_B = tokens * token_B * (to_devices if nodes == 1 else to_nodes)
            time_s = logical_B / (_number(row, "bandwidth_GBps", where) * 1e9)
        traffic_GG = np.full((ranks, ranks), tokens * token_B * to_devices / ranks)
        node_G = np.arange(ranks) // local
        travel: dict[str, Any] = {"traffic_GG": traffic_GG, "node_G": node_G, "node_traffic_GM": node_GM}
        exchanges.append(Exchange(mode=row["mode"], op=row["op"], ranks=ranks, time_s=time_s, **travel))
    return exchanges


def distinct_destinations(experts: int, topk: int, ranks: int, nodes: int, groups: int) -> tuple[float, float]:
    """Mean distinct devices and nodes per token when random scores pick top-k within the best `groups` nodes.

    Drawn with a fixed seed over 20,000 tokens (standard error below 0.2 %).
    """
    score_TE = np.random.default_rng(0).random((20_000, experts))
    best_TM = score_TE.reshape(-1, nodes, experts // nodes).max(axis=-1)
    cut_T1 = np.partition(best_TM, nodes - groups, axis=-1)[:, nodes - groups, None]
    score_TE *= np.repeat(best_TM >= cut_T1, experts // nodes, axis=1)
    chosen_TK = np.argpartition(score_TE, experts - topk, axis=-1)[:, experts - topk :]
    hit_TG = np.zeros((len(chosen_TK), ranks), dtype=bool)
    hit_TG[np.arange(len(chosen_TK))[:, None], chosen_TK // (experts // ranks)] = True
    hit_TM = hit_TG.reshape(-1, nodes, ranks // nodes).any(axis=2)
    return float(hit_TG.sum(axis=1).mean()), float(hit_TM.sum(axis=1).mean())


def fit_ports(exchanges: Sequence[Exchange]) -> Ports:
    """Latency and bandwidth of the NVLink and the NIC port that dispatch and combine share: four parameters.

    The same robust fit as `fit_curve`; a port counts as measured with the bytes at which it set the time.
    Raises InputError below 4 exchanges or if a tier carries nothing.
    """
    time_N = np.array([each.time_s for each in exchanges])
    loads = [cost.port_loads(each.traffic_GG, each.node_G, **each.pattern).bytes_PNG for each in exchanges]
    loads_LN = np.array([[load[:2].max() for load in loads], [load[2:].max() for load in loads]])
    if time_N.size < 4 or not loads_LN.any(axis=1).all():
        raise InputError(f"{time_N.size} exchanges; pass at least 4, with traffic inside and between nodes")
    start_P = np.log([[0.3 * time_N.min(), (load_N / time_N).max()] for load_N in loads_LN]).ravel()

    def tiers(log_P: Floats) -> list[LinearPort]:
        values = np.exp(log_P).reshape(2, 2).tolist()
        return [LinearPort(latency_s=latency_s, bandwidth_Bps=speed_Bps) for latency_s, speed_Bps in values]

    def port_times(ports: Sequence[LinearPort]) -> Floats:
        pairs = zip(ports, loads_LN, strict=True)
        return np.stack([port.time_s(load_N, messages_N=1, largest_N=load_N, ranks=2) for port, load_N in pairs])

    def predict(log_P: Floats) -> Floats:  # all devices carry the same load
        return np.asarray(port_times(tiers(log_P)).max(axis=0))

    fitted = tiers(_least_squares(predict, time_N, start_P))
    busiest_N = port_times(fitted).argmax(axis=0)
    link, nic = (
        replace(port, valid_B=(float(set_B.min()), float(set_B.max())) if set_B.size else (0.0, 0.0))
        for port, set_B in ((fitted[tier], loads_LN[tier][busiest_N == tier]) for tier in (0, 1))
    )
    return Ports(link=link, nic=nic)


def score_ports(exchanges: Sequence[Exchange], *, leave_one_out: bool = False) -> dict[str, float]:
    """Scores of the port model on the exchanges it was fitted to, or on each in turn left out of the fit."""
    fitted = None if leave_one_out else fit_ports(exchanges)
    rests = ([*exchanges[:i], *exchanges[i + 1 :]] for i in range(len(exchanges)))
    found = [each.predict(fitted or fit_ports(rest)) for each, rest in zip(exchanges, rests, strict=True)]
    predicted_N, outside_N = np.array([(each.time_s_N, each.extrapolated_N) for each in found]).T
    return evaluate(predicted_N, np.array([each.time_s for each in exchanges]), outside_N > 0)


def nccl_tables(found: Sequence[Points], *, source: str, date: datetime.date) -> list[dict[str, Any]]:
    """`[[collectives]]` tables of a device: one protocol curve per op, with fit and held-out residuals."""
    tables = []
    for points in found:
        for part in split_algorithms(points):
            curve = fit_curve(part)
            head = {"name": "nccl", "op": part.op, "form": "protocols", "source": source}
            values = {name: getattr(curve.port, name) for name in _PARAMETERS}
            scores = (score_curve(curve, part), cross_validate(part)["all"])
            valid = {"ranks": curve.ranks, "port_B": curve.port.valid_B}
            tables.append(_table(head, date, values, scores, valid))
    return tables


def deepep_tables(path: Path, *, source: str, date: datetime.date) -> list[dict[str, Any]]:
    """`[[collectives]]` tables of DeepEP's modes: NVLink and NIC port shared by dispatch and combine."""
    tables, exchanges = [], read_deepep(path)
    for mode in sorted({each.mode for each in exchanges}):
        some = [each for each in exchanges if each.mode == mode]
        ranks = [each.ranks for each in some]
        ports = fit_ports(some)
        values: dict[str, float] = {}
        valid: dict[str, tuple[float, float]] = {"ranks": (min(ranks), max(ranks))}
        for tier in ("link", "nic"):
            port = getattr(ports, tier)
            values |= {f"{tier}_latency_s": port.latency_s, f"{tier}_bandwidth_Bps": port.bandwidth_Bps}
            valid[f"{tier}_B"] = port.valid_B
        name = f"deepep-{mode.replace('_', '-')}"
        head = {"name": name, "op": "all_to_all", "form": "ports", "source": source}
        scores = (score_ports(some), score_ports(some, leave_one_out=True))
        tables.append(_table(head, date, values, scores, valid))
    return tables


def _table(
    head: Mapping[str, str],
    date: datetime.date,
    values: Mapping[str, float],
    scores: tuple[Mapping[str, float], Mapping[str, float]],
    valid: Mapping[str, tuple[float, float]],
) -> dict[str, Any]:
    residuals = dict(scores[0]) | {f"held_out_{key}": value for key, value in scores[1].items()}
    whole = {key: (math.floor(low), math.ceil(high)) for key, (low, high) in valid.items()}
    named = {"parameters": dict(values), "residuals": residuals, "valid": whole}
    return {**head, "confidence": "fitted", "date": date.isoformat(), **named}
