"""Tiny random models of every architecture in transformers, with a tokenizer and text for them.

``tiny_config(kind)`` shrinks every size in an architecture's default configuration by field name, including nested
configurations; ``PARTICULAR`` holds the exceptions. ``tiny_model(kind)`` builds its causal language model.
"""

import dataclasses
import re

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, WIDTH, LAYERS, HEADS, POSITIONS = 96, 32, 4, 4, 128

# Patterns of full field names, and the values of numeric fields (None: the default); the first match counts.
RULES = [
    (r"hc_mult|ngram|n_gram.*|.*_dropout.*|.*layerdrop", None),
    (
        r"(decoder_)?vocab_size|vocab_size_per_layer_input|audio_vocab_size|.*hash_byte_group_vocab|ngram_vocab_size.*",
        VOCABULARY,
    ),
    (
        r"(original_)?max_(position_embeddings|seq_len|sequence_length|target_positions|source_positions)|n_positions|n_ctx",
        POSITIONS,
    ),
    (r"(num_hidden|encoder|decoder|num|n|num_encoder|num_decoder|conf_num_hidden)_layers?|depth|num_blocks", LAYERS),
    (r".*(key_value|kv|k_v)_(heads|groups)|kv_n_heads|indexer_kv_heads|num_query_groups", 2),
    (r".*(attention|key|value|query|mamba|linear|index|indexer)?_?(n_)?heads|n_head|mamba_n_heads|mamba_num_heads", HEADS),
    (r"rotary_dim|.*rope_dim", 4),
    (r"qk_head_dim", 16),
    (r"(.*_)?head_(dim|size)|.*head_dim|d_head|dim_head|kv_channels|d_kv|attention_head_size|mamba_d_head", 8),
    (r"top_?k.*|.*_top_?k|num_experts_per_tok|moe_k|n_group|topk_group|num_selected.*", 2),
    (r"(n|num)_.*shared_experts|moe_num_shared_experts", 1),
    (r".*(num|n|local|routed)_?.*experts|zero_expert_num", 4),
    (r"(.*_)?(d_state|state_size|lora_rank|low_rank.*|laurel_rank|lowrank|dt_rank)", 8),
    (
        r".*(intermediate|ffn|ff|feed_forward|mlp|inner)_?(hidden_)?(size|dim)(_.*)?|d_ff|dim_ff|dff|n_inner|d_inner|.*ffn_dim",
        48,
    ),
    (r"first_k_dense_replace|num_dense_layers|.*_layer_offset|num_kv_shared_layers", 1),
    (r".*_(layer_)?(period|interval)|decoder_sparse_step|interleave_moe_layer_step", 2),
    (r".*chunk_(size|length)|(.*_)?window(_size|_len)?|index_topk", 16),
    (r"hidden_size|d_model|n_embd|embedding_size|embed_dim|word_embed_proj_dim|.*hidden_size(_global)?|lru_width|dim", WIDTH),
]
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Fields that are None by default, which would mean the size of another field, or that a part is missing.
UNSET = {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "audio_vocab_size": VOCABULARY,
}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_HYBRID = ["mamba", "hybrid", "mamba", "hybrid"]
PARTICULAR = {
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROPE)},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0}},
    "dots3_note_vision_encoder": {"pyramid_num_routed": [-1, -1, 4, 4]},
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "nemotron_h": {"n_groups": 2, "layers_block_type": ["mamba", "moe", "attention", "mlp"]},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 50,
    },
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"] * 2,
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
    },
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"layers_block_type": _HYBRID, "num_key_value_heads": HEADS},
    "zamba2": {"layers_block_type": _HYBRID, "num_key_value_heads": HEADS},
}
# Architectures that transformers cannot build from a small configuration, and why.
IMPOSSIBLE = {
    "gemma3n": "its vision tower is timm's, which is not installed",
    "gemma4_assistant": "runs on the keys and values of another model",
    "gemma4_unified_assistant": "runs on the keys and values of another model",
    "musicgen": "transformers' own class does not take its configuration",
    "musicgen_melody": "transformers' own class does not take its configuration",
}

# Every causal architecture by ``model_type``, and those that can be built.
CAUSAL = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
KINDS = tuple(kind for kind in CAUSAL if kind not in IMPOSSIBLE)


def _number(name, value):
    """Return the size for a configuration field: by its name, else its default if that is small."""
    if name.endswith(("_token_id", "_token_index", "_index", "_idx")):
        return value if value < VOCABULARY else VOCABULARY - 1
    for pattern, small in RULES:
        if re.fullmatch(pattern, name):
            return value if small is None else min(small, value) if value > 0 else value
    return value if value <= 64 else WIDTH


def tiny_values(config_class, kind=None):
    """Return arguments that make a configuration of this class tiny."""
    values = {}
    for field in dataclasses.fields(config_class):
        name = field.name
        if name in SPECIAL and "int" in str(field.type):
            values[name] = SPECIAL[name]
        elif name in UNSET and field.default is None:
            values[name] = UNSET[name]
        elif isinstance(field.default, int) and not isinstance(field.default, bool):
            values[name] = _number(name, field.default)
    nested = {
        name: kind
        for name, kind in config_class.sub_configs.items()
        if name in {f.name for f in dataclasses.fields(config_class)}
    }
    default = config_class() if any(not dataclasses.is_dataclass(kind) for kind in nested.values()) else None
    for name, part in nested.items():
        part = part if dataclasses.is_dataclass(part) else type(getattr(default, name))
        if dataclasses.is_dataclass(part):
            values[name] = tiny_values(part) | {"model_type": part.model_type}
    if "kv_lora_rank" in values and "num_key_value_heads" in values:
        # Keys are compressed, not shared.
        values["num_key_value_heads"] = HEADS
    particular = PARTICULAR.get(kind or getattr(config_class, "model_type", None), {})
    return {name: value for name, value in (values | particular).items() if value is not ...}


def tiny_config(kind, **changes):
    """Return a configuration of the architecture ``kind`` (its ``model_type``) with a few thousand weights."""
    config_class = transformers.CONFIG_MAPPING[kind]
    return config_class(**(tiny_values(config_class, kind) | changes))


def tiny_model(kind, **changes):
    """Return a random causal language model in float32, with biases and norms away from their initial values."""
    config = tiny_config(kind, **changes)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            # Initial biases of zero and norms of one would hide some mistakes.
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return module


def tiny_tokenizer():
    """Return a word tokenizer with ``VOCABULARY`` ids: <pad>, <s>, </s>, <unk> and w4, w5, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(4, VOCABULARY))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def words_of_text(documents, length, seed=0):
    """Return random documents in the words of the tokenizer."""
    ids = torch.randint(4, VOCABULARY - 8, (documents, length), generator=torch.Generator().manual_seed(seed))
    return [" ".join(f"w{number}" for number in row) for row in ids.tolist()]
