"""Files of other tools, in and out. Nothing in a file is ever executed.

FORMATS          every format by name: what it holds, which way it goes
import_trace     tokens of a file -> a trace directory
import_loads     counts of a file -> Loads (no tokens, no co-activation)
import_plan      placement file -> Plan          export_plan    Plan -> placement file + sidecar
check            findings before launch, on placement files and on captures
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moesim.errors import InputError
from moesim.interop import (
    eplb,
    esft,
    exflow,
    flame,
    llama_cpp,
    megatron,
    moe_balance,
    npz,
    plans,
    sglang,
    sglang_recorder,
    tensorrt_llm,
    tensorrt_statistics,
    vllm_ascend,
    vllm_experimental,
    vllm_routed,
)
from moesim.interop.check import Wanted, check_placement
from moesim.interop.check_capture import check_capture
from moesim.interop.layout import Engine, Finding
from moesim.interop.loads import Loads, OnlyCounts, load_loads
from moesim.interop.plans import Exported
from moesim.interop.routing import Imported, Routing, write_trace
from moesim.model import ModelSpec
from moesim.plan import Plan

TokenReader = Callable[[Path, ModelSpec | None, str], Routing]
LoadReader = Callable[[Path, ModelSpec | None], Loads]
LoadWriter = Callable[[Path, Loads, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """One format: how its tokens or counts are read, and the engine whose placement it is."""

    name: str
    title: str
    tokens: TokenReader | None = None
    loads: LoadReader | None = None
    save_loads: LoadWriter | None = None
    engine: Engine | None = None
    phase: str = "prefill"  # of tokens whose phase the file does not say


def _placement(engine: Engine, loads: LoadReader | None = None, save_loads: LoadWriter | None = None) -> Format:
    return Format(name=engine.name, title=engine.title, engine=engine, loads=loads, save_loads=save_loads)


_ALL = (
    Format(name="npz", title="arrays ids [T, L, K], optional weights and seqlens", tokens=npz.read_npz),
    Format(
        name="sglang-recorder",
        title="SGLang expert distribution recorder (.pt)",
        tokens=sglang_recorder.read_tokens,
        loads=sglang_recorder.read_loads,
    ),
    Format(name="vllm-routed-experts", title="vLLM returned routed_experts (.npz, .npy)", tokens=vllm_routed.read_vllm),
    Format(name="megatron", title="Megatron-Core router trace (.jsonl)", tokens=megatron.read_megatron, phase="train"),
    Format(name="flame", title="FLAME-MoE traces (layer_NN.parquet)", tokens=flame.read_flame, phase="train"),
    Format(name="llama-cpp", title="expert counts of the llama.cpp family (.csv)", loads=llama_cpp.read_counts),
    Format(name="exflow", title="ExFlow top-1 array (.npy)", tokens=exflow.read_exflow),
    Format(name="moe-balance", title="moe-balance records (.jsonl)", tokens=moe_balance.read_moe_balance),
    Format(name="esft", title="ESFT expert logs (expert_weights_<layer>.txt)", tokens=esft.read_esft),
    Format(
        name="tensorrt-llm-statistics",
        title="TensorRT-LLM expert statistics (folder)",
        tokens=tensorrt_statistics.read_tokens,
        loads=tensorrt_statistics.read_loads,
    ),
    _placement(sglang.ENGINE, sglang.read_loads, sglang.write_loads),
    _placement(tensorrt_llm.ENGINE),
    _placement(vllm_ascend.ENGINE),
    _placement(eplb.ENGINE, eplb.read_loads, eplb.write_loads),
    _placement(vllm_experimental.ENGINE, vllm_experimental.read_loads),
)
FORMATS: dict[str, Format] = {form.name: form for form in _ALL}


def _format(name: str, what: str, has: Callable[[Format], bool]) -> Format:
    names = ", ".join(form.name for form in _ALL if has(form))
    form = FORMATS.get(name)
    if form is None or not has(form):
        raise InputError(f"format {name!r} cannot be {what}; formats: {names}")
    return form


def import_trace(format: str, source: Path, output: Path, *, model: ModelSpec | None = None, domain: str = "", phase: str | None = None) -> Imported:
    """Write the routing of `source` as a trace at `output`; `phase` labels tokens whose phase the file does not say.

    Raises InputError for an unknown format, TraceError for a file that is not what it should be (OnlyCounts where it
    holds no tokens, DoesNotFit where it contradicts the model), OutputExists.
    """
    form = _format(format, "imported", lambda f: f.tokens is not None or f.loads is not None)
    if form.tokens is None:
        raise OnlyCounts(source, "record tokens with another tool")
    label = phase or form.phase
    routing = form.tokens(source, model, label)
    return write_trace(routing, output, model=model, domain=domain, phase=label, captured_by=f"moesim import {format}")


def import_loads(format: str, source: Path, *, model: ModelSpec | None = None) -> Loads:
    """Counts of `source`; InputError for formats that hold none."""
    form = _format(format, "imported as loads", lambda f: f.loads is not None)
    assert form.loads is not None
    return form.loads(source, model)


def export_loads(format: str, loads: Loads, path: Path, *, model: ModelSpec | None = None, force: bool = False) -> Exported:
    """Write loads for an engine that balances by itself (SGLang `logical_count`, EPLB `weight`)."""
    from moesim.files import check_output

    form = _format(format, "exported from loads", lambda f: f.save_loads is not None)
    assert form.save_loads is not None
    if model and (model.moe_layers, model.experts) != (loads.layers, loads.experts):
        raise InputError(f"loads of {len(loads.layers)} layers x {loads.experts} experts are not of {model.name!r}; give the right --model")
    layers = model.layers if model else max(loads.layers) + 1
    form.save_loads(check_output(path, force=force), loads, layers)
    launch = (f"--init-expert-location {path}: SGLang runs its own EPLB on these counts at start",) if format == "sglang" else ()
    return Exported(files=(path,), launch=launch, notes=() if model else (f"no --model: took {layers} decoder layers",))


def engine(format: str, what: str) -> Engine:
    """The engine of a placement format; InputError lists them. `what` is said of an unknown one: "exported"."""
    form = _format(format, what, lambda f: f.engine is not None)
    assert form.engine is not None
    return form.engine


def import_plan(
    format: str, source: Path, *, model: ModelSpec | None = None, devices: int | None = None, dispatch: str | None = None
) -> tuple[Plan, tuple[str, ...]]:
    """Plan of a placement file and remarks; see `moesim.interop.plans.import_plan`."""
    return plans.import_plan(engine(format, "imported as a plan"), source, model=model, devices=devices, dispatch=dispatch)


def export_plan(format: str, plan: Plan, path: Path, *, model: ModelSpec | None = None, draft_layers: int = 0, force: bool = False) -> Exported:
    """Write a plan for an engine, with its sidecar; see `moesim.interop.plans.export_plan`."""
    return plans.export_plan(engine(format, "exported"), plan, path, model=model, draft_layers=draft_layers, force=force)


def check(format: str, path: Path, wanted: Wanted, *, counts: bool = False) -> list[Finding]:
    """Findings on a placement file, or on a capture; InputError when it cannot be read.

    A file of a placement format that holds counts instead (OnlyCounts) is checked as a capture.
    """
    form = _format(format, "checked", lambda f: True)
    if form.engine and not counts:
        try:
            return check_placement(form.engine, path, wanted)
        except OnlyCounts:
            return check(format, path, wanted, counts=True)

    def read(output: Path) -> Imported:
        return import_trace(format, path, output, model=wanted.model)

    def count() -> Loads:
        return import_loads(format, path, model=wanted.model)

    return check_capture(read if form.tokens else None, count if form.loads else None)


__all__ = [
    "FORMATS",
    "Exported",
    "Finding",
    "Format",
    "Imported",
    "Loads",
    "OnlyCounts",
    "Wanted",
    "check",
    "engine",
    "export_loads",
    "export_plan",
    "import_loads",
    "import_plan",
    "import_trace",
    "load_loads",
]
