"""Options that several verbs share: the same word and meaning everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

TracePath = Annotated[
    Path, typer.Argument(help="A trace: a directory written by `moesim capture` or `moesim import`, or one .parquet file.", metavar="TRACE")
]
PlanPaths = Annotated[list[Path], typer.Argument(help="Plans written by `moesim place`.", metavar="PLAN…")]
ClusterName = Annotated[str, typer.Option("--cluster", help="A cluster by name (see `moesim profiles`), or the path of a .toml file.")]
Tokens = Annotated[
    str | None, typer.Option("--tokens", help="Range of the trace's tokens, such as 0%:50% or 1000:2000: learn on one part, score on another.")
]
Domain = Annotated[list[str] | None, typer.Option("--domain", help="Only tokens of this domain; may be repeated.")]
Phase = Annotated[str | None, typer.Option("--phase", help="Only tokens of this phase: train, prefill or decode.")]
TokensPerDevice = Annotated[
    int, typer.Option("--tokens-per-device", min=1, help="Tokens each device holds in one step: thousands for prefill, tens for decode.")
]
PrefixCache = Annotated[
    bool, typer.Option("--prefix-cache", help="Prompts find what earlier ones of their rank began with alike (needs Mooncake's hash_ids).")
]
TransportName = Annotated[
    str | None,
    typer.Option(
        "--transport",
        help="How tokens travel: nccl, deepep-normal, deepep-low-latency or hierarchical; default: deepep-normal between equal nodes, else nccl.",
    ),
]
Mode = Annotated[
    Literal["prefill", "decode", "training"] | None,
    typer.Option("--mode", help="What a step is: prefill (default), decode (tokens attend to --context tokens) or training."),
]
Context = Annotated[int | None, typer.Option("--context", min=1, help="Length of a sequence in tokens, for attention. Default: 4096.")]
Contention = Annotated[
    bool | None,
    typer.Option("--contention", help="Traffic shares the links of the cluster's graph; without it, traffic of one kind takes turns."),
]
BackendName = Annotated[
    Literal["loop", "grouped", "triton"] | None,
    typer.Option(
        "--backend", help="How experts are computed: one GEMM pair each, torch's grouped_mm, an own kernel. Default: loop on cpu, else grouped."
    ),
]
WeightType = Annotated[
    Literal["fp32", "bf16", "fp16", "fp8"] | None, typer.Option("--dtype", help="What weights are held in. Default: fp32 on cpu, bf16 on cuda.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Same seed, same result.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of a table.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
