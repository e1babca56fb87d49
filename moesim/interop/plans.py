"""Plans out to an engine's file and back: `import_plan(export_plan(plan)) == plan` for every writable format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesim.errors import PlanError
from moesim.files import check_output
from moesim.interop.layout import Engine, Layout, default_row
from moesim.interop.sidecar import Sidecar, load_sidecar, save_sidecar
from moesim.model import ModelSpec
from moesim.plan import Placement, Plan, slots_per_device


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """Files written, what to pass to the engine, and remarks."""

    files: tuple[Path, ...]
    launch: tuple[str, ...]
    notes: tuple[str, ...]


def export_plan(engine: Engine, plan: Plan, path: Path, *, model: ModelSpec | None = None, draft_layers: int = 0, force: bool = False) -> Exported:
    """Write `plan` for `engine` at `path`, and beside it the sidecar.

    `model` gives the number of decoder layers (default: the last MoE layer is the last layer) and must be the plan's.
    Raises PlanError where the file would mean something else than the plan: unequal slots per device, or replicas under
    a dispatch rule the engine does not have. OutputExists unless `force`.
    """
    p = plan.placement
    check_output(path, force=force)
    check_output(path.with_name(path.name + ".moesim.json"), force=force)
    if model is not None:
        plan.check_fits(model, p.devices, place=f"plan {plan.name!r}")
    if len(set(p.slots_G.tolist())) > 1:
        raise PlanError(
            f"plan {plan.name!r}: devices own {p.slots_G.tolist()} slots; {engine.name} puts slot j on rank j // (P / G), so the file would place "
            "experts on other devices; plan again with equal slots"
        )
    replicas = bool((p.replicas_LE > 1).any())
    if replicas and p.dispatch not in engine.rules:
        raise PlanError(
            f"plan {plan.name!r}: replicas are taken by rule {p.dispatch!r}, {engine.name} runs {', '.join(engine.rules)}; the plan's figures would "
            f"not hold; plan again with --dispatch {engine.default}"
        )
    if path.suffix != ".json" and engine.name in ("sglang", "vllm-ascend"):
        raise PlanError(f"{path}: {engine.name} takes the file only if its name ends in .json; rename it")
    decoder = model.layers if model else max(p.layers) + 1
    notes = [] if model else [f"no --model: took {decoder} decoder layers, the last of them a MoE layer"]
    names, slots_RP = _rows(engine, p, decoder, draft_layers)
    if draft_layers and not engine.draft:
        notes.append(f"{engine.name} keeps no rows for draft layers: it gives them its default map")
    rule = p.dispatch if p.dispatch in engine.rules else next(iter(engine.rules))  # without replicas any will do
    engine.write(path, names, slots_RP, p.experts, p.devices)
    sidecar = Sidecar(
        format=engine.name,
        name=plan.name,
        model=plan.model,
        model_digest=plan.model_digest,
        experts=p.experts,
        moe_layers=p.layers,
        decoder_layers=decoder,
        draft_layers=draft_layers if engine.draft else 0,
        devices=p.devices,
        dispatch=p.dispatch,
        made_from=plan.made_from,
        solution=plan.solution,
    )
    beside = save_sidecar(path, sidecar)
    launch = engine.launch(path, p.slots_LP.shape[1] - p.experts, p.devices, rule)
    return Exported(files=(path, beside), launch=launch, notes=(*notes, *engine.preconditions))


def _rows(engine: Engine, p: Placement, decoder: int, draft_layers: int) -> tuple[tuple[int, ...], NDArray[np.int32]]:
    default = default_row(p.experts, p.slots_LP.shape[1])
    draft = [default] * draft_layers if engine.draft else []
    behind = tuple(range(decoder, decoder + len(draft)))
    if engine.keys == "decoder":
        rows = [default] * decoder + draft
        for layer, row in zip(p.layers, p.slots_LP, strict=True):
            rows[layer] = row
        return tuple(range(len(rows))), np.stack(rows)
    names = p.layers if engine.keys == "absolute" else tuple(range(len(p.layers)))
    return (*names, *behind), np.stack([*p.slots_LP, *draft])


def import_plan(
    engine: Engine, path: Path, *, model: ModelSpec | None = None, devices: int | None = None, dispatch: str | None = None
) -> tuple[Plan, tuple[str, ...]]:
    """Plan of an engine's file, and remarks.

    What the file does not say comes from its sidecar, else from `model`, `devices` and `dispatch` (default: the
    engine's own rule). Raises PlanError where they contradict each other or something needed is unknown.
    """
    layout, sidecar = engine.read(path), load_sidecar(path, engine.name)
    if broken := next((finding for finding in layout.findings if finding.level == "fail"), None):
        raise PlanError(f"{path}: {broken}")
    if sidecar and model and sidecar.model_digest != model.digest:
        raise PlanError(f"{path}: made for {sidecar.model!r}, not for {model.name!r}; leave --model out, or make a plan for this model")
    known = sidecar or model
    if known is None:
        raise PlanError(f"{path}: has no sidecar {path.name}.moesim.json, and the file does not say which model it is for; give --model")
    found = {where for where in (layout.devices, sidecar.devices if sidecar else None, devices) if where is not None}
    if len(found) != 1:
        wrong = f"devices are said to be {sorted(found)}; remove the wrong --devices"
        raise PlanError(f"{path}: {wrong if found else 'the file does not say for how many devices it is; give --devices'}")
    count = found.pop()
    if sidecar and dispatch and dispatch != sidecar.dispatch:
        raise PlanError(f"{path}: was scored under dispatch rule {sidecar.dispatch!r}, not {dispatch!r}; leave --dispatch out, or plan again")
    layers, decoder = known.moe_layers, sidecar.decoder_layers if sidecar else model.layers if model else 0
    kept, notes = moe_rows(engine, layout, layers, decoder)
    if kept is None:
        raise PlanError(f"{path}: {notes[0]}")
    rows = [layout.rows[index] for index in kept]
    if len({len(row) for row in rows}) > 1:
        raise PlanError(f"{path}: layers have {sorted({len(row) for row in rows})} slots; every layer needs the same number")
    slots = np.asarray(rows, np.int32)
    try:
        placement = Placement(
            slots_LP=slots,
            slots_G=slots_per_device(slots.shape[1], count),
            experts=known.experts,
            layers=layers,
            dispatch=sidecar.dispatch if sidecar else dispatch or engine.default or "even",
        )
    except PlanError as problem:
        raise PlanError(f"{path}: {problem}") from None
    if sidecar:
        plan = Plan(
            name=sidecar.name,
            model=sidecar.model,
            model_digest=sidecar.model_digest,
            placement=placement,
            made_from=sidecar.made_from,
            solution=sidecar.solution,
        )
    else:
        assert model is not None
        origin = {"imported": engine.name, "file": path.name}
        plan = Plan(name=path.stem, model=model.name, model_digest=model.digest, placement=placement, made_from=origin)
    return plan, tuple(notes)


def moe_rows(engine: Engine, layout: Layout, layers: tuple[int, ...], decoder: int) -> tuple[list[int] | None, list[str]]:
    """Indices of the file's rows that are the model's MoE layers, and remarks; None and the reason where they cannot be."""
    wanted = tuple(range(len(layers))) if engine.keys == "moe" else layers
    known = set(range(decoder)) if engine.keys == "decoder" else set(wanted)
    if missing := [layer for layer in wanted if layer not in layout.names]:
        kind = {"decoder": "one row per decoder layer, dense ones included", "moe": "one row per MoE layer", "absolute": "one row per MoE layer"}
        return None, [
            f"holds rows {_short(layout.names)}, expected {kind[engine.keys]}: {_short(tuple(sorted(known)))}; missing {missing}; "
            "export the plan for this model again"
        ]
    extra = [name for name in layout.names if name not in known]
    dense = [name for name in layout.names if name in known and name not in wanted]
    notes = [f"rows {dense} are dense layers: left out"] if dense else []
    inside = [name for name in extra if name < decoder] if engine.keys == "absolute" else []
    if inside:
        return None, [f"holds rows for layers {inside}, which are no MoE layers of the model; expected {_short(wanted)}; export the plan again"]
    notes += [f"rows {extra} lie behind the last layer (draft layers of multi-token prediction): left out"] if extra else []
    return [layout.names.index(layer) for layer in wanted], notes


def _short(layers: tuple[int, ...]) -> str:
    whole = len(layers) > 2 and layers == tuple(range(layers[0], layers[-1] + 1))
    return f"{layers[0]}..{layers[-1]}" if whole else str(list(layers))
