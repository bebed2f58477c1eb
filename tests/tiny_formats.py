"""Tiny dictionaries of the embedded model in every format, for tests of malicious files and of every evaluation.

``BUILD[name](folder, d)`` writes the files to a folder and returns the metadata that they lack.
"""

import json

import numpy as np
import torch
from safetensors.torch import save_file

from sparsary.sae import SAE
from sparsary.sae.encoders import build_encoder
from sparsary.sae.formats import write_dictionaries, write_dictionary
from sparsary.transcoders import Transcoder

LATENTS, K, LAYER, LAYERS = 40, 5, 1, 4
OUT, MLP_IN, MLP_OUT = f"transformer.h.{LAYER}:out", f"transformer.h.{LAYER}.mlp:in", f"transformer.h.{LAYER}.mlp:out"


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape)))


def parts(d, d_out=None):
    """Return W_enc (latents first), b_enc, W_dec (latents first), b_dec; some latents fire at any activation scale."""
    return numbers(LATENTS, d) / d**0.5, 0.1 * numbers(LATENTS), numbers(LATENTS, d_out or d, seed=3) / d**0.5, 0.1 * numbers(d)


def provenance(*hooks):
    reads, writes = hooks[0], hooks[-1]
    about = {"model": {"id": "embedded"}, "hooks_in": [reads], "hooks_out": [writes]}
    return about | ({"hook": reads} if reads == writes else {})


def ours(d, spec=None, kind=SAE, layer=0):
    encoder = build_encoder(spec or {"name": "topk", "k": K})
    found = SAE(d, LATENTS, encoder) if kind is SAE else Transcoder(d, d, LATENTS, encoder)
    with torch.no_grad():
        for i, parameter in enumerate(found.parameters()):
            parameter.copy_(numbers(*parameter.shape, seed=10 * layer + i) * (d**-0.5 if parameter.ndim == 2 else 0.1))
    return found.eval()


def saelens(folder, d):
    write_dictionary(ours(d), folder, "saelens", provenance(OUT))
    return {}


def saelens_legacy(folder, d):
    W_enc, b_enc, W_dec, b_dec = parts(d)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {"W_enc": W_enc.T.contiguous(), "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}, folder / "sae_weights.safetensors"
    )
    cfg = {"model_name": "embedded", "hook_name": f"blocks.{LAYER}.hook_resid_post", "d_in": d, "d_sae": LATENTS}
    cfg |= {"dtype": "float32", "context_size": 64, "prepend_bos": True, "normalize_activations": "none"}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return {}


def dictionary_learning(folder, d):
    write_dictionary(ours(d), folder, "dictionary_learning", provenance(OUT))
    return {}


def sparsify(folder, d):
    write_dictionary(ours(d), folder, "sparsify", provenance(OUT))
    return {}


def openai(folder, d):
    W_enc, b_enc, W_dec, b_dec = parts(d)
    found = {"pre_bias": b_dec, "latent_bias": b_enc, "encoder.weight": W_enc, "decoder.weight": W_dec.T.contiguous()}
    found |= {"stats_last_nonzero": torch.zeros(LATENTS, dtype=torch.long), "activation": "TopK"}
    torch.save(found | {"activation_state_dict": {"k": K, "postact_fn": "ReLU"}}, folder / "1.pt")
    return {"hook": OUT}


def batch_topk(folder, d):
    W_enc, b_enc, W_dec, b_dec = parts(d)
    torch.save({"W_enc": W_enc.T.contiguous(), "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}, folder / "sae.pt")
    about = {"model_name": "gpt2-small", "site": "resid_post", "layer": LAYER, "act_size": d, "dict_size": LATENTS}
    about |= {"seq_len": 64, "top_k": K, "input_unit_norm": True, "sae_type": "topk"}
    about |= {"hook_point": f"blocks.{LAYER}.hook_resid_post", "dtype": "torch.float32", "seed": 1, "device": "cpu"}
    (folder / "config.json").write_text(json.dumps(about))
    return {}


def goodfire(folder, d, stem="_linear", name="Llama-SAE-l1.pth"):
    W_enc, b_enc, W_dec, b_dec = parts(d)
    found = {f"encoder{stem}.weight": W_enc, f"encoder{stem}.bias": b_enc}
    torch.save(found | {f"decoder{stem}.weight": W_dec.T.contiguous(), f"decoder{stem}.bias": b_dec}, folder / name)
    return {"hook": OUT}


def deepseek_r1(folder, d):
    return goodfire(folder, d, "", "DeepSeek-R1-SAE-l1.pt")


def qwen_scope(folder, d):
    W_enc, b_enc, W_dec, b_dec = parts(d)
    torch.save({"W_enc": W_enc, "W_dec": W_dec.T.contiguous(), "b_enc": b_enc, "b_dec": b_dec}, folder / "layer1.sae.pt")
    return {"hook": OUT, "k": K}


def hook_z(folder, d):
    W_enc, b_enc, W_dec, b_dec = parts(d)
    found = {"W_enc": W_enc.T.contiguous(), "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}
    torch.save(found, folder / "gpt2_1_attn.pt")
    cfg = {"act_size": d, "dict_size": LATENTS, "act_name": f"blocks.{LAYER}.attn.hook_z", "model_name": "gpt2-small"}
    (folder / "gpt2_1_attn_cfg.json").write_text(json.dumps(cfg))
    return {}


def gemma_scope(folder, d):
    W_enc, b_enc, W_dec, b_dec = (part.numpy() for part in parts(d))
    threshold = np.full(LATENTS, 0.2, np.float32)
    np.savez(
        folder / "params.npz", W_enc=np.ascontiguousarray(W_enc.T), b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, threshold=threshold
    )
    return {"hook": OUT}


def llama_scope(folder, d):
    W_enc, b_enc, W_dec, b_dec = parts(d)
    (folder / "checkpoints").mkdir(parents=True)
    found = {"encoder.weight": W_enc, "encoder.bias": b_enc, "decoder.weight": W_dec.T.contiguous(), "decoder.bias": b_dec}
    save_file(found, folder / "checkpoints" / "final.safetensors")
    site = f"blocks.{LAYER}.hook_resid_post"
    about = {"act_fn": "jumprelu", "jump_relu_threshold": 0.3, "norm_activation": "dataset-wise", "d_model": d, "top_k": K}
    about |= {"dataset_average_activation_norm": {"in": 7.0, "out": 7.0}, "sparsity_include_decoder_norm": True}
    about |= {"apply_decoder_bias_to_pre_encoder": False, "use_decoder_bias": True, "d_sae": LATENTS}
    (folder / "hyperparams.json").write_text(json.dumps(about | {"hook_point_in": site, "hook_point_out": site}))
    return {}


def llamascopium(folder, d):
    W_enc, b_enc, W_dec, b_dec = parts(d)
    site = f"blocks.{LAYER}.hook_resid_post"
    found = {"W_E": W_enc.T.contiguous(), "b_E": b_enc, "W_D": W_dec, "b_D": b_dec}
    found |= {"activation_function.log_jumprelu_threshold": torch.full((LATENTS,), -1.0)}
    save_file(found | {f"dataset_average_activation_norm.{site}": torch.tensor(7.0)}, folder / "sae_weights.safetensors")
    about = {"sae_type": "sae", "d_model": d, "expansion_factor": 1, "norm_activation": "dataset-wise", "top_k": K}
    about |= {"act_fn": "jumprelu", "sparsity_include_decoder_norm": True, "use_decoder_bias": True, "use_glu_encoder": False}
    about |= {"hook_point_in": site, "hook_point_out": site, "model_name": "gpt2"}
    (folder / "config.json").write_text(json.dumps(about))
    return {}


def circuit_tracer(folder, d):
    hooks = [(f"transformer.h.{i}.mlp:in", f"transformer.h.{i}.mlp:out") for i in range(LAYERS)]
    found = {writes: ours(d, {"name": "relu"}, Transcoder, i) for i, (_, writes) in enumerate(hooks)}
    write_dictionaries(found, folder, "circuit_tracer", {pair[1]: provenance(*pair) for pair in hooks})
    return {"hook": MLP_OUT}


def dunefsky(folder, d):
    W_enc, b_enc, W_dec, b_dec = parts(d)
    found = {"W_enc": W_enc.T.contiguous(), "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "b_dec_out": 2 * b_dec}
    cfg = {"hook_point": f"blocks.{LAYER}.mlp.hook_in", "out_hook_point": f"blocks.{LAYER}.hook_mlp_out", "model_name": "gpt2"}
    torch.save({"state_dict": found, "cfg": cfg}, folder / "transcoder.pt")
    return {}


BUILD = {
    build.__name__: build
    for build in (
        saelens,
        saelens_legacy,
        dictionary_learning,
        sparsify,
        openai,
        batch_topk,
        goodfire,
        deepseek_r1,
        qwen_scope,
        hook_z,
        gemma_scope,
        llama_scope,
        llamascopium,
        circuit_tracer,
        dunefsky,
    )
}
