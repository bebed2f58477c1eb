"""Language models written out as their graph: every receiver has an input of its own, the sum of what it reads."""

import pytest
import torch

from sparsary.eval.circuits.tasks.pairs import PromptPairs, Question


def _llama_heads(module, attention, x, head):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    config, d = module.config, attention.head_dim
    group = head // (config.num_attention_heads // config.num_key_value_heads)
    q, k, v = (
        x[side] @ projection.weight[rows * d : (rows + 1) * d].T
        + (0 if projection.bias is None else projection.bias[rows * d : (rows + 1) * d])
        for side, projection, rows in (
            ("q", attention.q_proj, head),
            ("k", attention.k_proj, group),
            ("v", attention.v_proj, group),
        )
    )
    cos, sin = module.model.rotary_emb(q, torch.arange(q.shape[1])[None])
    q, k = apply_rotary_pos_emb(q[:, None], k[:, None], cos, sin)
    return q[:, 0], k[:, 0], v, attention.o_proj.weight[:, head * d : (head + 1) * d].T


def _neox_heads(module, attention, x, head):
    from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

    d, joint = attention.head_size, attention.query_key_value
    q, k, v = (
        x[side] @ joint.weight[(3 * head + i) * d : (3 * head + i + 1) * d].T
        + joint.bias[(3 * head + i) * d : (3 * head + i + 1) * d]
        for i, side in enumerate("qkv")
    )
    cos, sin = module.gpt_neox.rotary_emb(q, torch.arange(q.shape[1])[None])
    q, k = apply_rotary_pos_emb(q[:, None], k[:, None], cos, sin)
    return q[:, 0], k[:, 0], v, attention.dense.weight[:, head * d : (head + 1) * d].T


def _gpt2_heads(module, attention, x, head):
    d, width = attention.head_dim, attention.embed_dim
    q, k, v = (
        x[side] @ attention.c_attn.weight[:, i * width + head * d : i * width + (head + 1) * d]
        + attention.c_attn.bias[i * width + head * d : i * width + (head + 1) * d]
        for i, side in enumerate("qkv")
    )
    return q, k, v, attention.c_proj.weight[head * d : (head + 1) * d]


def _parts(model):
    """The embedding, and of every block its norms, its attention, how a head reads, and its output's bias; the last norm."""
    module = model.module
    if model.id == "gpt2":
        body = module.transformer
        blocks = [(b.ln_1, b.ln_2, b.attn, _gpt2_heads, b.attn.c_proj.bias, b.mlp) for b in body.h]
        return lambda ids: body.wte(ids) + body.wpe.weight[: ids.shape[1]], blocks, body.ln_f
    if model.id.startswith("gpt_neox"):
        body = module.gpt_neox
        blocks = [
            (b.input_layernorm, b.post_attention_layernorm, b.attention, _neox_heads, b.attention.dense.bias, b.mlp)
            for b in body.layers
        ]
        return body.embed_in, blocks, body.final_layer_norm
    body = module.model
    blocks = [
        (b.input_layernorm, b.post_attention_layernorm, b.self_attn, _llama_heads, b.self_attn.o_proj.bias, b.mlp)
        for b in body.layers
    ]
    return body.embed_tokens, blocks, body.norm


def run_graph(model, token_ids, receive):
    """What every sender writes, and the logits. ``receive(receiver, sent)`` is the sum of what was sent before, or other."""
    module, (embed, blocks, final) = model.module, _parts(model)
    n_heads, length = module.config.num_attention_heads, token_ids.shape[1]
    parallel = getattr(module.config, "use_parallel_residual", False)
    sent, bias = {"embed": embed(token_ids)}, 0.0
    future = torch.ones(length, length).triu(1).bool()

    for layer, (norm_1, norm_2, attention, read, b_O, mlp) in enumerate(blocks):
        written = {}
        for head in range(n_heads):
            name = f"a{layer}.h{head}"
            x = {side: norm_1(receive(f"{name}.{side}", sent) + bias) for side in "qkv"}
            q, k, v, W_O = read(module, attention, x, head)
            scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(future, -torch.inf)
            written[name] = scores.softmax(-1) @ v @ W_O
        before = dict(sent), bias
        sent |= written
        bias = bias + (0.0 if b_O is None else b_O)
        read_by_mlp, its_bias = before if parallel else (sent, bias)
        sent = sent | {f"m{layer}": mlp(norm_2(receive(f"m{layer}", read_by_mlp) + its_bias))}
    return sent, module.get_output_embeddings()(final(receive("logits", sent) + bias))


@pytest.fixture(scope="session")
def graph():
    """Runs a random model (``tiny_model``) as a graph."""
    return run_graph


@pytest.fixture
def some_pairs():
    """Random prompts, and what a random token is to be preferred to at the end."""

    def build(n_pairs=3, length=5, n_tokens=41, seed=0):
        draw = torch.Generator().manual_seed(seed)
        clean, corrupted = (torch.randint(3, n_tokens, (n_pairs, length), generator=draw) for _ in range(2))
        asked = torch.randint(3, n_tokens, (n_pairs, 2), generator=draw).tolist()
        questions = tuple((Question(length - 1, (answer,), (foil,)),) for answer, foil in asked)
        return PromptPairs("random", "other tokens", clean, corrupted, questions, torch.full((n_pairs,), length))

    return build
