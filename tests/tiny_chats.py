"""A tiny language model for chats: a tokenizer of bytes with a chat template, and random weights."""

import torch
import transformers

SPECIAL = ["<pad>", "<s>", "</s>", "<|turn|>", "<|end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|turn|>{{ message['role'] }}\n{{ message['content'] | trim }}<|end|>\n"
    "{% endfor %}"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " user or assistant? "},
    {"role": "assistant", "content": "assistant\n"},
]


def chat_tokenizer(template=TEMPLATE):
    """Return a tokenizer whose tokens are the 256 bytes and five special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({word: number for number, word in enumerate([*SPECIAL, *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL[3:],
    )
    found.chat_template = template
    return found


def chat_module(kind="llama", vocabulary=261):
    """Return a random causal model of 3 blocks for the tokenizer."""
    torch.manual_seed(3)
    tokens = {"vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_layer=3, n_embd=16, n_head=2, n_positions=96, **tokens)
    elif kind == "mamba":
        config = transformers.MambaConfig(num_hidden_layers=3, hidden_size=16, state_size=4, **tokens)
    else:
        sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
        sizes |= {"intermediate_size": 20, "max_position_embeddings": 256}
        config = transformers.LlamaConfig(**sizes, **tokens)
    module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            # As initialized, attention hardly matters.
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def save_chat_model(folder, kind="llama"):
    """Write model and tokenizer to a folder, and return it."""
    chat_module(kind).save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder
