"""What files say was done to a model's weights: folded where that is the same function, obeyed, or a doubt by name."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import sparsary
from sparsary.sae.formats import read_dictionary, write_dictionary

D, LATENTS, TOKENS = 10, 23, 17
TENSORS = {
    "standard": ("W_enc", "b_enc"),
    "topk": ("W_enc", "b_enc"),
    "jumprelu": ("W_enc", "b_enc", "threshold"),
    "gated": ("W_enc", "b_gate", "b_mag", "r_mag"),
    "matching_pursuit": (),
    "transcoder": ("W_enc", "b_enc"),
    "skip_transcoder": ("W_enc", "b_enc", "W_skip"),
}
EXTRA = {"topk": {"k": 4}, "matching_pursuit": {"max_iterations": 5, "residual_threshold": 0.0}}


def saelens(folder, architecture="topk", hook="blocks.3.hook_resid_post", model="gpt2-small", cfg=None, **about):
    """A folder of SAELens with random weights, the same for one architecture."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(3)
    sizes = {"W_enc": (D, LATENTS), "W_dec": (LATENTS, D), "b_dec": (D,), "W_skip": (D, D)}
    names = (*TENSORS[architecture], "W_dec", "b_dec")
    tensors = {name: torch.randn(sizes.get(name, (LATENTS,)), generator=generator) for name in names}
    tensors["W_dec"] = torch.nn.functional.normalize(tensors["W_dec"], dim=1)
    save_file(tensors, folder / "sae_weights.safetensors")
    metadata = {"sae_lens_version": "6.54.12", "model_name": model, "hook_name": hook} | about
    values = {"architecture": architecture, "d_in": D, "d_sae": LATENTS, "dtype": "float32", "metadata": metadata}
    values |= {"apply_b_dec_to_input": "transcoder" not in architecture, "normalize_activations": "none"}
    if "transcoder" in architecture:
        values["d_out"] = D
    (folder / "cfg.json").write_text(json.dumps(values | EXTRA.get(architecture, {}) | (cfg or {})))
    return folder


def processed(**kwargs) -> dict[str, Any]:
    return {"model_from_pretrained_kwargs": kwargs}


def rows():
    return torch.randn(TOKENS, D) + torch.randn(TOKENS, 1)


def split(x):
    mean = x.mean(1, keepdim=True)
    return x - mean, mean


STREAMS = ["hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out"]


@pytest.mark.parametrize("place", STREAMS)
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated", "matching_pursuit"])
def test_centred_writing_weights_are_folded(architecture, place, tmp_path):
    hook, x = f"blocks.3.{place}", rows()
    centred, mean = split(x)
    plain = read_dictionary(saelens(tmp_path / "plain", architecture, hook)).dictionary
    found = read_dictionary(saelens(tmp_path / "centred", architecture, hook, **processed(center_writing_weights=True)))
    # Of the model's stream as it is: what the file's dictionary makes of the centred one, and the mean.
    torch.testing.assert_close(found.dictionary(x), plain(centred) + mean, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.dictionary.encode(x).to_dense(LATENTS) > 0, plain.encode(centred).to_dense(LATENTS) > 0)
    assert not found.warnings
    assert any("center_writing_weights" in note for note in found.notes)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("model", ["gpt2-xl", "pythia-70m-deduped", "EleutherAI/pythia-160m"])
def test_centring_goes_with_every_bias_and_family_of_layer_norms(model, bias, tmp_path):
    cfg, x = {"apply_b_dec_to_input": bias}, rows()
    plain = read_dictionary(saelens(tmp_path / "plain", model=model, cfg=cfg)).dictionary
    found = read_dictionary(saelens(tmp_path / "c", model=model, cfg=cfg, **processed(center_writing_weights=True)))
    torch.testing.assert_close(found.dictionary(x), plain(split(x)[0]) + split(x)[1], rtol=1e-5, atol=1e-5)


def test_a_scale_outside_of_the_weights_is_folded_first(tmp_path):
    cfg, x = {"normalize_activations": "expected_average_only_in"}, rows()
    dictionaries = []
    for name, about in (("plain", {}), ("centred", processed(center_writing_weights=True))):
        folder = saelens(tmp_path / name, cfg=cfg, **about)
        (folder / "activation_scaler.json").write_text('{"scaling_factor": 0.4}')
        dictionaries.append(read_dictionary(folder).dictionary)
    torch.testing.assert_close(dictionaries[1](x), dictionaries[0](split(x)[0]) + split(x)[1], rtol=1e-5, atol=1e-5)


def test_centring_survives_our_checkpoint_and_the_way_back(tmp_path):
    x, source = rows(), saelens(tmp_path / "theirs", **processed(center_writing_weights=True))
    d = read_dictionary(source).dictionary
    sparsary.convert(source, tmp_path / "ours")
    sparsary.convert(tmp_path / "ours", tmp_path / "again", to="saelens")
    torch.testing.assert_close(read_dictionary(tmp_path / "again").dictionary(x), d(x), rtol=1e-5, atol=1e-5)
    about = json.loads((tmp_path / "again" / "cfg.json").read_text())
    assert about["metadata"]["model_from_pretrained_kwargs"] == {"center_writing_weights": True}
    assert about["normalize_activations"] == "none"
    with pytest.raises(ValueError, match=r"as the library has none, got centred\. Use --to saelens"):
        write_dictionary(d, tmp_path / "out", "dictionary_learning")


@pytest.mark.parametrize("model", ["meta-llama/Llama-3.1-8B", "gemma-2-2b", "Qwen/Qwen3-0.6B"])
def test_a_model_with_rms_norms_was_not_centred(model, tmp_path):
    x = rows()
    plain = read_dictionary(saelens(tmp_path / "plain", model=model)).dictionary
    found = read_dictionary(saelens(tmp_path / "c", model=model, **processed(center_writing_weights=True)))
    assert torch.equal(found.dictionary(x), plain(x))
    assert not found.warnings
    assert any("centres no model with RMS norms" in note for note in found.notes)


def test_a_normalisation_that_takes_the_mean_away_needs_nothing_more(tmp_path):
    about, x = processed(center_writing_weights=True), rows()
    cfg = {"normalize_activations": "layer_norm"}
    plain = read_dictionary(saelens(tmp_path / "plain", cfg=cfg)).dictionary
    found = read_dictionary(saelens(tmp_path / "c", cfg=cfg, **about))
    torch.testing.assert_close(found.dictionary(x), plain(split(x)[0]) + split(x)[1], rtol=1e-5, atol=1e-5)
    assert not found.warnings
    other = read_dictionary(saelens(tmp_path / "d", cfg={"normalize_activations": "constant_norm_rescale"}, **about))
    assert any("center_writing_weights is not obeyed" in warning for warning in other.warnings)


@pytest.mark.parametrize("architecture", ["transcoder", "skip_transcoder"])
def test_a_transcoder_of_streams_reads_centred_ones_and_its_outputs_are_in_doubt(architecture, tmp_path):
    x, hooks = rows(), {"hook_name_out": "blocks.3.hook_mlp_out"}
    plain = read_dictionary(saelens(tmp_path / "plain", architecture, "blocks.3.hook_resid_mid", **hooks)).dictionary
    about = hooks | processed(center_writing_weights=True)
    found = read_dictionary(saelens(tmp_path / "c", architecture, "blocks.3.hook_resid_mid", **about))
    torch.testing.assert_close(found.dictionary(x), plain(split(x)[0]), rtol=1e-5, atol=1e-5)
    assert any("center_writing_weights is not obeyed: outputs are without" in warning for warning in found.warnings)


# kwargs, hook, whether a doubt must name the field
EFFECTS = [
    ({"center_writing_weights": True}, "blocks.3.attn.hook_z", False),
    ({"center_writing_weights": True}, "blocks.3.mlp.hook_post", False),
    ({"center_writing_weights": False}, "blocks.3.hook_resid_post", False),
    ({"fold_ln": True}, "blocks.3.hook_resid_post", False),
    ({"fold_ln": True}, "blocks.3.mlp.hook_in", True),
    ({"fold_ln": True}, "blocks.3.ln2.hook_normalized", True),
    ({"fold_ln": False}, "blocks.3.mlp.hook_in", False),
    ({"fold_value_biases": True}, "blocks.3.attn.hook_z", True),
    ({"fold_value_biases": True}, "blocks.3.hook_attn_out", False),
    ({"refactor_factored_attn_matrices": True}, "blocks.3.attn.hook_z", True),
    ({"refactor_factored_attn_matrices": True}, "blocks.3.hook_resid_pre", False),
    ({"center_unembed": True}, "blocks.3.hook_resid_post", False),
    ({"device": "cuda", "n_devices": 1, "trust_remote_code": True}, "blocks.3.hook_resid_post", False),
    ({"checkpoint_index": 7}, "blocks.3.hook_resid_post", True),
    ({"load_in_8bit": True}, "blocks.3.hook_resid_post", True),
    ({"something_new": 3}, "blocks.3.hook_resid_post", True),
]


@pytest.mark.parametrize(("kwargs", "hook", "doubted"), EFFECTS)
def test_what_is_not_folded_is_a_doubt_only_where_it_changes_something(kwargs, hook, doubted, tmp_path):
    found = read_dictionary(saelens(tmp_path / "x", hook=hook, **processed(**kwargs)))
    named = [warning for warning in found.warnings if f"model_from_pretrained_kwargs.{next(iter(kwargs))}" in warning]
    assert bool(named) == doubted, found.warnings
    assert found.provenance["converted"]["warnings"] == list(found.warnings)


def test_a_model_or_hook_that_is_not_known_is_a_doubt(tmp_path):
    about = processed(center_writing_weights=True)
    for name, more in (("model", {"model": "somebody/something"}), ("hook", {"hook": "h.3.odd"})):
        found = read_dictionary(saelens(tmp_path / name, **more, **about))
        assert any("center_writing_weights is not obeyed: it is not known" in warning for warning in found.warnings)


def test_what_says_which_weights_are_loaded_is_obeyed(tmp_path):
    about = processed(revision="abc", dtype="torch.bfloat16")
    assert read_dictionary(saelens(tmp_path / "a", **about)).provenance["model"] == {
        "id": "openai-community/gpt2",
        "revision": "abc",
        "dtype": "bfloat16",
    }
    found = read_dictionary(saelens(tmp_path / "b", model="pythia-70m", **processed(checkpoint_value=3000)))
    assert found.provenance["model"] == {"id": "EleutherAI/pythia-70m", "revision": "step3000"}


@pytest.mark.parametrize(
    ("said", "leading", "doubted"),
    [
        *[
            ([None], None, False),
            (None, None, False),
            ([0, None], None, False),
            ([1, None], 1, False),
            ([4, None, 1], 4, False),
        ],
        *[([5], None, True), ([1, -1], None, True), ([-5, None], None, True), ([0, None, 2], None, True), ("odd", None, True)],
    ],
)
def test_positions_that_were_left_out_are_left_out(said, leading, doubted, tmp_path):
    found = read_dictionary(saelens(tmp_path / "x", seqpos_slice=said))
    assert (found.provenance.get("harvest") or {}).get("exclude_leading") == leading
    assert any("seqpos_slice" in warning for warning in found.warnings) == doubted


def test_a_head_of_its_own_is_a_doubt(tmp_path):
    found = read_dictionary(saelens(tmp_path / "x", hook="blocks.3.attn.hook_z", hook_head_index=2))
    assert any("hook_head_index 2 is not obeyed" in warning for warning in found.warnings)


def test_flat_configurations_of_old_versions_are_read_alike(tmp_path):
    x, folder = rows(), saelens(tmp_path / "x")
    plain = read_dictionary(folder).dictionary
    flat = {"architecture": "topk", "d_in": D, "d_sae": LATENTS, "dtype": "float32", "activation_fn_str": "topk"}
    flat |= {"activation_fn_kwargs": {"k": 4}, "apply_b_dec_to_input": True, "hook_name": "blocks.3.hook_resid_post"}
    flat |= {"model_name": "gpt2-small", "seqpos_slice": [2, None], **processed(center_writing_weights=True)}
    (folder / "cfg.json").write_text(json.dumps(flat))
    found = read_dictionary(folder)
    torch.testing.assert_close(found.dictionary(x), plain(split(x)[0]) + split(x)[1], rtol=1e-5, atol=1e-5)
    assert found.provenance["harvest"] == {"exclude_leading": 2}
    write_dictionary(found.dictionary, tmp_path / "out", "saelens", found.provenance)
    about = json.loads((tmp_path / "out" / "cfg.json").read_text())["metadata"]
    assert about["seqpos_slice"] == [2, None]
    assert about["model_from_pretrained_kwargs"] == {"center_writing_weights": True}
