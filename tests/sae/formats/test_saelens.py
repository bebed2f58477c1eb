"""SAELens 6: files that it wrote give its outputs, and what we write reads back the same.

The golden folders were made by SAELens itself: tests/parity/reference_formats_saelens.py.
"""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsary.sae import SAE, load_dictionary
from sparsary.sae.encoders import build_encoder
from sparsary.sae.formats import ReadOptions, SourceFiles, read_canonical, read_dictionary, write_dictionary
from sparsary.sae.formats.conversion import to_dictionary
from sparsary.transcoders import CrossLayerTranscoder, Transcoder

GOLDEN = Path(__file__).parents[2] / "golden" / "formats" / "saelens"
CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
# Whose activations SAELens reports in other units than ours are in, or exports with its norms folded.
OTHER_UNITS = ("constant_norm_rescale", "layer_norm", "training", "rescaled")


def test_the_golden_files_are_all_there():
    about = json.loads((GOLDEN / "header.json").read_text())
    assert (about["library"], about["version"], len(CASES)) == ("sae_lens", "6.54.12", 50)


@pytest.mark.parametrize("case", CASES)
def test_what_saelens_wrote_gives_its_outputs(case):
    expected = load_file(GOLDEN / case / "expected.safetensors")
    loaded = read_dictionary(GOLDEN / case).dictionary
    code = loaded.encode(expected["x"])
    y = loaded.decode(code, expected["x"])
    dense, theirs = code.to_dense(loaded.n_latents), expected["code"].float()
    if "bfloat16" in case:
        # They compute in it, we do not: single thresholds are met differently.
        assert ((y - expected["y"].float()).norm() / expected["y"].float().norm()) < 1e-2
        return
    torch.testing.assert_close(y, expected["y"], rtol=1e-5, atol=1e-5)
    assert torch.equal(dense != 0, theirs != 0)
    # Random weights prove little where nothing fires, or everything does.
    assert 0.02 < (theirs != 0).float().mean() < 0.9
    if not any(word in case for word in OTHER_UNITS):
        torch.testing.assert_close(dense, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_written_then_read_again_changes_nothing(case, tmp_path, assert_same_tensors):
    first = read_dictionary(GOLDEN / case)
    x = load_file(GOLDEN / case / "expected.safetensors")["x"]
    first.dictionary.save(tmp_path / "ours", first.provenance)
    ours = load_dictionary(tmp_path / "ours")
    assert_same_tensors(ours, first.dictionary)
    write_dictionary(ours, tmp_path / "theirs", "saelens", first.provenance)
    again = read_dictionary(tmp_path / "theirs")
    torch.testing.assert_close(again.dictionary(x), ours(x), rtol=1e-5, atol=1e-5)
    for key in ("model", "hook", "hooks_in", "hooks_out", "text"):
        assert again.provenance.get(key) == first.provenance.get(key)


def test_where_it_comes_from_survives():
    found = read_dictionary(GOLDEN / "skip_transcoder-none").provenance
    assert found["model"] == {"id": "openai-community/gpt2"}
    assert (found["hooks_in"], found["hooks_out"]) == (["transformer.h.3.mlp:in"], ["transformer.h.3.mlp:out"])
    assert found["text"] == {"context_length": 128, "bos": "context"}
    assert found["source"]["config"]["metadata"]["hook_name_out"] == "blocks.3.hook_mlp_out"
    assert found["converted"]["evidence"].startswith("SAELens 6: cfg.json with architecture 'skip_transcoder'")
    assert read_dictionary(GOLDEN / "topk-none").provenance["hook"] == "transformer.h.3:out"


def made(spec, kind="sae", skip=False):
    """A dictionary of ours with scales and, where it has a threshold, a known one."""
    torch.manual_seed(11)
    encoder = build_encoder(spec)
    d = SAE(7, 19, encoder) if kind == "sae" else Transcoder(7, 5, 19, encoder, skip)
    with torch.no_grad():
        for parameter in (p for name, p in d.named_parameters() if "log" not in name):
            parameter.normal_()
        d.renormalize()
        if kind == "transcoder":
            d.in_centre.normal_()
    d.in_scale.fill_(1.7)
    d.out_scale.fill_(1.7 if kind == "sae" else 0.6)
    if hasattr(encoder, "started"):
        encoder.started.fill_(1)
    for _ in range(3):
        d.encode(torch.randn(13, 7), torch.randn(13, d.d_out))
    return d.eval()


FAMILIES = {
    "topk": ({"name": "topk", "k": 4}, "topk"),
    "gradient_topk": ({"name": "gradient_topk", "k": 4, "beta": 2.0}, "topk"),
    "mutual_choice": ({"name": "mutual_choice", "k": 4}, "jumprelu"),
    "feature_choice": ({"name": "feature_choice", "k": 4}, "jumprelu"),
    "batch_topk": ({"name": "batch_topk", "k": 4}, "jumprelu"),
    "matryoshka": ({"name": "matryoshka", "k": 4}, "jumprelu"),
    "relu": ({"name": "relu"}, "standard"),
    "jumprelu": ({"name": "jumprelu", "target_l0": 4}, "jumprelu"),
    "gated": ({"name": "gated"}, "gated"),
    "matching_pursuit": ({"name": "matching_pursuit", "k": 4}, "matching_pursuit"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_counterpart(family, tmp_path):
    spec, architecture = FAMILIES[family]
    d, x = made(spec), torch.randn(17, 7)
    write_dictionary(d, tmp_path, "saelens", {"model": {"id": "openai-community/gpt2"}, "hook": "transformer.h.2:out"})
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert (cfg["architecture"], cfg["metadata"]["hook_name"]) == (architecture, "blocks.2.hook_resid_post")
    torch.testing.assert_close(read_dictionary(tmp_path).dictionary(x), d(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("family", ["relu", "jumprelu", "mutual_choice"])
def test_transcoders_have_one_too(family, skip, tmp_path):
    d, x = made(FAMILIES[family][0], "transcoder", skip), torch.randn(17, 7)
    write_dictionary(d, tmp_path, "saelens")
    torch.testing.assert_close(read_dictionary(tmp_path).dictionary(x), d(x), rtol=1e-5, atol=1e-5)


def test_what_saelens_cannot_hold_is_refused_with_a_reason(tmp_path):
    for d, reason in (
        (
            made({"name": "topk", "k": 3}, "transcoder"),
            "expected a transcoder with relu or jumprelu, got topk. Use --to circuit_tracer",
        ),
        (made({"name": "matching_pursuit", "k": 3, "tolerance": 0.1}), "Set tolerance to 0"),
        (made({"name": "signed_topk", "k": 3}), "its topk applies relu"),
        (made({"name": "group_max", "k": 19}), "there is no equivalent. Use --to sparsify"),
        (CrossLayerTranscoder(2, 8, 8, 26, build_encoder({"name": "relu"})).eval(), "no cross-layer transcoders"),
    ):
        with pytest.raises(ValueError, match=reason):
            write_dictionary(d, tmp_path / "out", "saelens")
        assert not (tmp_path / "out").exists()


def copied(case, tmp_path, **changes):
    """A golden folder with changes to its configuration."""
    shutil.copytree(GOLDEN / case, tmp_path / case)
    path = tmp_path / case / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return tmp_path / case


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"W_enc": torch.zeros(24, 8)}, r"W_enc: expected shape \(8, 24\), got \(24, 8\)"),
        ({"W_dec": torch.zeros(8, 24)}, r"W_dec: expected shape \(24, 8\), got \(8, 24\)"),
        ({"b_dec": torch.zeros(24)}, r"b_dec: expected shape \(8\), got \(24,\)"),
        ({"threshold": torch.zeros(1)}, r"threshold: expected shape \(24\), got \(1,\)"),
        ({"threshold": torch.full((24,), torch.nan)}, r"threshold: expected finite numbers, got nan at \[0\]"),
        ({"b_enc": torch.zeros(24, dtype=torch.int32)}, "b_enc: expected floating-point numbers, got torch.int32"),
        ({"b_enc": None}, "b_enc missing among W_dec, W_enc, b_dec, threshold"),
        ({"W_skip": torch.zeros(8, 8)}, "of jumprelu, got also W_skip"),
    ],
)
def test_damaged_tensors_are_named(damage, says, tmp_path):
    folder = copied("jumprelu-none", tmp_path)
    tensors = load_file(folder / "sae_weights.safetensors") | damage
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "sae_weights.safetensors")
    with pytest.raises(ValueError, match=says):
        read_dictionary(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"d_in": "8"}, "d_in: expected a whole number in cfg.json, got '8'"),
        ({"d_sae": 25}, r"expected shape \(8, 25\), got \(8, 24\)"),
        ({"k": "5"}, "k: expected a whole number from 1, got '5'"),
        ({"k": None}, "k: expected the number of latents per token, found none"),
        ({"k": 25}, "k: expected at most the 24 latents there are, got 25"),
    ],
)
def test_damaged_configurations_are_named(changes, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        read_dictionary(copied("topk-none", tmp_path, **changes))


def test_a_folder_without_weights_says_so(tmp_path):
    folder = copied("topk-none", tmp_path)
    (folder / "sae_weights.safetensors").unlink()
    with pytest.raises(ValueError, match=r"sae_weights\.safetensors: expected this file, found none"):
        read_dictionary(folder)


@pytest.mark.parametrize("case", ["jumprelu-none", "abstopk-none", "gated-none"])
def test_gradients_pass_through_matrices_that_lie_transposed(case):
    d = read_dictionary(GOLDEN / case).dictionary.double()
    d.W_enc.data = d.W_enc.data.T.contiguous().T
    assert not d.W_enc.is_contiguous()
    gradients = []
    x = torch.randn(9, 8, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        y = d(x)
        gradients.append(torch.autograd.grad(y.pow(2).sum(), [x, d.W_enc, d.W_dec, d.b_dec]))
        d.W_enc.data = d.W_enc.data.contiguous()
    for mapped, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(mapped, plain)


def test_a_checkpoint_without_its_scale_is_refused_until_it_is_given(tmp_path):
    folder = copied("standard_training", tmp_path)
    (folder / "activation_scaler.json").unlink()
    with pytest.raises(ValueError, match=r"activation_scaler.json beside it, found none.*scale=NUMBER"):
        read_dictionary(folder)
    expected = load_file(folder / "expected.safetensors")
    given = read_dictionary(folder, options=ReadOptions(scale=0.37)).dictionary
    torch.testing.assert_close(given(expected["x"]), expected["y"], rtol=1e-5, atol=1e-5)


def test_a_threshold_never_measured_is_refused(tmp_path):
    folder = copied("batchtopk_training", tmp_path)
    weights = load_file(folder / "sae_weights.safetensors") | {"topk_threshold": torch.zeros((), dtype=torch.float64)}
    save_file(weights, folder / "sae_weights.safetensors")
    with pytest.raises(ValueError, match=r"topk_threshold: .* got 0.0. Give it as threshold=NUMBER"):
        read_dictionary(folder)


def test_unknown_architectures_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"architecture: expected one of standard, topk, .* got 'crosscoder'"):
        read_dictionary(copied("standard-none", tmp_path, architecture="crosscoder"))
    with pytest.raises(ValueError, match="attends to earlier tokens"):
        read_dictionary(copied("topk-none", tmp_path, architecture="temporal"))
    with pytest.raises(ValueError, match=r"normalize_activations: expected one of none, .* got 'batch'"):
        read_dictionary(copied("gated-none", tmp_path, normalize_activations="batch"))


def test_a_transcoder_does_not_subtract_its_output_bias(tmp_path):
    with pytest.raises(ValueError, match="expected false for a transcoder"):
        read_dictionary(copied("transcoder-none", tmp_path, apply_b_dec_to_input=True))


def test_declared_and_actual_dtype_are_compared(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        loaded = read_dictionary(copied("standard-none", tmp_path, dtype="torch.bfloat16"))
    assert "cfg.json says bfloat16, the tensors are float32" in caplog.text
    assert loaded.dictionary.W_dec.dtype == torch.float32


def test_bfloat16_computes_in_float32_unless_asked_not_to():
    assert read_dictionary(GOLDEN / "jumprelu-bfloat16").dictionary.W_enc.dtype == torch.float32
    kept = read_dictionary(GOLDEN / "jumprelu-bfloat16", dtype=None).dictionary
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    assert kept(torch.randn(3, 8)).dtype == torch.bfloat16


def test_matrices_stay_the_file_s_unless_they_lie_transposed():
    """Copied is only what has no contiguous rows: the rest of a dictionary takes no memory but its file's, which is mapped."""
    n = read_canonical(SourceFiles(GOLDEN / "standard-none"))
    d = to_dictionary(n)
    assert n.W_enc.T.is_contiguous()
    assert d.W_enc.is_contiguous()
    assert d.W_dec.data_ptr() == n.W_dec.data_ptr()
    assert d.W_dec.is_contiguous()
    # In-place changes are ours alone.
    with torch.no_grad():
        d.W_dec.zero_()
    assert read_dictionary(GOLDEN / "standard-none").dictionary.W_dec.any()


def test_several_in_one_folder_are_told_apart_by_hook(tmp_path):
    for layer in (2, 10):
        about = {"model_name": "gpt2-small", "hook_name": f"blocks.{layer}.hook_resid_post", "sae_lens_version": "6.54.12"}
        copied("topk-none", tmp_path / f"layer_{layer}", metadata=about)
    loaded = read_dictionary(tmp_path)
    assert list(loaded.dictionaries) == ["transformer.h.2:out", "transformer.h.10:out"]
    one = read_dictionary(tmp_path, options=ReadOptions(hook="transformer.h.10:out"))
    assert one.provenance["hook"] == "transformer.h.10:out"
    assert one.dictionary.n_latents == 24
    with pytest.raises(ValueError, match=re.escape("hook: expected one of transformer.h.2:out, transformer.h.10:out")):
        read_dictionary(tmp_path, options=ReadOptions(hook="transformer.h.4:out"))
    with pytest.raises(ValueError, match="because there are several"):
        _ = loaded.dictionary


def test_the_shared_dictionary_gives_its_reference(shared_data):
    folder = shared_data / "saes"
    reference = load_file(folder / "stories3M_L3_topk16_reference.safetensors")
    loaded = read_dictionary(folder / "stories3M_L3_topk16_saelens")
    code = loaded.dictionary.encode(reference["x"])
    torch.testing.assert_close(code.to_dense(768), reference["z"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loaded.dictionary.decode(code), reference["r"], rtol=1e-5, atol=1e-5)
    assert loaded.provenance["hook"] == "model.layers.3:out"
