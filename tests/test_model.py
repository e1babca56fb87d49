"""Model specs: presets equal the published shapes, Hugging Face configs of every family are understood."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moesim.errors import SpecError
from moesim.model import ModelSpec, load_model, model_names

# name: MoE layers, experts, top-k, hidden, expert width, bytes of one expert as served
PUBLISHED = {
    "mixtral-8x7b": (32, 8, 2, 4096, 14336, 3 * 4096 * 14336 * 2),
    "deepseek-v2-lite": (26, 64, 6, 2048, 1408, 3 * 2048 * 1408 * 2),
    "deepseek-v3": (58, 256, 8, 7168, 2048, 3 * 7168 * 2048),
    "qwen3-30b-a3b": (48, 128, 8, 2048, 768, 3 * 2048 * 768 * 2),
    "qwen3-235b-a22b": (94, 128, 8, 4096, 1536, 3 * 4096 * 1536 * 2),
    "olmoe-1b-7b": (16, 64, 8, 2048, 1024, 3 * 2048 * 1024 * 2),
    "gpt-oss-120b": (36, 128, 4, 2880, 2880, 3 * 2880 * 2880 * 4.25 / 8),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_shapes(name: str) -> None:
    spec = load_model(name)
    assert (len(spec.moe_layers), spec.experts, spec.top_k, spec.hidden, spec.intermediate, spec.expert_B) == PUBLISHED[name]
    assert spec.source


def test_every_preset_is_checked() -> None:
    assert set(model_names()) == set(PUBLISHED)


def test_a_spec_survives_json() -> None:
    spec = load_model("deepseek-v3")
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_digest_is_of_the_shape_not_the_name() -> None:
    spec = load_model("olmoe-1b-7b")
    renamed = ModelSpec.from_dict(spec.to_dict() | {"name": "other"})
    wider = ModelSpec.from_dict(spec.to_dict() | {"experts": 65})
    assert renamed.digest == spec.digest != wider.digest


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ("Qwen2MoeConfig", {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]}),
        ("Qwen3MoeConfig", {"num_hidden_layers": 3}),
        ("MixtralConfig", {"num_hidden_layers": 3}),
        ("DeepseekV3Config", {"num_hidden_layers": 5, "first_k_dense_replace": 2}),
        ("OlmoeConfig", {"num_hidden_layers": 2}),
        ("GptOssConfig", {"num_hidden_layers": 2}),
        ("JambaConfig", {"num_hidden_layers": 8, "expert_layer_period": 2, "expert_layer_offset": 1}),
        ("JetMoeConfig", {"num_hidden_layers": 2}),
        ("GraniteMoeConfig", {"num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2}),
        ("PhimoeConfig", {"num_hidden_layers": 2}),
        ("Llama4TextConfig", {"num_hidden_layers": 4, "interleave_moe_layer_step": 2}),
        ("DbrxConfig", {"n_layers": 2}),
        ("Ernie4_5_MoeConfig", {"num_hidden_layers": 4, "moe_layer_start_index": 1}),
        ("Glm4MoeConfig", {"num_hidden_layers": 3, "first_k_dense_replace": 1}),
        ("MiniMaxM2Config", {"num_hidden_layers": 2}),
    ],
)
def test_configs_of_every_family_are_understood(config: str, layers: dict[str, object]) -> None:
    transformers = pytest.importorskip("transformers")
    spec = ModelSpec.from_hf(getattr(transformers, config)(**layers))
    expected = {
        "Qwen2MoeConfig": (1,),
        "DeepseekV3Config": (2, 3, 4),
        "JambaConfig": (1, 3, 5, 7),
        "Llama4TextConfig": (1, 3),
        "Ernie4_5_MoeConfig": (1, 2, 3),
        "Glm4MoeConfig": (1, 2),
    }
    assert spec.moe_layers == expected.get(config, tuple(range(spec.layers)))
    assert spec.experts >= spec.top_k >= 1


def test_a_config_json_is_read_by_path(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "mixtral", "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16, "num_local_experts": 4,
                                "num_experts_per_tok": 2, "num_attention_heads": 2}))  # fmt: skip
    assert load_model(path) == load_model(tmp_path)
    path.write_text('{"model_type": "llama", "hidden_size": 8}')
    with pytest.raises(SpecError, match=r"config\.json.*'llama' has no experts.*not a MoE model"):
        load_model(path)


def test_an_unknown_name_lists_the_presets() -> None:
    with pytest.raises(SpecError, match="mixtral-8x7b"):
        load_model("gpt-2")


@pytest.mark.parametrize(
    "change", [{"experts": 0}, {"top_k": 99}, {"moe_layers": [99]}, {"moe_layers": []}, {"hidden": "big"}, {"experts": 70_000}, {"nonsense": 1}]
)
def test_inconsistent_sizes_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(SpecError):
        ModelSpec.from_dict(load_model("mixtral-8x7b").to_dict() | change)
