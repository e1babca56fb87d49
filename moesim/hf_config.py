"""Reads the many spellings Hugging Face configs have for the same MoE shape.

Checked against transformers 5.23.0 configuration classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from moesim.errors import SpecError

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "experts_per_token")
_WIDTH = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size", "ffn_hidden_size", "d_ff", "encoder_ffn_dim")
# Two matrices per expert, or per MLP of a model without experts.
_PLAIN = {"switch_transformers", "nllb-moe", "nemotron_h", "bloom", "falcon", "gpt2", "gpt_neox", "gptj", "mpt", "opt", "phi", "starcoder2"}
_ALTERNATING = {"switch_transformers", "nllb-moe"}
_BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "float8_e4m3fn": 8}


def _first(config: Mapping[str, Any], names: Iterable[str]) -> Any:
    for name in names:
        value = config.get(name)
        if isinstance(value, (list, tuple)) and value:  # per-layer lists (ERNIE, Hunyuan): take the first
            value = value[0]
        if value:
            return value
    return None


def spec_values(raw: Mapping[str, Any], *, name: str | None, dense: bool = False) -> dict[str, Any]:
    """Fields of ModelSpec (attention as those of Attention) from a config mapping; nested `text_config` is followed.

    With `dense` a config that names no experts is read as one of a model without them.
    """
    config: Mapping[str, Any] = raw.get("text_config") or raw
    ffn = config.get("ffn_config") or {}  # dbrx
    experts = _first(config, _EXPERTS) or _first(ffn, _EXPERTS)
    top_k = _first(config, _TOP_K) or _first(ffn, ("moe_top_k",))
    if top_k is None and config.get("model_type") in _ALTERNATING:
        top_k = 2 if config["model_type"] == "nllb-moe" else 1
    layers = _first(config, ("num_hidden_layers", "n_layers", "num_layers", "encoder_layers"))
    hidden = _first(config, ("hidden_size", "d_model", "n_embd"))
    width = _first(config, _WIDTH) or _first(ffn, _WIDTH)
    found = {"experts": experts, "experts per token": top_k, "layers": layers, "hidden size": hidden, "expert width": width}
    plain = dense and not experts
    if plain:
        found = {"layers": layers, "hidden size": hidden, "MLP width": width}
    if absent := [key for key, value in found.items() if not value]:
        raise SpecError(
            f"config of {config.get('model_type', 'unknown type')!r} has no {', '.join(absent)}: not a {'decoder' if plain else 'MoE model'}?"
        )
    heads = _first(config, ("num_attention_heads", "n_heads", "num_heads")) or 0
    kind = str(config.get("model_type", "moe"))
    bits = _BITS.get(str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch."), 16)
    quantised = config.get("quantization_config") or {}
    # mxfp4: 4 bits and one 8-bit scale per 32 weights (OCP MX specification 1.0)
    weight_bits = {"fp8": 8, "mxfp4": 4.25, "awq": 4, "gptq": 4}.get(str(quantised.get("quant_method", "")), bits)
    return {
        "name": name or str(raw.get("_name_or_path") or kind),
        "layers": int(layers),
        "moe_layers": () if plain else moe_layers(config, int(layers)),
        "hidden": int(hidden),
        "intermediate": 0 if plain else int(width),
        "experts": int(experts or 0),
        "top_k": 0 if plain else int(top_k),
        "shared_intermediate": 0 if plain else _shared(config, int(width)),
        "expert_groups": int(config.get("n_group") or 1),
        "dense_intermediate": int(width) if plain else int(config.get("intermediate_size") or 0) if _WIDTH[0] in config else 0,
        "gated": kind not in _PLAIN,
        "vocabulary": int(config.get("vocab_size") or 0),
        "attention": _attention(config, int(heads), int(hidden)) if heads else None,
        "weight_bits": weight_bits,
        "activation_bits": bits,
        "source": "Hugging Face config",
    }


def moe_layers(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Absolute indices of the layers that hold routed experts, by the rule of the config's family."""
    kinds = config.get("mlp_layer_types")
    if kinds:
        return tuple(i for i, kind in enumerate(kinds) if kind in ("sparse", "moe"))
    if config.get("moe_layers"):  # llama4
        return tuple(int(i) for i in config["moe_layers"])
    if config.get("model_type") in _ALTERNATING:
        step = int(_first(config, ("encoder_sparse_step", "decoder_sparse_step")) or 1)
        return tuple(i for i in range(layers) if i % step == (1 if step > 1 else 0))
    if "expert_layer_period" in config:  # jamba
        period, offset = int(config["expert_layer_period"]), int(config.get("expert_layer_offset") or 0)
        return tuple(i for i in range(layers) if i % period == offset)
    if "moe_layer_start_index" in config:  # ernie
        start, interval = int(config["moe_layer_start_index"]), int(config.get("moe_layer_interval") or 1)
        last = int(config.get("moe_layer_end_index") or -1)
        last = layers - 1 if last < 0 else last
        return tuple(i for i in range(layers) if start <= i <= last and (i + 1) % interval == 0)
    if "decoder_sparse_step" in config:  # qwen
        step, dense = int(config["decoder_sparse_step"] or 1), set(config.get("mlp_only_layers") or ())
        return tuple(i for i in range(layers) if i not in dense and (i + 1) % step == 0)
    frequency = config.get("moe_layer_freq") or 1
    first = int(config.get("first_k_dense_replace") or 0)
    if isinstance(frequency, (list, tuple)):
        return tuple(i for i, on in enumerate(frequency) if on)
    return tuple(i for i in range(layers) if i >= first and i % int(frequency) == 0)


def _shared(config: Mapping[str, Any], width: int) -> int:
    if explicit := config.get("shared_expert_intermediate_size"):
        return int(explicit)
    return int(_first(config, ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")) or 0) * width


def _attention(config: Mapping[str, Any], heads: int, hidden: int) -> dict[str, int]:
    rank = int(config.get("kv_lora_rank") or 0)
    rope = int(config.get("qk_rope_head_dim") or 0) if rank else 0
    plain = int(config.get("head_dim") or hidden // heads)
    return {
        "heads": heads,
        "kv_heads": int(_first(config, ("num_key_value_heads",)) or heads),
        "head_dim": int(config.get("qk_nope_head_dim") or 0) + rope if rank else plain,
        "kv_rank": rank,
        "q_rank": int(config.get("q_lora_rank") or 0) if rank else 0,
        "rope_dim": rope,
        "value_dim": int(config.get("v_head_dim") or 0) if rank else plain,
    }
