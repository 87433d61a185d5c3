"""A tiny random model of every decoder of Transformers, its sizes reduced by rules, and by hand where those do not do."""

import inspect
import re
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


VOCAB = 64
# The largest value of a field, by its name. The first that matches counts; smaller values and None stay as they are.
SIZES = {
    r"(type|task_type|pronunciation|shape)_vocab_size": 4,
    r"(.*_)?vocab_size(_.*)?|.*_group_vocab": VOCAB,
    r"bos_token_id|decoder_start_token_id": 1,
    r"eos_token_id|forced_eos_token_id": 2,
    r"pad_token_id": 0,
    r".*_token_(id|index)": VOCAB - 1,
    r"num_key_value_heads|num_kv_heads|.*_num_key_value_heads|linear_num_key_heads|swa_num_kv_heads": 2,
    r"(num_|n_|.*_num_)?(attention_)?heads?|n_heads|.*_heads|.*_num_attention_heads": 4,
    r"num_(hidden_)?layers|n_layers?|(en|de)coder_layers|num_(en|de)coder_layers|num_layers_per_stack|depth": 2,
    r"qk_head_dim": 16,
    r".*head_dim|.*d_head|dim_head|attention_head_size|kv_channels|rotary_dim|axial_head_dim": 8,
    r"time_step_rank|mamba_dt_rank|.*lora_rank|.*_rank|o_lora_rank": 8,
    r"(num_|n_|moe_num_|num_local_|n_routed_)experts": 4,
    r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts|topk_group|n_group|num_expert_group": 2,
    r"first_k_dense_replace|num_dense_layers|moe_layer_start_index": 1,
    r"num_nextn_predict_layers": 0,
    r".*(intermediate|ffn|feed_forward|mlp)_?(hidden_)?(size|dim)(_mlp)?|dff|dim_ff|n_inner|d_ff": 48,
    r"hidden_size_per_layer_input": 8,
    r"d_model|n_embd|emb_dim|dim|.*hidden_size(_global)?|.*embed(ding)?_(size|dim)|.*_embed_dim|lru_width|.*_proj_dim": 32,
    r"(ssm_)?state_size|mamba_d_state|mamba_d_ssm": 8,
    r".*chunk_size|chunk_length|.*chunk_length|block_size": 8,
    r".*sliding_window(_size)?|local_attention|window_size|attention_window_size|attention_chunk_size": 4,
    r".*max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|.*max_length|max_target_positions": 128,
    r"image_size|patch_size": 8,
    r".*_channels?": 16,
    r"expert_group_size|zero_expert_num": 2,
}
# What the rules above leave out of proportion.
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8}  # heads times their size: twice the hidden size
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
BY_HAND: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"linear_num_heads": 4},
    "bamba": {**MAMBA2, "attn_layer_indices": [1]},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "cohere2_moe": {"logit_scale": 1.0},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": EXPERTS,
    "dory": {"sliding_window": 64},  # fails alone where a text is longer than the window
    "dots1": EXPERTS,
    "dots3_note_text": {
        "head_dim": 16,
        "per_layer_config": {1: {"kv_lora_rank": 8, "num_attention_heads": 4, "num_key_value_heads": 4}},
    },
    "falcon_h1": {**MAMBA2, "mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "altup_num_inputs": 2,
    },
    "gemma4_text": {"global_head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {**MAMBA2, "layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_layers_per_stack": None},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": 2, "num_experts": 4},
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_linear": {"linear_num_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "block_multiple_of": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "llama4_text": {
        "num_hidden_layers": 2,
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
        "moe_layers": [1],
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "nemotron_h": {"n_groups": 2, "mamba_num_heads": 8, "mamba_head_dim": 8, "use_mamba_kernels": False},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "linear_num_key_heads": 2,
        "split_ngram_parts": 2,
    },
    "reformer": {
        "axial_pos_shape": (8, 16),
        "axial_pos_embds_dim": (8, 24),
        "attn_layers": ("local", "lsh"),
        "num_buckets": 2,
        "hash_seed": 0,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
    },
}


def decoders() -> list[str]:
    """The model types of all decoders of the installed Transformers, one for each class of models."""
    types: dict[str, str] = {}
    for model_type, name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()):
        types.setdefault((name, CONFIG_MAPPING_NAMES[model_type]), model_type)
    return sorted(types.values())


def tiny_config(config_class: type[PreTrainedConfig], model_type: str = "") -> PreTrainedConfig:
    """The default config of a class, with small sizes."""
    default = config_class()
    names = {name: _argument(config_class, name) for name in vars(default)}
    values = {names[name]: value for name, value in vars(default).items() if names[name] is not None}
    changes = {name: small for name, value in values.items() if (small := _reduced(name, value)) is not None}
    changes |= {n: tiny_config(type(v)) for n, v in values.items() if isinstance(v, PreTrainedConfig)}
    if values.get("num_key_value_heads", 0) == values.get("num_attention_heads"):
        changes["num_key_value_heads"] = 4  # each head has its own
    changes |= _few_layers(default, values)
    if "is_decoder" in values:
        changes["is_decoder"] = True
    return config_class(**{**changes, **BY_HAND.get(model_type or config_class.model_type, {})})


def _argument(config_class: type[PreTrainedConfig], attribute: str) -> str | None:
    """The argument of a config class that sets an attribute; `None` for what is computed."""
    accepted = {name for kind in config_class.__mro__ for name in getattr(kind, "__annotations__", {})}
    accepted |= set(inspect.signature(config_class.__init__).parameters)
    aliases = [name for name, other in config_class.attribute_map.items() if other == attribute]
    return next((name for name in (attribute, *aliases) if name in accepted), None)


def _reduced(name: str, value: Any) -> int | None:
    """A smaller value of a field; `None` when it stays as it is."""
    if type(value) is not int:
        return 2 if name == "eos_token_id" and isinstance(value, list) else None
    limit = next((limit for pattern, limit in SIZES.items() if re.fullmatch(pattern, name)), value)
    return limit if value > limit else None


def _few_layers(default: PreTrainedConfig, values: dict[str, Any]) -> dict[str, Any]:
    """Fields with a value for each layer, reduced to one layer of each kind, or two if there is one kind only."""
    count = getattr(default, "num_hidden_layers", None)
    by_layer = {name: value for name, value in values.items() if isinstance(value, list) and len(value) == count}
    if not by_layer or count < 3:
        return {}
    kinds: dict[str, int] = {}
    for layer in range(count):
        kinds.setdefault(str([value[layer] for value in by_layer.values()]), layer)
    kept = sorted(kinds.values()) * (2 if len(kinds) == 1 else 1)
    counts = {name: len(kept) for name in values if name in ("num_hidden_layers", "n_layer", "num_layers")}
    return counts | {name: [value[layer] for layer in kept] for name, value in by_layer.items()}


def tiny_decoder(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A random model, with noise that makes it change its mind from token to token."""
    config = tiny_config(CONFIG_MAPPING[model_type], model_type)
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(config).num_parameters()
    if size > 2e6:
        raise ValueError(f"{model_type} is not tiny: it has {size:.2g} parameters.")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.12)
    return model.eval()
