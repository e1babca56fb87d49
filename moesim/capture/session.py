"""`capture`: from a model and a path to a running Recorder."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pandas  # noqa: F401 - pyarrow loads these when it first writes: better now than in the first step
import pyarrow.pandas_compat
import pyarrow.parquet  # noqa: F401
import torch
from torch import nn

from moesim.capture.discover import Router, find_routers, model_config, refuse_late, trace_spec
from moesim.capture.recorder import OnError, Recorder
from moesim.capture.ring import WhenFull
from moesim.errors import CaptureError
from moesim.files import digest
from moesim.model import ModelSpec
from moesim.trace import TraceWriter


def capture(
    model: nn.Module,
    path: str | Path,
    *,
    domain: str = "",
    weights: bool = True,
    logits: bool = False,
    model_spec: ModelSpec | None = None,
    every: int = 1,
    max_tokens: int | None = None,
    on_error: OnError = "raise",
    when_full: WhenFull = "block",
    ring_slots: int = 16,
    part_rows: int = 1 << 17,
    part_seconds: float = 30.0,
) -> Recorder:
    """Record the routing of every forward pass of `model` into a trace at `path`; use as a context manager.

        with moesim.capture(model, "traces/run1", domain="code") as recorder:
            for i, batch in enumerate(batches):
                recorder.step(i)            # optional
                model(**batch).loss.backward()

    Parameters
    ----------
    domain
        what the text is; `recorder.step(domain=...)` changes it.
    weights
        store gate weights beside the ids.
    logits
        store the routers' logits of all experts too, as float16: E/K times the room of the weights.
    model_spec
        shape of the model; read from its Hugging Face config when None.
    every, max_tokens
        record every n-th step only, and stop at the end of the pass that reaches this many tokens.
    on_error
        "raise" a CaptureError in the next forward pass or step, or "warn" once and let the run go on.
    when_full
        "block" the run, or "drop" whole passes (counted in the manifest), when the disk is slower than the routing.
    ring_slots
        forward passes that may wait for the writer, each of T·L·K·4 bytes, with logits T·L·E·4 more.
    part_rows, part_seconds
        a part of the trace is made durable after so many tokens or seconds; a crash loses at most that.

    In a distributed run every process calls this with the same path and writes its own tokens; no communication.
    Start before the first call of a compiled model. Raises CaptureError when no router is known, the model's shape is not
    known, it is compiled already, or a router gives no logits and they are asked for (with `on_error="warn"` a warning, and a
    trace without); OutputExists when `path` holds another run.
    """
    if isinstance(model, nn.DataParallel):
        raise CaptureError("nn.DataParallel runs copies of the model in threads, which hooks cannot follow; use DistributedDataParallel")
    if every < 1 or ring_slots < 1:
        raise CaptureError(f"every(={every}) and ring_slots(={ring_slots}) must be >= 1")
    routers = find_routers(model)
    refuse_late(model, routers)
    spec, zero_experts = trace_spec(model, routers, model_spec)
    logits = logits and _gives_logits(routers, on_error)
    rank, world = process_rank()
    try:
        writer = TraceWriter(
            path, spec, weights=weights, logits=logits, captured_by=_provenance(model, routers, zero_experts, world), rank=rank,
            part_rows=part_rows, part_seconds=part_seconds, run=_run_name(world),
        )  # fmt: skip
        writer.rehearse()
    except OSError as problem:
        raise CaptureError(f"{path}: a trace cannot be written there: {problem}; give a path that can be written") from None
    return Recorder(
        model, routers, writer, domain=domain, every=every, max_tokens=max_tokens, ring_slots=ring_slots,
        when_full=when_full, on_error=on_error,
    )  # fmt: skip


def process_rank() -> tuple[int, int]:
    """(rank, world size) of this process: from torch.distributed, else from RANK and WORLD_SIZE."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _gives_logits(routers: list[Router], on_error: OnError) -> bool:
    silent = [router for router in routers if router.adapter.logits is None]
    if not silent:
        return True
    message = (
        f"{silent[0].name} ({type(silent[0].module).__name__}) gives no router logits, like {len(silent)} of {len(routers)} routers; capture with "
        "logits=False, or say where they are: moesim.capture.register_router('ClassName', read, logits=...)"
    )
    if on_error == "raise":
        raise CaptureError(message)
    warnings.warn(f"{message}. Capturing without logits", RuntimeWarning, stacklevel=3)
    return False


def _run_name(world: int) -> str:
    """A name all processes of one launch share; empty in a single process."""
    if world == 1:
        return ""
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_STEP_ID")
    return digest(str(world), *(os.environ.get(name, "") for name in names))


def _provenance(model: nn.Module, routers: list[Router], zero_experts: int, world: int) -> dict[str, Any]:
    transformers = sys.modules.get("transformers")
    config = model_config(model)
    flags = ("norm_topk_prob", "scoring_func", "routed_scaling_factor", "n_group", "topk_group", "_experts_implementation")
    return {
        "by": "moesim.capture",
        "torch": str(torch.__version__),
        "transformers": getattr(transformers, "__version__", None),
        "model_class": type(model).__name__,
        "checkpoint": getattr(config, "_name_or_path", "") or "",
        "adapters": sorted({router.adapter.name for router in routers}),
        "router_class": sorted({type(router.module).__name__ for router in routers}),
        "routers": {str(router.layer): router.name for router in routers},
        "router_flags": {name: value for name in flags if isinstance(value := getattr(config, name, None), (bool, int, float, str))},
        "zero_experts": zero_experts,
        "world": world,
    }
