# ruff: noqa: E501
"""Tiny random models of every router family in transformers, for the capture tests."""

from __future__ import annotations

from typing import Any

from torch import nn

COMMON = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64, "intermediate_size": 32}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 1}
GROUPED = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "n_shared_experts": 1}
QWEN = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
ENCODER_DECODER = {"d_model": 32, "d_ff": 32, "d_kv": 16, "num_heads": 2, "vocab_size": 64, "num_experts": 4, "expert_capacity": 3}

# model type -> (configuration arguments, MoE layers of the trace)
FAMILIES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "mixtral": ({"num_local_experts": 8, "num_experts_per_tok": 2}, (0, 1, 2)),
    "qwen2_moe": ({**QWEN, "shared_expert_intermediate_size": 16}, (0, 1, 2)),
    "qwen3_moe": ({**QWEN, "head_dim": 16, "mlp_only_layers": [1]}, (0, 2)),
    "qwen3_next": ({**QWEN, "head_dim": 16, "shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}, (0, 1, 2)),
    "olmoe": ({"num_experts": 8, "num_experts_per_tok": 3}, (0, 1, 2)),
    "flex_olmo": ({"num_experts": 8, "num_experts_per_tok": 3}, (0, 1, 2)),
    "deepseek_v2": ({**MLA, **GROUPED, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}, (1, 2)),
    "deepseek_v3": ({**MLA, **GROUPED, "n_group": 4, "topk_group": 2}, (1, 2)),
    "glm4_moe": ({**GROUPED, "head_dim": 16, "first_k_dense_replace": 1}, (1, 2)),
    "gpt_oss": ({"num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 16}, (0, 1, 2)),
    "granitemoe": ({"num_local_experts": 8, "num_experts_per_tok": 3}, (0, 1, 2)),
    "phimoe": ({"num_local_experts": 8, "num_experts_per_tok": 2}, (0, 1, 2)),
    "jamba": ({"num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 4}, (1, 3)),
    "ernie4_5_moe": ({"moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 16, "moe_layer_start_index": 1}, (1, 2)),
    "minimax_m2": ({"num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 16, "rotary_dim": 8}, (0, 1, 2)),
    "hunyuan_v1_moe": ({"num_experts": 8, "moe_topk": 2, "head_dim": 16}, (0, 1, 2)),
    "longcat_flash": ({"num_layers": 2, "num_hidden_layers": 4, "n_routed_experts": 6, "zero_expert_num": 3, "moe_topk": 3, "ffn_hidden_size": 32, "expert_ffn_hidden_size": 16, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "head_dim": 8}, (0, 1)),
    "llama4_text": ({"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size_mlp": 32, "head_dim": 16, "interleave_moe_layer_step": 2, "num_hidden_layers": 4}, (1, 3)),
    "jetmoe": ({"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 16, "num_key_value_heads": 2}, (0, 1, 2, 3, 4, 5)),
    "dbrx": ({"d_model": 32, "n_heads": 2, "n_layers": 3, "max_seq_len": 64, "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}, "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 3, "hidden_size": 32, "moe_jitter_eps": 0.0}}, (0, 1, 2)),
    "switch_transformers": ({**ENCODER_DECODER, "num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}, (1, 3)),
    "nllb-moe": ({"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_experts": 4, "expert_capacity": 64, "encoder_sparse_step": 2, "decoder_sparse_step": 2, "vocab_size": 64, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}, (1, 3)),
}  # fmt: skip


def tiny_model(kind: str, **overrides: Any) -> nn.Module:
    """A random model of `kind` in eval mode."""
    import torch
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

    torch.manual_seed(0)
    values = FAMILIES[kind][0] | overrides
    config_class = CONFIG_MAPPING[kind]
    common = {} if "d_model" in values else COMMON
    config = config_class(**(common | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | values))
    mapping = MODEL_FOR_CAUSAL_LM_MAPPING if config_class in MODEL_FOR_CAUSAL_LM_MAPPING else MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    model = mapping[config_class](config)
    for name, parameter in model.named_parameters():
        if "gate" in name or "router" in name or "classifier" in name:
            torch.nn.init.normal_(parameter, std=0.5)  # far from ties
    return model.eval()
