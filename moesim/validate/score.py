"""From executed batches to the validation section of a report, and a recorded one scored again with today's cost model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moesim.calibrate.kernel_tables import check_table
from moesim.cost.experts import ComputePeak, ExpertKernel, expert_time_s
from moesim.errors import InputError
from moesim.files import read_json
from moesim.validate.agreement import errors, errors_by, rank_order, ranking
from moesim.validate.calibrate import fit_best, kernel_of, templates
from moesim.validate.naive import tokens_only

TARGET = {"median_ape": 0.05, "p90_ape": 0.10}  # of layer times on one GPU, held-out traces and placements
SLACK = 0.005  # a re-scored error may exceed the recorded one by this much: fits differ in the last digits between machines


def predict_case(case: Mapping[str, Any], shape: Mapping[str, Any], peak: ComputePeak, kernel: ExpertKernel, *, cold: bool) -> float:
    """Seconds of one rank from the tokens of its slots; `shape` has hidden, intermediate, gated, top_k."""
    if not case["counts"]:
        return 0.0
    sizes: dict[str, Any] = {name: shape[name] for name in ("hidden", "intermediate", "gated", "top_k")}
    time = expert_time_s(case["counts"], **sizes, peak=peak, kernel=kernel, tokens_N=[case["received"]], warm_cache=not cold)
    return float(time.time_s_N[0])


def layer_sums(cases: Sequence[Mapping[str, Any]], plans: Sequence[str], values: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """[plans] sum over layers of the slowest rank: what a plan's expert computation takes."""
    slowest: dict[tuple[str, int], float] = {}
    for case, value in zip(cases, values, strict=True):
        key = (case["plan"], case["layer"])
        slowest[key] = max(slowest.get(key, 0.0), float(value))
    return np.array([sum(value for (name, _), value in slowest.items() if name == plan) for plan in plans])


def summarise(cases: Sequence[Mapping[str, Any]], table: pd.DataFrame) -> dict[str, Any]:
    """Errors, by model, layer, plan and batch, and rankings, of executed cases.

    A case names batch, plan, layer, rank, tokens (selections), predicted_s, measured_s, halves_s and the engines'
    lockstep_s and event_s; `table` is the calibration's.
    """
    predicted, measured = _column(cases, "predicted_s"), _column(cases, "measured_s")
    naive = tokens_only(table, _column(cases, "tokens"))
    models = {"moesim": predicted, "lockstep": _column(cases, "lockstep_s"), "event": _column(cases, "event_s"), "tokens-only": naive}
    guessed = [{**case, "predicted_s": float(guess)} for case, guess in zip(cases, naive, strict=True)]
    rankings, naive_rankings = rank_plans(cases), rank_plans(guessed)
    return {
        "summary": errors(predicted, measured),
        "layer_summary": errors(*layer_totals(cases)),
        "models": {name: errors(values, measured) for name, values in models.items()},
        "by_layer": errors_by([case["layer"] for case in cases], predicted, measured),
        "by_plan": errors_by([case["plan"] for case in cases], predicted, measured),
        "by_batch": errors_by([case["batch"] for case in cases], predicted, measured),
        "per_rank": rank_order(predicted, measured, [case["halves_s"] for case in cases]),
        "ranking": rankings[-1],
        "ranking_tokens_only": naive_rankings[-1],
        "rankings": rankings,
    }


def rank_plans(cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The ranking of the plans in every batch, {"batch": tokens, **`agreement.ranking`}."""
    found = []
    for batch in dict.fromkeys(case["batch"] for case in cases):
        mine = [case for case in cases if case["batch"] == batch]
        plans = list(dict.fromkeys(case["plan"] for case in mine))
        predicted, measured = (layer_sums(mine, plans, _column(mine, name)) for name in ("predicted_s", "measured_s"))
        found.append({"batch": batch, **ranking(plans, predicted, measured, noise_floor(mine, plans))})
    return found


def layer_totals(cases: Sequence[Mapping[str, Any]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Predicted and measured seconds of every (batch, plan, layer): the slowest rank's."""
    found: dict[tuple[Any, ...], list[float]] = {}
    for case in cases:
        pair = found.setdefault((case["batch"], case["plan"], case["layer"]), [0.0, 0.0])
        pair[0], pair[1] = max(pair[0], case["predicted_s"]), max(pair[1], case["measured_s"])
    predicted, measured = np.array(list(found.values())).T
    return predicted, measured


def noise_floor(cases: Sequence[Mapping[str, Any]], plans: Sequence[str]) -> float:
    """Relative error of a plan's measured time: how far two halves of the repeats are apart, the median over plans."""
    halves = [layer_sums(cases, plans, [case["halves_s"][half] for case in cases]) for half in (0, 1)]
    return float(np.median(np.abs(halves[0] / halves[1] - 1)))


def rescore(document: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded validation judged with today's cost model: its own calibration fitted again, its own cases predicted again.

    Returns {"recorded": errors, "kept_kernel": errors with the recorded parameters, "now": errors, "ranking_recorded",
    "ranking_now" (the mean Spearman over batches, None where nothing could be ranked), "worse": bool}.
    InputError when the document holds no raw cases.
    """
    part = document.get("validation")
    if not isinstance(part, Mapping) or not part.get("cases") or not (part.get("calibration") or {}).get("table"):
        raise InputError("no validation with raw cases and its calibration's table; give a file that `moesim validate -o` wrote")
    known, cases = part["calibration"], part["cases"]
    peak, cold = ComputePeak(**known["peak"]), part["flush_B"] > 0
    table = check_table(pd.DataFrame(known["table"]), place="recorded calibration")
    kernels = {
        "kept_kernel": kernel_of(known["kernel"]),
        "now": fit_best(table, peak, templates(known["backend"], known["dtype"], known["device"])).kernel,
    }
    found: dict[str, Any] = {"recorded": part["summary"], "ranking_recorded": _mean_spearman(cases)}
    for name, kernel in kernels.items():
        again = [{**case, "predicted_s": predict_case(case, part["model"], peak, kernel, cold=cold)} for case in cases]
        found[name] = errors(_column(again, "predicted_s"), _column(again, "measured_s"))
        if name == "now":
            found["ranking_now"] = _mean_spearman(again)
    before, after = found["ranking_recorded"], found["ranking_now"]
    larger = any(found["now"][name] > found["recorded"][name] * 1.02 + SLACK for name in ("median_ape", "p90_ape"))
    found["worse"] = larger or (before is not None and after is not None and after < before - 0.05)
    return found


def rescore_file(path: Path) -> dict[str, Any]:
    """`rescore` of a file; InputError names it."""
    document = read_json(path, InputError)
    if not isinstance(document, Mapping):
        raise InputError(f"{path}: expected a JSON object, found {type(document).__name__}")
    try:
        return rescore(document)
    except (KeyError, TypeError) as problem:
        raise InputError(f"{path}: incomplete measurement ({type(problem).__name__}: {problem}); measure again") from None
    except InputError as problem:
        raise InputError(f"{path}: {problem}") from None


def _mean_spearman(cases: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean over the batches whose plans differ by more than twice the noise."""
    clear = [one["spearman"] for one in rank_plans(cases) if one["spearman"] is not None and one["spread"] > 2 * one["noise_floor"]]
    return float(np.mean(clear)) if clear else None


def _column(cases: Sequence[Mapping[str, Any]], name: str) -> NDArray[np.float64]:
    return np.array([case[name] for case in cases], np.float64)
