"""`moesim serve`: a stream of requests through one deployment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moesim.cli.options import AsJson, ClusterName, Domain, Force, Phase, PrefixCache, Seed, Tokens, TransportName
from moesim.errors import InputError

if TYPE_CHECKING:
    from moesim.serving import ServingResult

NAME = "serve"
EPILOG = (
    "Examples: moesim serve azure.csv --trace traces/run1 --cluster h100x8 --slo ttft=2s,tpot=50ms -o serving.json · "
    "moesim serve poisson:rate=20,span=10min,prompt=800,output=250 --model qwen3-30b-a3b --cluster h100x8 --layout dp4tp2 · "
    "moesim serve requests.csv --measured requests.csv --model qwen3-30b-a3b --cluster rtx-pro-6000x2 --moe-profile moe.csv "
    "--exchange all-gather --ahead --max-seqs 128 --max-batch-tokens 2048 · "
    "moesim serve mooncake.jsonl.gz --model deepseek-v3 --cluster h200-4x8 --prefix-cache"
)


def run(
    arrivals: Annotated[
        str,
        typer.Argument(
            help="A request log (Azure, BurstGPT or arrival_s,input_toks,output_toks as CSV; Mooncake as JSON lines; gzipped or not), or a process: "
            "poisson, gamma, markov or diurnal with numbers, as in diurnal:rate=3,span=24h,prompt=900,output=200,swing=0.6.",
            metavar="ARRIVALS",
        ),
    ],
    trace: Annotated[Path | None, typer.Option("--trace", help="Routing of the model served: which experts its tokens choose.")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Without --trace: a preset or a config.json (also of a model without experts); a typical routing is made up."),
    ] = None,
    mix: Annotated[
        list[str] | None,
        typer.Option("--mix", help="Domains of --trace from a time on, such as 9h:code=3,prose=1; repeat it, the first from 0h. Default: as there."),
    ] = None,
    cluster: ClusterName = "h100x8",
    devices: Annotated[int | None, typer.Option("--devices", min=1, help="Only the first devices of the cluster.")] = None,
    plan: Annotated[Path | None, typer.Option("--plan", help="Where the experts of an instance live; default: in order.")] = None,
    layout: Annotated[
        str | None, typer.Option("--layout", help="Attention: dp8, tp8 or dp4tp2 (data- x tensor-parallel). Experts are spread over all devices.")
    ] = None,
    replicas: Annotated[int, typer.Option("--replicas", min=1, help="Equal instances, each on a cluster of its own.")] = 1,
    prefill: Annotated[int, typer.Option("--prefill", min=0, help="More instances that compute only prompts and hand them over.")] = 0,
    slo: Annotated[str | None, typer.Option("--slo", help="Limits as in ttft=2s,tpot=50ms,latency=60s,share=95%.")] = None,
    traffic: Annotated[float, typer.Option("--traffic", help="So many times the requests per second.")] = 1.0,
    first: Annotated[int | None, typer.Option("--first", min=1, help="Only the first requests.")] = None,
    max_seqs: Annotated[int, typer.Option("--max-seqs", min=1, help="Requests a data-parallel rank runs at a time.")] = 256,
    max_batch_tokens: Annotated[int, typer.Option("--max-batch-tokens", min=1, help="Tokens in a step of a rank; longer prompts are cut.")] = 8192,
    memory_share: Annotated[float, typer.Option("--memory-share", help="Share of device memory the engine uses; what weights leave is cache.")] = 0.9,
    cache_tokens: Annotated[
        int | None,
        typer.Option("--cache-tokens", min=1, help="Tokens a rank's key-value cache holds, as engines print it; default: from memory."),
    ] = None,
    prefix_cache: PrefixCache = False,
    exchange: Annotated[
        Literal["all-to-all", "all-gather"],
        typer.Option("--exchange", help="How tokens reach experts: all-to-all, or all-gather and reduce-scatter (vLLM's default)."),
    ] = "all-to-all",
    split: Annotated[
        bool, typer.Option("--split-experts", help="Cut every expert over all devices instead (vLLM without expert parallelism).")
    ] = False,
    transport: TransportName = None,
    ahead: Annotated[bool, typer.Option("--ahead", help="A step is scheduled while the one before it runs (vLLM's async scheduling).")] = False,
    host: Annotated[
        str | None, typer.Option("--host", help="Time of a step on the host, such as 3ms; with --ahead it hides behind the devices'.")
    ] = None,
    moe_profile: Annotated[
        Path | None, typer.Option("--moe-profile", help="Measured times of one MoE layer: CSV of tokens, activated_experts, time_us.")
    ] = None,
    price: Annotated[float | None, typer.Option("--price", min=0, help="Price of a device for an hour; default: the profile's rent.")] = None,
    measured: Annotated[
        Path | None,
        typer.Option("--measured", help="The same requests as a real engine served them (ttft_ms, tpot_ms, latency_ms): prints signed errors."),
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the whole result as JSON; `moesim report` reads it.")] = None,
    tokens: Tokens = None,
    domain: Domain = None,
    phase: Phase = None,
    seed: Seed = 0,
    json: AsJson = False,
    force: Force = False,
) -> None:
    """Simulate a deployment under traffic: batches, cache, pre-emption; latencies, SLO attainment, utilisation, energy and price.

    Every step takes expert and exchange times of a batch routed from the trace, layer by layer. Exit code 1 when the SLO is missed.
    """
    from moesim.cli.screen import emit_json, note, open_trace, progress
    from moesim.cost import CostModel
    from moesim.files import check_output, write_json
    from moesim.hardware import load_cluster
    from moesim.model import load_model
    from moesim.plan import load_plan
    from moesim.serving import Deployment, Routing, Slo, first_devices, parse_layout, serve
    from moesim.serving.deployment import HOST_S
    from moesim.serving.measured import compare_measured, load_measured
    from moesim.serving.opening import open_arrivals, parse_mix
    from moesim.serving.profiles import MoeProfile
    from moesim.units import parse

    if output:
        check_output(output, force=force)
    if (trace is None) == (model is None):
        raise InputError("give --trace (routing of the model served), or --model to make up a typical routing; one of them")
    if trace is None and (tokens or domain or phase or mix):
        raise InputError("--tokens, --domain, --phase and --mix select from --trace; give one")
    limits = Slo.parse(slo) if slo else None
    theirs = load_measured(measured) if measured else None
    source = open_trace(trace, tokens=tokens, domain=domain, phase=phase) if trace else None
    spec = source.model if source else load_model(str(model), dense=True)
    routing = Routing.of(source, mix=parse_mix(mix or ())) if source else None
    where = load_cluster(cluster)
    where = first_devices(where, devices) if devices else where
    requests = open_arrivals(arrivals, seed=seed)
    if first:
        requests = requests.first(first)
    if traffic != 1.0:
        requests = requests.times(traffic)
    loaded = load_plan(plan) if plan else None
    if loaded:
        loaded.check_fits(spec, where.size, place=str(plan))
    profile = None
    if moe_profile:
        caches = {device.cache_B for device in where.devices}
        profile = MoeProfile.load(
            moe_profile, expert_B=spec.expert_B / (where.size if split else 1), cache_B=max((cache for cache in caches if cache), default=None)
        )
    try:
        host_s = HOST_S if host is None else parse(host, "s")
    except ValueError as problem:
        raise InputError(f"--host: {problem}") from None
    values: dict[str, Any] = {
        "model": spec,
        "cluster": where,
        "cost": CostModel.of(where, spec, transport=transport),
        "placement": loaded.placement if loaded else None,
        "tp": parse_layout(layout, where.size) if layout else 1 if spec.moe_layers else where.size,
        "max_seqs": max_seqs,
        "max_batch_tokens": max_batch_tokens,
        "memory_share": memory_share,
        "cache_tokens": cache_tokens,
        "prefix_cache": prefix_cache,
        "split": split,
        "exchange": exchange,
        "ahead": ahead,
        "host_s": host_s,
        "expert_profile": profile,
        "price_per_hour": price,
    }
    ahead_of = Deployment(name="prefill", replicas=prefill, **values) if prefill else None
    deployment = Deployment(name=loaded.name if loaded else "in order", replicas=replicas, prefill=ahead_of, **values)
    with progress("serving"):
        result = serve(requests, deployment, routing=routing, seed=seed, slo=limits)
    rows = compare_measured(result, theirs) if theirs else None
    data = result.to_dict() | ({"measured": rows} if rows else {})
    if output:
        write_json(output, data)
    if json:
        emit_json({**data, "requests": None})
    else:
        show(result, rows)
        note(*(f"note: {line}" for line in result.notes))
    if limits and not result.meets_slo:
        raise typer.Exit(1)


def show(result: ServingResult, measured: list[dict[str, Any]] | None) -> None:
    """Tables of a run: latencies, where step time went, what it took; errors where it was measured."""
    from moesim.cli.screen import table
    from moesim.units import human

    s = result.summary()

    def cells(name: str) -> list[str]:
        return ["-" if value is None else human(value, "s") for value in s[name].values()]

    title = f"{s['name']}: {s['served']:,} of {s['requests']:,} requests served in {human(s['span_s'], 's')}"
    words = {"ttft_s": "to the first token", "tpot_s": "per token after it", "latency_s": "to the last token", "queue_s": "until first in a batch"}
    table(title, ["time", "mean", "P50", "P90", "P95", "P99"], [[word, *cells(name)] for name, word in words.items()])
    spent = sum(result.step_parts_s.values())
    if spent:
        parts = [[name, human(value / result.steps, "s"), f"{value / spent:.1%}"] for name, value in result.step_parts_s.items() if value > 0]
        table(f"A mean step of {human(spent / result.steps, 's')}", ["part", "time", "share"], parts)
    print(f"{s['requests_per_s']:.4g} requests/s, {s['output_tokens_per_s']:.4g} output tokens/s, {s['prompt_tokens_per_s']:.4g} prompt tokens/s")
    if result.slo:
        print(f"SLO {result.slo}: kept by {s['attainment']:.2%}, goodput {s['goodput_per_s']:.4g} requests/s")
    price = f", price {s['cost']:.4g} ({s['cost_per_million_output_tokens']:.4g} per million output tokens)" if s["cost"] is not None else ""
    energy = f", energy {human(s['energy_J'], 'J')}, at most {human(s['most_energy_J'], 'J')} (estimate)" if s["energy_J"] is not None else ""
    print(
        f"devices busy {s['utilisation']:.1%} of {s['device_hours']:.4g} device-hours{energy}{price}; sent back for lack of cache: {s['sent_back']}"
    )
    if measured:
        rows = [
            [f"{row['quantity']} {row['statistic']}", human(row["simulated_s"], "s"), human(row["measured_s"], "s"), f"{row['error']:+.1%}"]
            for row in measured
        ]
        table("Against the measured run", ["quantity", "simulated", "measured", "error"], rows)
