"""Tiny random models of the families of decoders that transformers has for chat."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

QWEN_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
"""The sizes of Qwen2.5-7B, as ``Qwen2Config`` takes them."""
WINDOW = 8
"""Tokens that sliding windows and chunks span, fewer than the examples have."""
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
FOUR = {"num_experts": 4, **EXPERTS}
LOCAL = {"num_local_experts": 4, **EXPERTS}
SHARED = {"shared_expert_intermediate_size": 16}
DEEPSEEK = {
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8},
    **{"v_head_dim": 8, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1},
    **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, **EXPERTS},
}
LINEAR = {
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8},
    **{"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
}
HALF_SLIDING = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
HEAD = {"head_dim": 8}
PER_LAYER = {"vocab_size_per_layer_input": 2048, "hidden_size_per_layer_input": 8}


ATTENTION = ("k_proj", "o_proj", "q_proj", "v_proj")
ALL = ("down_proj", "gate_proj", *ATTENTION, "up_proj")
FUSED = ("down_proj", "gate_up_proj", *ATTENTION)
LATENT = ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj")


GATED = ("in_proj_a", "in_proj_b", "in_proj_qkv", "in_proj_z")
CONV = ("in_proj", *ATTENTION[:1], "out_proj", "q_proj", "v_proj", "w1", "w2", "w3")
EXPERTS_BARE = "no adapters on the experts"
SHARED_TOO = "no adapters on the experts but on the shared one"
WINDOWS = "sliding windows"
LINEAR_ATTENTION = "linear attention"
STATE_SPACE = "state-space layers, without adapters on their `out_proj`"
LLAMA4 = {
    **{"attention_chunk_size": WINDOW, "layer_types": ["chunked_attention", "full_attention"]},
    "intermediate_size_mlp": 64,
}
ERNIE = {
    **{"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, **HEAD},
    "moe_layer_start_index": 1,
}


SEEING = {
    "text_config": SIZES | HALF_SLIDING | HEAD,
    "vision_config": SIZES | {"image_size": 28, "patch_size": 14},
    "mm_tokens_per_image": 4,
}
MIXTURES = {
    *("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text", "llama4_text", "mixtral"),
    *("phimoe", "olmoe", "granitemoe", "granitemoeshared", "granitemoehybrid", "glm4_moe"),
    *("gpt_oss", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "hunyuan_v1_moe", "lfm2_moe"),
    "minimax_m2",
}


@dataclass(frozen=True)
class Family:
    """One kind of base model, and what is expected of it."""

    kind: str
    """Its ``model_type``."""
    models: str
    """What it is known by."""
    changes: dict[str, Any] = field(default_factory=dict)
    packs: bool = True
    adapted: tuple[str, ...] = ALL
    """The modules that ``all-linear`` stands for."""
    remark: str = ""

    @property
    def has_experts(self) -> bool:
        """Whether a part of its layers is no linear layer."""
        return self.kind in MIXTURES


def build_config(family: Family, vocab_size: int) -> PretrainedConfig:
    """Return the configuration of a two-layer model."""
    settings = SIZES | {"vocab_size": vocab_size} | family.changes
    if "text_config" in settings:
        settings = family.changes | {
            "text_config": settings["text_config"] | {"vocab_size": vocab_size}
        }
    return AutoConfig.for_model(family.kind, **settings)


def build_base(family: Family, vocab_size: int) -> PreTrainedModel:
    """Return a random two-layer model of a family, in fp32, always the same."""
    torch.manual_seed(5)
    base = AutoModelForCausalLM.from_config(build_config(family, vocab_size))
    return base.eval().requires_grad_(False)


FAMILIES = [
    Family("qwen2", "Qwen 2, 2.5"),
    Family(
        "qwen2_moe",
        "Qwen 1.5 and 2 MoE",
        FOUR | SHARED,
        adapted=(*ALL, "shared_expert_gate"),
        remark=SHARED_TOO,
    ),
    Family("qwen3", "Qwen 3", HEAD),
    Family("qwen3_moe", "Qwen 3 MoE", FOUR | HEAD, adapted=ATTENTION, remark=EXPERTS_BARE),
    Family(
        "qwen3_next",
        "Qwen 3 Next",
        FOUR | SHARED | LINEAR | HEAD,
        False,
        ("in_proj_ba", "in_proj_qkvz", *ATTENTION, "out_proj", "shared_expert_gate"),
        LINEAR_ATTENTION,
    ),
    Family(
        "qwen3_5_text",
        "Qwen 3.5, text only",
        LINEAR | HEAD,
        False,
        (*ALL, *GATED, "out_proj"),
        LINEAR_ATTENTION,
    ),
    Family(
        "qwen3_5_moe_text",
        "Qwen 3.5 MoE, text only",
        FOUR | SHARED | LINEAR | HEAD,
        False,
        (*ALL, *GATED, "out_proj", "shared_expert_gate"),
        LINEAR_ATTENTION,
    ),
    Family("llama", "Llama 2, 3, SmolLM 2, Yi, Vicuna"),
    Family(
        "llama4_text", "Llama 4, text only", LOCAL | HEAD | LLAMA4, remark=SHARED_TOO + "; chunks"
    ),
    Family("mistral", "Mistral 7B, Nemo, Zephyr", {"sliding_window": WINDOW}, remark=WINDOWS),
    Family("ministral", "Ministral", HALF_SLIDING | HEAD, remark=WINDOWS),
    Family("ministral3", "Ministral 3", HEAD),
    Family(
        "mixtral",
        "Mixtral",
        LOCAL | {"sliding_window": WINDOW},
        adapted=ATTENTION,
        remark=EXPERTS_BARE,
    ),
    Family("gemma", "Gemma", HEAD),
    Family(
        "gemma2",
        "Gemma 2",
        HALF_SLIDING | HEAD,
        False,
        remark="scores and logits are bent by a tanh",
    ),
    Family("gemma3_text", "Gemma 3, text only", HALF_SLIDING | HEAD, remark=WINDOWS),
    Family(
        "gemma3", "Gemma 3 4B and up", SEEING, remark="sliding windows; text is trained, not vision"
    ),
    Family(
        "gemma4_text",
        "Gemma 4, text only",
        HALF_SLIDING | HEAD | PER_LAYER | {"global_head_dim": 8},
        adapted=(
            *ALL,
            "per_layer_input_gate",
            "per_layer_model_projection",
            "per_layer_projection",
        ),
        remark=WINDOWS,
    ),
    Family("phi", "Phi 1, 2", adapted=("dense", "fc1", "fc2", "k_proj", "q_proj", "v_proj")),
    Family(
        "phi3",
        "Phi 3, 3.5, 4",
        {"sliding_window": WINDOW},
        adapted=("down_proj", "gate_up_proj", "o_proj", "qkv_proj"),
        remark=WINDOWS,
    ),
    Family(
        "phimoe",
        "Phi 3.5 MoE",
        LOCAL | {"sliding_window": WINDOW},
        adapted=ATTENTION,
        remark=EXPERTS_BARE,
    ),
    Family("olmo", "OLMo"),
    Family("olmo2", "OLMo 2"),
    Family("olmo3", "OLMo 3", HALF_SLIDING, remark=WINDOWS),
    Family("olmoe", "OLMoE", FOUR, adapted=ATTENTION, remark=EXPERTS_BARE),
    Family("granite", "Granite 3", {"logits_scaling": 4.0}, remark="logits are scaled"),
    Family(
        "granitemoe",
        "Granite 3 MoE",
        LOCAL | {"logits_scaling": 4.0},
        adapted=ATTENTION,
        remark=EXPERTS_BARE,
    ),
    Family(
        "granitemoeshared",
        "Granite 3 MoE, shared",
        LOCAL | {"shared_intermediate_size": 16},
        adapted=("input_linear", *ATTENTION, "output_linear"),
        remark=SHARED_TOO,
    ),
    Family(
        "granitemoehybrid",
        "Granite 4",
        LOCAL | MAMBA | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
        False,
        ("in_proj", "input_linear", *ATTENTION, "output_linear"),
        STATE_SPACE,
    ),
    Family("smollm3", "SmolLM 3", {"no_rope_layers": [1, 0]}),
    Family("cohere", "Command R", {"logit_scale": 0.5}, remark="logits are scaled"),
    Family(
        "cohere2",
        "Command R7B, A",
        HALF_SLIDING | HEAD | {"logit_scale": 0.5},
        remark="logits are scaled; sliding windows",
    ),
    Family("glm", "GLM 4 9B", HEAD, adapted=FUSED),
    Family("glm4", "GLM 4 0414, Z1", HEAD, adapted=FUSED),
    Family("glm4_moe", "GLM 4.5, 4.6", DEEPSEEK | HEAD, adapted=ATTENTION, remark=EXPERTS_BARE),
    Family("stablelm", "StableLM 2", packs=False, remark="its layers hand nothing on to attention"),
    Family(
        "nemotron",
        "Nemotron 4, Minitron",
        HEAD,
        False,
        ("down_proj", *ATTENTION, "up_proj"),
        "its layers hand nothing on to attention",
    ),
    Family(
        "gpt_oss",
        "gpt-oss",
        LOCAL | HALF_SLIDING | HEAD,
        False,
        ATTENTION,
        "attention has sinks; no adapters on the experts",
    ),
    Family("deepseek_v2", "DeepSeek V2", DEEPSEEK, adapted=LATENT, remark=EXPERTS_BARE),
    Family("deepseek_v3", "DeepSeek V3, R1", DEEPSEEK, adapted=LATENT, remark=EXPERTS_BARE),
    Family(
        "falcon",
        "Falcon",
        packs=False,
        adapted=("dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"),
        remark="its attention is its own",
    ),
    Family(
        "falcon_h1",
        "Falcon H1",
        MAMBA | HEAD | {"mamba_d_ssm": 64},
        False,
        (*ALL, "in_proj"),
        STATE_SPACE,
    ),
    Family(
        "starcoder2",
        "StarCoder 2",
        {"sliding_window": WINDOW},
        adapted=("c_fc", "c_proj", *ATTENTION),
        remark=WINDOWS,
    ),
    Family("exaone4", "EXAONE 4", HALF_SLIDING, remark=WINDOWS),
    Family("ernie4_5", "ERNIE 4.5", HEAD),
    Family("ernie4_5_moe", "ERNIE 4.5 MoE", ERNIE, adapted=ATTENTION, remark=EXPERTS_BARE),
    Family("hunyuan_v1_dense", "Hunyuan 0.5B to 7B", HEAD),
    Family(
        "hunyuan_v1_moe",
        "Hunyuan A13B",
        HEAD | {"num_experts": 4, "moe_topk": 2},
        adapted=(*ATTENTION, "wg"),
        remark=EXPERTS_BARE,
    ),
    Family("seed_oss", "Seed-OSS", HEAD),
    Family(
        "lfm2",
        "LFM 2",
        {"layer_types": ["conv", "full_attention"]},
        False,
        CONV,
        "short convolutions",
    ),
    Family(
        "lfm2_moe",
        "LFM 2 MoE",
        FOUR | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
        False,
        CONV,
        "short convolutions; no adapters on the experts",
    ),
    Family("apertus", "Apertus", adapted=("down_proj", *ATTENTION, "up_proj")),
    Family("helium", "Helium", HEAD),
    Family("internlm3", "InternLM 3", HEAD),
    Family("minimax_m2", "MiniMax M2", LOCAL | HEAD, adapted=ATTENTION, remark=EXPERTS_BARE),
    Family(
        "mpt",
        "MPT",
        {"d_model": 32, "n_heads": 4, "n_layers": 2},
        False,
        ("Wqkv", "down_proj", "out_proj", "up_proj"),
        "its attention is its own",
    ),
    Family(
        "bloom",
        "BLOOMZ",
        {},
        False,
        ("dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"),
        "its attention is its own",
    ),
    Family(
        "gpt_neox",
        "Pythia, GPT-NeoX",
        adapted=("dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"),
    ),
]
