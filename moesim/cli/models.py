"""`moesim models`: model presets."""

from __future__ import annotations

from moesim.cli.options import AsJson

NAME = "models"
EPILOG = "Any Hugging Face config.json works too: give its path where a model name is asked for."


def run(json: AsJson = False) -> None:
    """List the model presets with their shapes and sources."""
    from moesim.cli.screen import emit_json, table
    from moesim.model import load_model, model_names
    from moesim.units import human

    specs = [load_model(name) for name in model_names()]
    if json:
        emit_json({"models": [spec.to_dict() for spec in specs]})
        return
    rows = [
        [s.name, str(len(s.moe_layers)), str(s.experts), str(s.top_k), str(s.hidden), str(s.intermediate), human(s.expert_B, "B"), s.source]
        for s in specs
    ]
    table("Models", ["name", "MoE layers", "experts", "top-k", "hidden", "width", "one expert", "source"], rows)
