"""Top of a document: what was run, what came out, what to be careful about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from moesim.report.blocks import Answer, Tile, change
from moesim.report.measured_parts import Validation
from moesim.report.parts import SweepPart
from moesim.report.schema import Comparison, Document, ResultPart, ScoredPart, Summary
from moesim.report.sections.caching import kept
from moesim.report.sections.comparison import BASELINE, baseline, strongest
from moesim.report.sections.evidence import runs_of, worst
from moesim.report.sections.recommend import buy, elsewhere, scale, served
from moesim.report.sections.sweep import groups, value_text, words
from moesim.report.text import percent, quantity, sentence


def answer(document: Document, evidence: Sequence[Document] = ()) -> Answer:
    """The answer of a document, and of the documents of measurements that back it. Says only what their sections hold."""
    sentences: list[str] = []
    tiles: list[Tile] = []
    cautions: list[str] = []
    if document.capacity and document.sweep:
        buy(document, document.capacity, document.sweep, sentences, tiles, cautions, backed=bool(evidence))
    elif document.sweep:
        _swept(document.sweep, sentences, tiles, cautions)
    elif document.serving:
        served(document.serving, sentences, tiles)
    if document.scaling:
        scale(document.scaling, sentences, tiles, cautions)
    if document.caching:
        kept(document.caching, sentences, tiles, cautions)
    if document.comparison and not document.capacity:
        _compared(document.comparison, sentences, tiles, cautions)
    elif document.results and not document.capacity:
        _simulated(document.results, sentences, tiles)
    elif document.inspection and not document.capacity:
        skew = document.inspection.skew
        tiles.append(Tile(label="hottest expert over the mean", value=f"{sum(skew) / len(skew):.2f}×", detail=f"worst layer {max(skew):.2f}×"))
    for each in (document, *evidence):
        if each.validation:
            _validated(each.validation, sentences, tiles, cautions)
        sentences += [worst(run) for run in runs_of(each)]
    if evidence and document.capacity:
        cautions += elsewhere(document.capacity, evidence)
    return Answer(ran=ran(document), sentences=sentences, tiles=tiles, cautions=cautions)


def ran(document: Document) -> str:
    """One paragraph on what was run."""
    said = []
    if t := document.training:
        size = f"{quantity(t.parameters)} parameters"
        said.append(f"A model of {size}, {t.model}, was trained for {t.steps:,} steps on {_count(len(t.domains), 'domain')}.")
    if i := document.inspection:
        shape = f"{_count(len(i.layers), 'MoE layer')} × {i.experts} experts, top-{i.top_k}"
        said.append(f"The routing of {i.tokens:,} tokens of {i.model} was inspected: {shape}.")
    if k := document.caching:
        last = k.scored[-1]
        said.append(f"A cache of the experts of {k.model} was planned for {k.cluster} and judged on {last.tokens:,} tokens ({last.label}).")
    if w := document.sweep:
        said.append(
            f"{_count(len(w.cases), 'case')} of {w.kind!r} {_was(len(w.cases))} run, differing in {', '.join(w.axes).replace('_', ' ') or 'nothing'}."
        )
    if (c := document.comparison) and not document.capacity:
        plans = {plan.name for part in c.scored_on for plan in part.plans}
        where = c.cluster_title or c.cluster
        said.append(
            f"{_count(len(plans), 'plan')}, learnt from {c.learnt_from}, {_was(len(plans))} scored on {_count(len(c.scored_on), 'set')} "
            f"of tokens, {c.tokens_per_device:,} per device and step ({where})."
        )
    if document.results and not document.capacity:
        r = document.results[0]
        plans = {result.summary.name for result in document.results}
        steps = f"{_count(r.steps, 'step')} of {r.tokens_per_step:,.0f} tokens"
        said.append(f"{_count(len(plans), 'plan')} {_was(len(plans))} simulated on {r.cluster} over {steps}.")
    if v := document.validation:
        said.append(f"{_count(len(v.cases), 'case')} {_was(len(v.cases))} executed on {v.where} and compared with the prediction.")
    return " ".join(said)


def _swept(sweep: SweepPart, sentences: list[str], tiles: list[Tile], cautions: list[str]) -> None:
    """Who wins under how many conditions; tiles of the best case where there is one set of conditions."""
    contests, figure = groups(sweep), sweep.figures[0]
    winners = Counter(words(sweep.choices, cases[0].values, bare=True) for cases in contests.values())
    if len(contests) == 1:
        best = next(iter(contests.values()))[0]
        if sweep.choices:
            sentences.append(
                f"{words(sweep.choices, best.values, bare=True)} has the best {figure.label}: {value_text(figure, best.figures[figure.name])}."
            )
        tiles += [Tile(label=f.label, value=value_text(f, best.figures.get(f.name))) for f in sweep.figures[:3]]
    elif winners and sweep.choices:
        said = "; ".join(f"{name} under {_count(count, 'condition')}" for name, count in winners.most_common(4))
        sentences.append(f"The best {figure.label} of {len(contests):,} sets of conditions: {said}.")
    if failed := sum(case.status == "failed" for case in sweep.cases):
        cautions.append(f"{failed:,} of {_count(len(sweep.cases), 'case')} failed and are missing from every table.")


def _compared(comparison: Comparison, sentences: list[str], tiles: list[Tile], cautions: list[str]) -> None:
    part = strongest(comparison)
    best, base = _fastest(part.plans), baseline(part.plans)
    sentences.append(f"On {_tokens(part)}, {best.name} has the shortest MoE layer: {quantity(best.layer_time_s, 's')}{_against(best, base)}.")
    elsewhere = [_elsewhere(best, other) for other in comparison.scored_on if other.kind == "cross-domain" and other is not part]
    if any(elsewhere):
        sentences.append(f"The layer time of {best.name} on domains it has not seen: {'; '.join(text for text in elsewhere if text)}.")
    if part.kind == "in-sample":
        cautions.append("Every plan was scored only on the tokens it learnt from, so these figures say nothing yet about other tokens.")
    tiles += [
        _tile("best layer time", best, base, "layer_time_s", lambda value: quantity(value, "s")),
        _tile("busiest device over the mean", best, base, "max_load_ratio", lambda value: f"{value:.3f}"),
        _tile("devices per token", best, base, "fanout_devices", lambda value: f"{value:.2f}"),
    ]


def _tile(label: str, best: Summary, base: Summary | None, field: str, show: Callable[[float], str]) -> Tile:
    value = show(getattr(best, field))
    if base is None or base is best:
        return Tile(label=label, value=value, detail=best.name)
    gain = change(getattr(best, field), getattr(base, field))
    tone = "good" if gain < -5e-4 else "bad" if gain > 5e-4 else "plain"
    return Tile(label=label, value=value, detail=f"{percent(gain, signed=True)} vs {BASELINE}, {show(getattr(base, field))}", tone=tone)


def _simulated(found: list[ResultPart], sentences: list[str], tiles: list[Tile]) -> None:
    summaries = [r.summary for r in found]
    best = _fastest(summaries)
    if len({(r.model, r.cluster, r.tokens_per_step) for r in found}) == 1 and len(found) > 1:
        sentences.append(f"{best.name} has the shortest MoE layer: {quantity(best.layer_time_s, 's')}{_against(best, baseline(summaries))}.")
    elif len(found) > 1:
        sentences.append("The simulations differ in model, cluster or step size, so no plan is called the best.")
        return
    tiles += [
        Tile(label="layer time", value=quantity(best.layer_time_s, "s"), detail=best.name),
        Tile(label="busiest device over the mean", value=f"{best.max_load_ratio:.3f}", detail=f"worst layer {best.worst_layer_load_ratio:.3f}"),
        Tile(label="devices per token", value=f"{best.fanout_devices:.2f}", detail=f"{quantity(best.a2a_bytes, 'B')} all-to-all per layer"),
    ]


def _validated(validation: Validation, sentences: list[str], tiles: list[Tile], cautions: list[str]) -> None:
    errors, naive, ranking = validation.summary, validation.models.get("tokens-only"), validation.ranking
    against = f", {percent(naive.median_ape)} from token counts alone" if naive else ""
    sentences.append(
        f"Measured on {validation.where}, predictions are off by {percent(errors.median_ape)} in the median and {percent(errors.p90_ape)} "
        f"at the 90th percentile of {errors.n:,} cases{against}."
    )
    if ranking and ranking.verdict:
        sentences.append(sentence(ranking.verdict))
    tone = "plain" if naive is None else "good" if errors.median_ape < naive.median_ape else "bad"
    tiles.append(Tile(label="prediction error, median", value=percent(errors.median_ape), detail=f"{errors.n:,} measured cases{against}", tone=tone))
    failed = [check.name for check in validation.checks if not check.ok]
    if failed:
        cautions.append(f"{len(failed)} of {_count(len(validation.checks), 'check')} failed: {', '.join(failed)}.")


def _fastest(plans: list[Summary]) -> Summary:
    return min(plans, key=lambda plan: plan.layer_time_s)


def _against(plan: Summary, base: Summary | None) -> str:
    if base is None:
        return ""
    if base is plan:
        return f"; nothing beats {BASELINE} here"
    gain = change(plan.layer_time_s, base.layer_time_s)
    return f", {percent(abs(gain))} {'less' if gain <= 0 else 'more'} than {BASELINE} ({quantity(base.layer_time_s, 's')})"


def _elsewhere(best: Summary, part: ScoredPart) -> str:
    """How a plan that was best elsewhere does on a part, or nothing when the part lacks it."""
    plan = next((plan for plan in part.plans if plan.name == best.name), None)
    if plan is None:
        return ""
    base, winner = baseline(part.plans), _fastest(part.plans)
    gain = f" ({percent(change(plan.layer_time_s, base.layer_time_s), signed=True)} vs {BASELINE})" if base and base is not plan else ""
    beaten = f", where {winner.name} is the fastest" if winner.layer_time_s < plan.layer_time_s else ""
    return f"{part.label} {quantity(plan.layer_time_s, 's')}{gain}{beaten}"


def _tokens(part: ScoredPart) -> str:
    seen = {"held-out": "it has not seen", "cross-domain": "of a domain it has not seen", "in-sample": "it learnt from"}[part.kind]
    return f"{part.tokens:,} tokens {seen} ({part.label})"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _was(number: int) -> str:
    return "was" if number == 1 else "were"
