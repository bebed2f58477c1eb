"""Llama Scope: files built after its layout against the fold that its own code does, step by step."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsary.sae.formats import ReadOptions, SourceFiles, detect, read_dictionary, write_dictionary

D, LATENTS, TOKENS = 8, 24, 40
NORM_IN, NORM_OUT, LEVEL = 7.0, 19.0, 9.0
SITE = "blocks.5.hook_resid_post"


def parameters(seed=0):
    rng = np.random.default_rng(seed)
    sizes = {"encoder.weight": (LATENTS, D), "encoder.bias": (LATENTS,), "decoder.weight": (D, LATENTS), "decoder.bias": (D,)}
    return {name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}


def near(ours, theirs):
    """Outputs of different sizes, to a part in a hundred thousand."""
    ours = ours.detach().numpy()
    assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)


def inputs():
    return np.random.default_rng(9).normal(1.7, 3.2, (TOKENS, D)).astype(np.float32)


def config(**changes):
    found = {"act_fn": "jumprelu", "jump_relu_threshold": LEVEL, "norm_activation": "dataset-wise", "d_model": D, "top_k": 5}
    found |= {"dataset_average_activation_norm": {"in": NORM_IN, "out": NORM_IN}, "sparsity_include_decoder_norm": True}
    found |= {"apply_decoder_bias_to_pre_encoder": False, "use_decoder_bias": True, "d_sae": LATENTS}
    return found | {"hook_point_in": SITE, "hook_point_out": SITE} | changes


def transcoder(**changes):
    hooks = {"hook_point_in": "blocks.5.ln2.hook_normalized", "hook_point_out": "blocks.5.hook_mlp_out"}
    return config(**hooks, dataset_average_activation_norm={"in": NORM_IN, "out": NORM_OUT}, **changes)


def written(directory, found, about, dtype=torch.float32):
    (directory / "checkpoints").mkdir(parents=True)
    save_file(
        {name: torch.from_numpy(value).to(dtype) for name, value in found.items()}, directory / "checkpoints/final.safetensors"
    )
    (directory / "hyperparams.json").write_text(json.dumps(about))
    return directory


def reference(found, x, norm_out, gate):
    """Their inference: scales folded with the encoder left alone, norms folded, a threshold in raw units."""
    s_in, s_out = D**0.5 / NORM_IN, D**0.5 / norm_out
    be, Wd, bd = found["encoder.bias"] / s_in, found["decoder.weight"].T * (s_in / s_out), found["decoder.bias"] / s_out
    n = np.linalg.norm(Wd, axis=1)
    p = x @ (found["encoder.weight"].T * n) + be * n
    a = gate(p)
    assert 0.02 < (a != 0).mean() < 0.9
    return a, a @ (Wd / n[:, None]) + bd


def jumprelu(p):
    return p * (p > LEVEL)


def topk(p):
    kept = np.zeros_like(p)
    best = np.argsort(-p, axis=1)[:, :5]
    np.put_along_axis(kept, best, np.maximum(np.take_along_axis(p, best, 1), 0), 1)
    return kept


@pytest.mark.parametrize(
    ("about", "gate"), [({}, jumprelu), ({"act_fn": "topk"}, topk), ({"act_fn": "relu"}, lambda p: np.maximum(p, 0))]
)
def test_an_autoencoder_is_its_equation(about, gate, tmp_path):
    found, x = parameters(), inputs()
    loaded = read_dictionary(written(tmp_path / "a", found, config(**about)))
    a, y = reference(found, x, NORM_IN, gate)
    code = loaded.dictionary.encode(torch.from_numpy(x))
    near(loaded.dictionary.decode(code), y)
    assert np.array_equal(code.to_dense(LATENTS).detach().numpy() != 0, a != 0)
    assert loaded.provenance["hook"] == "model.layers.5:out"
    assert loaded.provenance["model"] == {"id": "meta-llama/Llama-3.1-8B"}
    assert loaded.provenance["source"]["config"]["top_k"] == 5


def test_a_transcoder_s_threshold_is_in_units_of_its_outputs(tmp_path):
    found, x = parameters(), inputs()
    loaded = read_dictionary(written(tmp_path / "a", found, transcoder()))
    # Behind the norm, before its gain.
    a, y = reference(found, x / np.sqrt((x**2).mean(1, keepdims=True)), NORM_OUT, jumprelu)
    code = loaded.dictionary.encode(torch.from_numpy(x))
    near(loaded.dictionary.decode(code), y)
    assert np.array_equal(code.to_dense(LATENTS).detach().numpy() != 0, a != 0)
    assert loaded.provenance["hooks_in"] == ["model.layers.5.post_attention_layernorm:in"]
    assert loaded.provenance["hooks_out"] == ["model.layers.5.mlp:out"]


def test_half_precision_is_computed_in_float32(tmp_path):
    found, x = parameters(), inputs()
    loaded = read_dictionary(written(tmp_path / "a", found, config(), torch.bfloat16))
    rounded = {name: torch.from_numpy(value).bfloat16().float().numpy() for name, value in found.items()}
    y = reference(rounded, x, NORM_IN, jumprelu)[1]
    near(loaded.dictionary(torch.from_numpy(x)), y)
    assert loaded.dictionary.W_dec.dtype == torch.float32


def test_the_bias_is_subtracted_where_it_says_so(tmp_path):
    found, x = parameters(), inputs()
    d = read_dictionary(written(tmp_path / "a", found, config(apply_decoder_bias_to_pre_encoder=True))).dictionary
    moved = found | {"encoder.bias": found["encoder.bias"] - found["encoder.weight"] @ found["decoder.bias"]}
    near(d(torch.from_numpy(x)), reference(moved, x, NORM_IN, jumprelu)[1])


def test_converted_it_gives_the_same_in_other_formats(tmp_path):
    loaded = read_dictionary(written(tmp_path / "a", parameters(), config()))
    write_dictionary(loaded.dictionary, tmp_path / "b", "saelens", loaded.provenance)
    x = torch.from_numpy(inputs())
    torch.testing.assert_close(read_dictionary(tmp_path / "b").dictionary(x), loaded.dictionary(x), rtol=1e-4, atol=1e-4)


def test_it_is_told_by_its_files(tmp_path):
    found = detect(SourceFiles(written(tmp_path / "a", parameters(), config())))
    assert found is not None
    assert (found[0].name, found[1]) == ("llama_scope", "hyperparams.json and checkpoints/final.safetensors")
    assert read_dictionary(tmp_path).evidence.startswith("Llama Scope: hyperparams.json")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"act_fn": "swish"}, "act_fn: expected jumprelu, topk or relu, got 'swish'"),
        ({"jump_relu_threshold": None}, "jump_relu_threshold: expected a number, got None"),
        ({"sparsity_include_decoder_norm": False}, "sparsity_include_decoder_norm: expected true with jumprelu"),
        ({"dataset_average_activation_norm": {"in": 3}}, "expected the mean norms in and out, got {'in': 3}"),
        ({"dataset_average_activation_norm": {"in": 0, "out": 1}}, "in: expected a number above 0, got 0"),
        ({"norm_activation": "batch-wise"}, "norm_activation: expected dataset-wise, inference"),
        ({"use_glu_encoder": True}, "use_glu_encoder: expected false, got true"),
        ({"hook_point_in": 5}, "hook_point_in: expected a hook's name, got 5"),
        ({"d_sae": 99}, r"encoder.weight: expected shape \(99, 8\), got \(24, 8\)"),
        ({"d_model": "8"}, "d_model: expected a whole number, got '8'"),
        ({"act_fn": "topk", "top_k": 0}, "k: expected a whole number from 1, got 0"),
    ],
)
def test_damaged_configurations_are_named(changes, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        read_dictionary(written(tmp_path / "a", parameters(), config(**changes)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"encoder.bias": None}, "encoder.bias missing among"),
        ({"encoder.weight": torch.zeros(D, LATENTS)}, r"encoder.weight: expected shape \(24, 8\), got \(8, 24\)"),
        ({"decoder.weight": torch.zeros(LATENTS, D)}, r"decoder.weight: expected shape \(8, 24\), got \(24, 8\)"),
        ({"decoder.bias": torch.full((D,), torch.inf)}, "b_out: expected finite numbers, got inf"),
        ({"encoder_glu.weight": torch.zeros(2)}, "got also encoder_glu.weight"),
    ],
)
def test_damaged_tensors_are_named(changes, says, tmp_path):
    folder = written(tmp_path / "a", parameters(), config())
    path = folder / "checkpoints" / "final.safetensors"
    tensors = {key: value for key, value in (load_file(path) | changes).items() if value is not None}
    save_file(tensors, path)
    with pytest.raises(ValueError, match=says):
        read_dictionary(folder)


def test_what_a_file_lacks_may_be_given(tmp_path):
    folder = written(tmp_path / "a", parameters(), config(jump_relu_threshold=None))
    found, x = parameters(), inputs()
    d = read_dictionary(folder, options=ReadOptions(threshold=LEVEL)).dictionary
    near(d(torch.from_numpy(x)), reference(found, x, NORM_IN, jumprelu)[1])
    (folder / "checkpoints" / "final.safetensors").unlink()
    with pytest.raises(ValueError, match="expected this file, found none"):
        read_dictionary(folder, "llama_scope")
