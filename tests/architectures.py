"""A tiny random model of every architecture that transformers has a text model of."""

from __future__ import annotations

import re
from typing import Any

import torch
from tiny import VOCAB
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

MAPPINGS = {
    "causal": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    "seq2seq": (AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
    "classification": (
        AutoModelForSequenceClassification,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    ),
}
CASES = [(kind, name) for kind, (_, models) in MAPPINGS.items() for name in models._model_mapping]

LAYERS, WIDTH, HEADS, CLASSES = 5, 32, 4, 3
PAD, BOS, EOS = 1, 2, 3  # padding is not 0; no text of ``tiny.tokenizer`` has this id


def _each(names: str, size: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), size)


# What a setting of this name is set to, wherever a configuration has one that is not 0 or None.
# Widths that mean different things differ, or a matrix might pass for another.
SIZES: dict[str, Any] = {
    **_each("num_hidden_layers n_layer n_layers num_layers num_encoder_layers", LAYERS),
    **_each("num_decoder_layers encoder_layers decoder_layers num_blocks", LAYERS),
    **_each("depth conf_num_hidden_layers speech_encoder_layers num_global_layers", 1),
    **_each("t2u_encoder_layers t2u_decoder_layers num_adapter_layers", 1),
    **_each("hidden_size d_model n_embd dim emb_dim embedding_dim word_embed_proj_dim", WIDTH),
    **_each("hidden_size_global backbone_hidden_size encoder_hidden_size out_hidden_size", WIDTH),
    **_each("projector_output_dim adapter_out_dim pooler_hidden_size output_dim", WIDTH),
    **_each("audio_hidden_size", WIDTH),
    **_each("prediction_head_size lru_width attention_hidden_size", WIDTH),
    **_each("cross_attention_hidden_size mamba_d_ssm", 2 * WIDTH),
    **_each("intermediate_size ffn_dim ffn_hidden_size d_inner d_ff dff dim_ff n_inner", 48),
    **_each("encoder_ffn_dim decoder_ffn_dim hidden_dim feed_forward_size mlp_dim", 48),
    **_each("dense_intermediate_size intermediate_size_mlp speech_encoder_intermediate_size", 48),
    **_each("t2u_encoder_ffn_dim t2u_decoder_ffn_dim", 48),
    **_each("moe_intermediate_size expert_ffn_hidden_size", 40),
    **_each("shared_expert_intermediate_size moe_shared_expert_intermediate_size", 44),
    **_each("shared_intermediate_size shared_experts_intermediate_size", 44),
    **_each("num_attention_heads n_head n_heads num_heads attention_heads", HEADS),
    **_each("encoder_attention_heads decoder_attention_heads swa_num_attention_heads", HEADS),
    **_each("num_encoder_attention_heads num_decoder_attention_heads", HEADS),
    **_each("num_self_attention_heads num_cross_attention_heads", HEADS),
    **_each("conf_num_attention_heads speech_encoder_attention_heads linear_num_heads", HEADS),
    **_each("t2u_encoder_attention_heads t2u_decoder_attention_heads", HEADS),
    **_each("head_dim swa_head_dim global_head_dim d_kv d_head dim_head attention_head_size", 8),
    **_each("kv_channels v_head_dim qk_nope_head_dim index_head_dim linear_head_dim", 8),
    **_each("linear_key_head_dim linear_value_head_dim query_pre_attn_scalar rotary_dim", 8),
    **_each("qk_rope_head_dim", 4),
    **_each("linear_num_key_heads index_n_heads", 2),
    **_each("linear_num_value_heads", 4),
    **_each("q_lora_rank", 12),
    **_each("kv_lora_rank o_lora_rank laurel_rank adapter_rank gated_norm_rank hc_lowrank", 8),
    **_each("num_experts num_local_experts n_routed_experts moe_num_experts", 4),
    **_each("num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k", 2),
    **_each("n_group num_expert_group topk_group first_k_dense_replace num_dense_layers", 1),
    **_each("num_mem_blocks", 1),
    **_each("mamba_n_heads mamba_num_heads mamba_headdim mamba_head_dim mamba_d_head", 8),
    **_each("mamba_d_state state_size ssm_state_size mamba_chunk_size chunk_size", 8),
    **_each("mamba_dt_rank time_step_rank router_hidden_size", 6),
    **_each("mamba_n_groups n_groups", 1),
    **_each("max_position_embeddings n_positions n_ctx max_seq_len context_length", 64),
    **_each("max_encoder_position_embeddings max_decoder_position_embeddings", 64),
    **_each("max_source_positions max_target_positions max_2d_position_embeddings", 64),
    **_each("original_max_position_embeddings model_max_length", 64),
    **_each("sliding_window sliding_window_size window_size local_attention", 4),
    **_each("attention_window_size attention_window local_attention_window_len", 4),
    **_each("attention_chunk_size index_topk keep_window_size", 8),
    **_each("block_size index_block_size local_radius global_block_size", 4),
    **_each("vocab_size vocab_size_per_layer_input src_vocab_size tgt_vocab_size", VOCAB),
    **_each("decoder_vocab_size unpadded_vocab_size", VOCAB),
    **_each("entity_vocab_size pronunciation_vocab_size shape_vocab_size char_vocab_size", 32),
    **_each("t2u_vocab_size unit_hifi_gan_vocab_size audio_vocab_size codebook_size", 32),
    **_each("encoder_hash_byte_group_vocab num_hash_buckets ngram_vocab_size_base", 32),
    **_each("embedding_size input_embedding_size output_embedding_size entity_emb_size", 24),
    **_each("pronunciation_embed_dim shape_embed_dim xpath_unit_hidden_size", 12),
    **_each("unit_embed_dim lang_embed_dim spkr_embed_dim hidden_size_per_layer_input", 12),
    **_each("ple_embed_dim bottleneck_size d_latents", 16),
    **_each("num_self_attends_per_block", LAYERS),
    **_each("num_latents", 8),
    **_each("image_size", 16),
    **_each("num_filters num_lstm_layers", 2),
    **_each("patch_size num_mel_bins", 8),
    **_each("upsample_initial_channel base_channels upsample_groups", 32),
    **_each("forced_bos_token_id forced_eos_token_id", None),
}
# Set where a configuration has them at all: a checkpoint would say.
TOKENS = {"pad_token_id": PAD, "pad_index": PAD, "bos_token_id": BOS, "bos_index": BOS}
TOKENS |= {"eos_token_id": EOS, "eos_index": EOS}
KEY_VALUES = {"num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads", "kv_n_heads"}

# What an architecture needs besides: values that follow from no size, sizes that must agree.
SPARSE = ("num_sparse_encoder_layers", "num_sparse_decoder_layers")
HYBRID = ["linear_attention", "full_attention", "linear_attention"] * 2
MIXED = ["linear_attention", "hybrid", "linear_attention"] * 2
ROPE = {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
OVERRIDES: dict[str, dict[str, Any]] = {
    **{name: {"head_dim": 4} for name in ("axk1", "deepseek_v3", "youtu")},
    **{name: {"head_dim": 8} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "bailing_hybrid": {"layer_types": HYBRID[:LAYERS]},
    "bamba": {"attn_layer_indices": [1, 4]},
    "cohere_compass_text": {"rope_parameters": ROPE},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "head_dim": 4, "topk_method": "greedy"},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_audio_encoder": {"adapter_input_size": WIDTH},
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 12},
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense"], "adapter_in_dim": WIDTH},
    "esm": {"mask_token_id": 0, "vocab_size": VOCAB},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,  # the last layers use the keys of one below the cut
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"] * 2,
        "num_hidden_layers": LAYERS + 1,
    },
    **{name: {"global_head_dim": 16} for name in ("gemma4_text", "gemma4_unified_text")},
    "gpt_neo": {"attention_types": [[["global", "local"], 2], [["global"], 1]]},
    "granitemoehybrid": {"layer_types": HYBRID[:LAYERS]},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "conv", "full_attention"]},
    "lilt": {"hidden_size": 48, "intermediate_size": 64},
    "mamba2": {"head_dim": 16},
    "longcat_flash": {"head_dim": 4, "zero_expert_num": 2},
    "mobilebert": {
        "intra_bottleneck_size": 24,
        "intermediate_size": WIDTH,
        "normalization_type": "layer_norm",  # or it grows beyond all bounds
    },
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {
        "axial_pos_embds_dim": (8, 24),
        "axial_pos_shape": (8, 8),
        "attn_layers": ["local"] * LAYERS,
        "local_attn_chunk_length": 4,
    },
    "squeezebert": {"embedding_size": WIDTH},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "switch_transformers": dict.fromkeys(SPARSE, 1),
    "zamba": {
        "intermediate_size": 96,
        "layers_block_type": MIXED,
        "num_hidden_layers": LAYERS + 1,
        "attention_hidden_size": 2 * WIDTH,
    },
    "zamba2": {
        "layers_block_type": MIXED,
        "num_hidden_layers": LAYERS + 1,
        "attention_hidden_size": 2 * WIDTH,
        "attention_head_dim": 2 * WIDTH // HEADS,
    },
    "zaya": {"num_experts_per_tok": 1},
}

# Parameters with more than one dimension that are no matrix.
ODD = re.compile(r"A_log|dt_|norm|scale|decay|lambda|position")


def _small(full: PreTrainedConfig) -> PreTrainedConfig:
    """``full`` with sizes from the tables; whatever else follows from its class."""
    values = vars(full)
    heads = next((values[k] for k in ("num_attention_heads", "n_head") if k in values), None)
    small: dict[str, Any] = {}
    if full.is_encoder_decoder:
        small["decoder_start_token_id"] = EOS  # T5 has none unless a checkpoint says so
    for key, value in values.items():
        if isinstance(value, PreTrainedConfig):
            small[key] = _small(value)
        elif key in ("is_decoder", "add_cross_attention") and value:
            small[key] = value  # of a part
        elif key in KEY_VALUES and value:
            small[key] = HEADS if value == heads else min(value, 2)
        elif key in SIZES and value:
            small[key] = SIZES[key]
        elif key in TOKENS:
            small[key] = TOKENS[key]
    return type(full)(**{**small, **OVERRIDES.get(full.model_type, {})})


def build(kind: str, name: str) -> Any:
    """A model in float32 whose answers differ from token to token, in evaluation mode.

    Raises:
        Exception: whatever transformers raises where it cannot be built.
    """
    torch.manual_seed(0)
    model = _from_config(kind, _small(CONFIG_MAPPING[name]())).float().eval()
    _draw(model)
    return model


def full_size(kind: str, name: str) -> Any:
    """The model of the default configuration, without values (on the meta device)."""
    with torch.device("meta"), no_init_weights():
        return _from_config(kind, CONFIG_MAPPING[name]())


def _from_config(kind: str, config: PreTrainedConfig) -> Any:
    if kind == "causal" and hasattr(config, "is_decoder"):
        config.is_decoder = True  # BERT
    if kind == "classification":
        config.num_labels = CLASSES
    return MAPPINGS[kind][0].from_config(config)


@torch.no_grad()
def _draw(model: nn.Module) -> None:
    """Matrices that keep the size of what goes through, and biases that show."""
    for path, module in model.named_modules():
        for key, p in module._parameters.items():
            if p is None or not p.is_floating_point():
                continue
            if key.endswith("bias") or not p.any():
                p.normal_(0, 0.1)
            elif ODD.search(f"{path}.{key}"):
                continue
            elif isinstance(module, nn.Embedding):
                p.normal_(0, 0.5)
            elif p.dim() in (2, 3):
                fan = p.shape[0] if isinstance(module, Conv1D) else p.shape[-1]
                fan = p[0].numel() if isinstance(module, nn.Conv1d) else fan
                p.normal_(0, 1.2 * fan**-0.5)
