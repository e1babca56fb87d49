"""Everything that needs a GPU, in one go: `python -m moesim.demo.measure` (`make gpu`).

Calibrates the device on the expert shapes of two published models and validates placements of a freshly trained one;
raw samples, environment and the predictions made before go to `reports/measured/<hardware>-<date>-<what>.json`.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from moesim.errors import MoesimError
from moesim.files import write_json
from moesim.hardware import load_cluster
from moesim.model import load_model

MODELS = ("qwen3-30b-a3b", "deepseek-v2-lite")
RESIDENT = 16  # experts per rank: 128 on 8 ranks
SCHEMA_VERSION = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all measurements; 0 also where there is no GPU, 1 when a measurement failed (what succeeded is kept)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("reports/measured"))
    parser.add_argument("--device", default="cuda", help="cpu runs the same measurements, smaller, to try the path")
    options = parser.parse_args(arguments)
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"no GPU here (torch {torch.__version__} sees none): nothing was measured, {options.out} is unchanged")
        return 0
    failed = 0
    work: dict[str, Callable[[], dict[str, Any]]] = {f"experts-{name}": partial(_experts, name, options.device) for name in MODELS}
    work["placements"] = partial(_placements, options.device)
    for name, measure in work.items():
        try:
            found = measure()
        except (MoesimError, RuntimeError) as problem:  # torch reports a vanished or full GPU as RuntimeError
            print(f"{name}: failed: {problem}")
            failed += 1
            continue
        path = options.out / f"{_hardware_name(found['hardware'])}-{found['date']}-{name}.json"
        write_json(path, {"schema_version": SCHEMA_VERSION, "what": name, **found})
        print(f"{name}: wrote {path}")
    return int(failed > 0)


def _experts(name: str, device: str) -> dict[str, Any]:
    """Expert layers of one model's shape and its neighbours under random loads: the raw table and the fit."""
    from moesim.validate.calibrate import calibrate

    model, small = load_model(name), device == "cpu"
    hidden, width = (model.hidden // 8, model.intermediate // 8) if small else (model.hidden, model.intermediate)
    shapes = [(hidden, width), (hidden, width // 2), (hidden // 2, width), (2 * hidden, width)]
    found = calibrate(
        device, shapes, experts=RESIDENT, top_k=model.top_k, most_tokens=512 if small else 1 << 17, backend="loop" if small else "grouped",
        dtype="fp32" if small else "bf16", gated=model.gated, loads=6 if small else 60, repeats=3 if small else 21,
    )  # fmt: skip
    return found.to_dict()


def _placements(device: str) -> dict[str, Any]:
    """Placements of a trained model's experts, executed rank by rank: the validation section of a report."""
    from moesim.demo.story import tell

    with tempfile.TemporaryDirectory() as folder:
        told = tell(
            Path(folder),
            cluster=load_cluster("cpu"),
            steps=8 if device == "cpu" else 400,
            device=device,
            progress=lambda chapter: lambda share, what: None,
            say=print,
        )
    validation: dict[str, Any] = told.document["validation"]
    return validation


def _hardware_name(hardware: dict[str, Any]) -> str:
    """File-name form of the device, such as `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", str(hardware.get("gpu") or hardware["cpu"]).lower()).strip("-")


if __name__ == "__main__":
    raise SystemExit(main())
