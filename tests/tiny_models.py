"""A tiny random model of every architecture that transformers knows, and a tokenizer and text to save beside it.

``tiny_config(kind)`` shrinks every size of an architecture's default configuration by the name of its field, nested
configurations too; ``PARTICULAR`` holds what no rule about names can know. ``tiny_model(kind)`` is its causal language model.
"""

import dataclasses
import re

import torch
import transformers

VOCABULARY, WIDTH, LAYERS, HEADS, POSITIONS = 96, 32, 4, 4, 128

# Field names, in full, and what they are set to where they are numbers; the first that matches counts.
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
    (r"qk_rope_head_dim|rotary_dim|.*rope_dim", 4),
    (r"qk_head_dim", 12),
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
PARTICULAR = {}


def _number(name, value):
    """The size for a field of a configuration: by its name, else as it was if it is small."""
    if name.endswith(("_token_id", "_token_index", "_index", "_idx")):
        return value if value < VOCABULARY else VOCABULARY - 1
    for pattern, small in RULES:
        if re.fullmatch(pattern, name):
            return value if small is None else min(small, value) if value > 0 else value
    return value if value <= 64 else WIDTH


def tiny_values(config_class, kind=None):
    """The arguments that make a configuration of this class tiny."""
    values = {}
    for field in dataclasses.fields(config_class):
        name = field.name
        if name in SPECIAL and "int" in str(field.type):
            values[name] = SPECIAL[name]
        elif isinstance(field.default, int) and not isinstance(field.default, bool):
            values[name] = _number(name, field.default)
    for name, nested in config_class.sub_configs.items():
        if dataclasses.is_dataclass(nested) and any(field.name == name for field in dataclasses.fields(config_class)):
            values[name] = tiny_values(nested)
    if "qk_rope_head_dim" in values and "head_dim" in values:
        values["head_dim"] = values["qk_rope_head_dim"]
    particular = PARTICULAR.get(kind or getattr(config_class, "model_type", None), {})
    return {name: value for name, value in (values | particular).items() if value is not ...}


def tiny_config(kind, **changes):
    """A configuration of the architecture ``kind`` (its ``model_type``) whose model has a few thousand weights."""
    config_class = transformers.CONFIG_MAPPING[kind]
    return config_class(**(tiny_values(config_class, kind) | changes))


def tiny_model(kind, **changes):
    """A random causal language model of the architecture, in float32, its biases and norms not at their fresh values."""
    config = tiny_config(kind, **changes)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            # Fresh biases are zero and fresh norms one: then some mistakes would not show.
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return module


def tiny_tokenizer():
    """A tokenizer of words for ``VOCABULARY`` ids: <pad>, <s>, </s>, <unk> and w4, w5, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(4, VOCABULARY))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def words_of_text(documents, length, seed=0):
    """Random documents in the tokenizer's words."""
    ids = torch.randint(4, VOCABULARY - 8, (documents, length), generator=torch.Generator().manual_seed(seed))
    return [" ".join(f"w{number}" for number in row) for row in ids.tolist()]
