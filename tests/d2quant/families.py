"""Tiny random models of decoder families, by name: their configurations, with every part that a full-size one has."""

from typing import Any

import torch
import transformers


VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ZAMBA2 = {
    "mamba_d_state": 8,
    "n_mamba_heads": 8,
    "mamba_headdim": 8,
    "mamba_ngroups": 1,
    "chunk_size": 16,
    "num_mem_blocks": 1,
    "num_key_value_heads": 4,
    "attention_head_dim": 16,
    "attention_hidden_size": 64,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
AUTO_CLASSES = (
    transformers.AutoModelForCausalLM,
    transformers.AutoModelForImageTextToText,
    transformers.AutoModelForMultimodalLM,
)
# Family: its configuration, and the settings that differ from `SIZES`.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", {}),
    "Mistral": ("MistralConfig", {}),
    "Qwen2": ("Qwen2Config", {}),
    "Qwen3": ("Qwen3Config", {}),
    "Gemma": ("GemmaConfig", {}),
    "Gemma2": ("Gemma2Config", {}),
    "Gemma3 (text)": ("Gemma3TextConfig", {"layer_types": ["sliding_attention", "full_attention"]}),
    "Gemma3n (text)": (
        "Gemma3nTextConfig",
        {
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "intermediate_size": [64, 64],
            "num_kv_shared_layers": 0,
            "activation_sparsity_pattern": [0.5, 0.0],
            "laurel_rank": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "Gemma4 (text)": (
        "Gemma4TextConfig",
        {
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_kv_shared_layers": 0,
            "global_head_dim": 8,
        },
    ),
    "Gemma4 (shared keys)": (
        "Gemma4TextConfig",
        {
            "num_hidden_layers": 4,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "num_kv_shared_layers": 2,
            "global_head_dim": 8,
        },
    ),
    "Gemma4 (experts)": (
        "Gemma4TextConfig",
        EXPERTS
        | {
            "hidden_size_per_layer_input": 0,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_kv_shared_layers": 0,
            "global_head_dim": 8,
            "enable_moe_block": True,
            "top_k_experts": 2,
        },
    ),
    "Phi3": ("Phi3Config", {}),
    "OLMo2": ("Olmo2Config", {}),
    "Granite": ("GraniteConfig", {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "Cohere": ("CohereConfig", {}),
    "SmolLM3": ("SmolLM3Config", {}),
    "GLM4": ("Glm4Config", {}),
    "OPT": ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "GPT-NeoX": ("GPTNeoXConfig", {}),
    "Falcon": ("FalconConfig", {"head_dim": None, "new_decoder_architecture": False, "ffn_hidden_size": 64}),
    "GPT-2": ("GPT2Config", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}),
    "Mixtral": ("MixtralConfig", EXPERTS),
    "Qwen3-MoE": ("Qwen3MoeConfig", EXPERTS),
    "OLMoE": ("OlmoeConfig", EXPERTS),
    "GptOss": ("GptOssConfig", EXPERTS | {"layer_types": ["sliding_attention", "full_attention"]}),
    "DeepSeek-V3": (
        "DeepseekV3Config",
        EXPERTS
        | {
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
        },
    ),
    "Qwen3-Next": (
        "Qwen3NextConfig",
        EXPERTS
        | {
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "Llama4 (text)": (
        "Llama4TextConfig",
        EXPERTS | {"intermediate_size_mlp": 64, "interleave_moe_layer_step": 2, "num_experts_per_tok": 1},
    ),
    "Mamba": ("MambaConfig", {"state_size": 8, "time_step_rank": 16}),
    "Mamba2": ("Mamba2Config", {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 16}),
    "FalconMamba": ("FalconMambaConfig", {"state_size": 8, "time_step_rank": 16}),
    "Jamba": (
        "JambaConfig",
        EXPERTS
        | {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 16,
            "use_mamba_kernels": False,
        },
    ),
    "Zamba2": ("Zamba2Config", ZAMBA2 | {"layers_block_type": ["mamba", "hybrid"]}),
    "Zamba2 (shared blocks)": (
        "Zamba2Config",
        ZAMBA2 | {"num_hidden_layers": 3, "layers_block_type": ["hybrid", "mamba", "hybrid"]},
    ),
    "Llava": ("LlavaConfig", {"text": "LlamaConfig", "vision": ("CLIPVisionConfig", VISION)}),
    "Qwen2.5-VL": (
        "Qwen2_5_VLConfig",
        {
            "text": "Qwen2_5_VLTextConfig",
            "text_settings": {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
            "vision_settings": {
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "out_hidden_size": 32,
                "fullatt_block_indexes": [0],
            },
        },
    ),
    "Gemma3 (vision)": (
        "Gemma3Config",
        {"text": "Gemma3TextConfig", "vision": ("SiglipVisionConfig", VISION), "mm_tokens_per_image": 4},
    ),
    "SmolVLM": (
        "SmolVLMConfig",
        {"text": "LlamaConfig", "vision": ("SmolVLMVisionConfig", VISION), "scale_factor": 1},
    ),
    "Idefics3": (
        "Idefics3Config",
        {"text": "LlamaConfig", "vision": ("Idefics3VisionConfig", VISION), "scale_factor": 1},
    ),
    "PaliGemma": ("PaliGemmaConfig", {"text": "GemmaConfig", "vision": ("SiglipVisionConfig", VISION)}),
    "Mistral3": ("Mistral3Config", {"text": "MistralConfig", "vision": ("PixtralVisionConfig", VISION)}),
    "Qwen2-Audio": (
        "Qwen2AudioConfig",
        {
            "text": "Qwen2Config",
            "audio_config": {
                "model_type": "qwen2_audio_encoder",
                "d_model": 16,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 24,
                "num_mel_bins": 8,
            },
        },
    ),
    "Mllama": (
        "MllamaConfig",
        {
            "class": "MllamaForConditionalGeneration",
            "text": "MllamaTextConfig",
            "text_settings": {
                "num_hidden_layers": 3,
                "cross_attention_layers": [1],
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            },
            "vision": (
                "MllamaVisionConfig",
                {
                    "hidden_size": 16,
                    "attention_heads": 2,
                    "intermediate_size": 24,
                    "num_hidden_layers": 1,
                    "num_global_layers": 1,
                    "image_size": 16,
                    "patch_size": 8,
                    "vision_output_dim": 32,
                    "intermediate_layers_indices": [0],
                    "supported_aspect_ratios": [[1, 1]],
                },
            ),
        },
    ),
}


def build(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> transformers.PreTrainedModel:
    """
    Tiny model of the family in evaluation mode, with wide random weights, so that an error in one is seen in the
    logits, and random norms and biases. `changes` are of the configuration of its text part.
    """
    name, settings = FAMILIES[family]
    settings = dict(settings)
    cls = settings.pop("class", None)
    if "text" in settings:
        config = _config_with_parts(name, settings, changes)
    else:
        config = _config(name, settings | changes)
    torch.manual_seed(0)
    if cls is None:
        mappings = (auto._model_mapping for auto in AUTO_CLASSES)
        cls = next(mapping[type(config)] for mapping in mappings if type(config) in mapping).__name__
    model = getattr(transformers, cls)._from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        else:
            parameter.data += 0.05 * torch.randn(parameter.shape)
    return model


def _config(name: str, settings: dict[str, Any]) -> transformers.PretrainedConfig:
    """`None` leaves a setting out, for families that do not accept it."""
    given = {key: value for key, value in (SIZES | settings).items() if value is not None}
    return getattr(transformers, name)(**given)


def _config_with_parts(name: str, settings: dict[str, Any], changes: dict[str, Any]) -> transformers.PretrainedConfig:
    parts = {"text_config": _config(settings.pop("text"), settings.pop("text_settings", {}) | changes)}
    if "vision" in settings:
        vision, vision_settings = settings.pop("vision")
        parts["vision_config"] = getattr(transformers, vision)(**vision_settings)
    elif "vision_settings" in settings:
        parts["vision_config"] = settings.pop("vision_settings")
    return getattr(transformers, name)(**parts, image_token_index=90, audio_token_index=91, **settings)
