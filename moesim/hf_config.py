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
MOST, MOST_LAYERS = 2**31, 2**14  # a larger number is a damaged file
_BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "float8_e4m3fn": 8}


def _first(config: Mapping[str, Any], names: Iterable[str]) -> int:
    """The first of `names` that is set, 0 when none is. Raises SpecError naming one that is no whole number, or absurd."""
    for name in names:
        value = config.get(name)
        if isinstance(value, (list, tuple)) and value:  # per-layer lists (ERNIE, Hunyuan): take the first
            value = value[0]
        if value:
            return _whole(value, name)
    return 0


def _whole(value: Any, name: str) -> int:
    if not isinstance(value, (int, float)) or not 0 <= value < MOST or value != int(value):
        raise SpecError(f"config: {name} is {str(value)[:40]!r}; expected a whole number below 2^31")
    return int(value)


def _list(config: Mapping[str, Any], name: str) -> list[Any]:
    value = config.get(name) or []
    if not isinstance(value, (list, tuple)):
        raise SpecError(f"config: {name} is {str(value)[:40]!r}; expected a list")
    return list(value)


def _table(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = config.get(name) or {}
    if not isinstance(value, Mapping):
        raise SpecError(f"config: {name} is {str(value)[:40]!r}; expected an object")
    return value


def spec_values(raw: Mapping[str, Any], *, name: str | None, dense: bool = False) -> dict[str, Any]:
    """Fields of ModelSpec (attention as those of Attention) from a config mapping; nested `text_config` is followed.

    With `dense` a config that names no experts is read as one of a model without them. Raises SpecError naming what is missing or malformed.
    """
    config = _table(raw, "text_config") or raw
    kind = str(config.get("model_type", "moe"))
    ffn = _table(config, "ffn_config")  # dbrx
    experts = _first(config, _EXPERTS) or _first(ffn, _EXPERTS)
    top_k = _first(config, _TOP_K) or _first(ffn, ("moe_top_k",))
    if not top_k and kind in _ALTERNATING:
        top_k = 2 if kind == "nllb-moe" else 1
    layers = _first(config, ("num_hidden_layers", "n_layers", "num_layers", "encoder_layers"))
    if layers > MOST_LAYERS:
        raise SpecError(f"config: {layers:,} layers; models of up to {MOST_LAYERS:,} are read")
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
    heads = _first(config, ("num_attention_heads", "n_heads", "num_heads"))
    bits = _BITS.get(str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch."), 16)
    quantised = _table(config, "quantization_config")
    # mxfp4: 4 bits and one 8-bit scale per 32 weights (OCP MX specification 1.0)
    weight_bits = {"fp8": 8, "mxfp4": 4.25, "awq": 4, "gptq": 4}.get(str(quantised.get("quant_method", "")), bits)
    return {
        "name": name or str(raw.get("_name_or_path") or kind),
        "layers": layers,
        "moe_layers": () if plain else moe_layers(config, layers),
        "hidden": hidden,
        "intermediate": 0 if plain else width,
        "experts": experts,
        "top_k": 0 if plain else top_k,
        "shared_intermediate": 0 if plain else _shared(config, width),
        "expert_groups": _first(config, ("n_group",)) or 1,
        "dense_intermediate": width if plain else _first(config, ("intermediate_size",)) if _WIDTH[0] in config else 0,
        "gated": kind not in _PLAIN,
        "vocabulary": _first(config, ("vocab_size",)),
        "attention": _attention(config, heads, hidden) if heads else None,
        "weight_bits": weight_bits,
        "activation_bits": bits,
        "source": "Hugging Face config",
    }


def moe_layers(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Absolute indices of the layers that hold routed experts, by the rule of the config's family."""
    if kinds := _list(config, "mlp_layer_types"):
        return tuple(i for i, kind in enumerate(kinds) if kind in ("sparse", "moe"))
    if listed := _list(config, "moe_layers"):  # llama4
        return tuple(_whole(i, "moe_layers") for i in listed)
    if str(config.get("model_type")) in _ALTERNATING:
        step = _first(config, ("encoder_sparse_step", "decoder_sparse_step")) or 1
        return tuple(i for i in range(layers) if i % step == (1 if step > 1 else 0))
    if "expert_layer_period" in config:  # jamba
        period, offset = _first(config, ("expert_layer_period",)) or 1, _first(config, ("expert_layer_offset",))
        return tuple(i for i in range(layers) if i % period == offset)
    if "moe_layer_start_index" in config:  # ernie
        start, interval = _first(config, ("moe_layer_start_index",)), _first(config, ("moe_layer_interval",)) or 1
        end = config.get("moe_layer_end_index") or -1
        last = layers - 1 if end == -1 else _whole(end, "moe_layer_end_index")
        return tuple(i for i in range(layers) if start <= i <= last and (i + 1) % interval == 0)
    if "decoder_sparse_step" in config:  # qwen
        step, dense = _first(config, ("decoder_sparse_step",)) or 1, _list(config, "mlp_only_layers")
        return tuple(i for i in range(layers) if i not in dense and (i + 1) % step == 0)
    if isinstance(config.get("moe_layer_freq"), (list, tuple)):
        return tuple(i for i, on in enumerate(_list(config, "moe_layer_freq")) if on)
    frequency, first = _first(config, ("moe_layer_freq",)) or 1, _first(config, ("first_k_dense_replace",))
    return tuple(i for i in range(layers) if i >= first and i % frequency == 0)


def _shared(config: Mapping[str, Any], width: int) -> int:
    explicit = _first(config, ("shared_expert_intermediate_size",))
    return explicit or _first(config, ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")) * width


def _attention(config: Mapping[str, Any], heads: int, hidden: int) -> dict[str, int]:
    rank = _first(config, ("kv_lora_rank",))
    rope = _first(config, ("qk_rope_head_dim",)) if rank else 0
    plain = _first(config, ("head_dim",)) or hidden // heads
    return {
        "heads": heads,
        "kv_heads": _first(config, ("num_key_value_heads",)) or heads,
        "head_dim": _first(config, ("qk_nope_head_dim",)) + rope if rank else plain,
        "kv_rank": rank,
        "q_rank": _first(config, ("q_lora_rank",)) if rank else 0,
        "rope_dim": rope,
        "value_dim": _first(config, ("v_head_dim",)) if rank else plain,
    }
