"""sparsify: its folders give its outputs, older ones what they then meant, and what we write reads back the same.

The golden folders were made by the library itself: tests/parity/reference_formats_sparsify.py.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsary.sae import SAE
from sparsary.sae.encoders import build_encoder
from sparsary.sae.formats import ReadOptions, read_dictionary, write_dictionary
from sparsary.sae.formats.sparsify import folder_name, module_path
from sparsary.transcoders import CrossLayerTranscoder, Transcoder

GOLDEN = Path(__file__).parents[2] / "golden" / "formats" / "sparsify"
CASES = sorted(str(path.parent.relative_to(GOLDEN)) for path in GOLDEN.rglob("sae.safetensors"))


def test_the_golden_files_are_all_there():
    about = json.loads((GOLDEN / "header.json").read_text())
    assert (about["library"], about["version"], len(CASES)) == ("eai-sparsify", "1.3.3", 12)


@pytest.mark.parametrize("case", CASES)
def test_what_sparsify_wrote_gives_its_outputs(case):
    expected = load_file(GOLDEN / case / "expected.safetensors")
    loaded = read_dictionary(GOLDEN / case)
    d = loaded.dictionary
    code = d.encode(expected["x"])
    y, theirs = d.decode(code, expected["x"]), expected["y"].float()
    if "bfloat16" in case:
        # They compute in it, we do not.
        assert (y - theirs).norm() / theirs.norm() < 1e-2
        return
    torch.testing.assert_close(y, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(code.to_dense(24), expected["code"], rtol=1e-5, atol=1e-5)
    assert (d.arguments()["kind"] == "transcoder") == (".mlp" in case)
    assert loaded.warnings == ()


@pytest.mark.parametrize("case", CASES)
def test_written_then_read_again_changes_nothing(case, tmp_path):
    first = read_dictionary(GOLDEN / case)
    x = load_file(GOLDEN / case / "expected.safetensors")["x"]
    write_dictionary(first.dictionary, tmp_path, "sparsify", first.provenance)
    again = read_dictionary(tmp_path)
    torch.testing.assert_close(again.dictionary(x), first.dictionary(x), rtol=1e-5, atol=1e-5)
    for key in ("model", "hooks_in", "hooks_out", "text"):
        assert again.provenance[key] == first.provenance[key]


def test_a_folder_s_name_is_the_module():
    found = read_dictionary(GOLDEN / "skip").provenance
    assert (found["hooks_in"], found["hooks_out"]) == (["gpt_neox.layers.3.mlp:in"], ["gpt_neox.layers.3.mlp:out"])
    assert found["model"] == {"id": "EleutherAI/pythia-70m-deduped"}
    assert found["text"] == {"context_length": 128}
    several = read_dictionary(GOLDEN / "several")
    assert list(several.dictionaries) == [f"gpt_neox.layers.{layer}:out" for layer in (1, 2, 10)]
    one = read_dictionary(GOLDEN / "several", options=ReadOptions(hook="gpt_neox.layers.10:out")).dictionary
    assert one.arguments()["encoder"]["k"] == 3
    assert read_dictionary(GOLDEN / "several", options=ReadOptions(hook="layers.2")).dictionary.arguments()["encoder"]["k"] == 4


def test_seeds_are_of_one_module():
    with pytest.raises(ValueError, match=r"got two for gpt_neox.layers.1:out. Load them one by one"):
        read_dictionary(GOLDEN / "seeds")
    hooks = [read_dictionary(GOLDEN / "seeds" / "layers.1" / f"seed{i}").provenance["hook"] for i in (0, 1)]
    assert hooks == ["gpt_neox.layers.1:out"] * 2


@pytest.mark.parametrize(
    ("name", "model", "path"),
    [
        ("h.3", None, "transformer.h.3"),
        ("h.3.mlp", "gpt2", "transformer.h.3.mlp"),
        ("layers.3", None, None),
        ("layers.3.mlp", "meta-llama/Llama-3.2-1B", "model.layers.3.mlp"),
        ("layers.3", "EleutherAI/pythia-160m", "gpt_neox.layers.3"),
        ("layers.3.self_attn", None, "model.layers.3.self_attn"),
        ("layers.3.attention.dense", None, "gpt_neox.layers.3.attention.dense"),
        ("h.3", "EleutherAI/pythia-160m", None),
        ("model.layers.3", None, "model.layers.3"),
        ("run_7", "gpt2", None),
    ],
)
def test_modules_are_within_the_base_transformer(name, model, path):
    assert module_path(name, model) == path
    if path is not None and not name.startswith("model."):
        assert folder_name(f"{path}:out") == name


def copied(case, tmp_path, changes=None, tensors=None):
    """A golden folder with changes to its configuration and tensors; ``None`` takes one out."""
    folder = tmp_path / Path(case).name
    shutil.copytree(GOLDEN / case, folder)
    cfg = json.loads((folder / "cfg.json").read_text()) | (changes or {})
    (folder / "cfg.json").write_text(json.dumps({key: value for key, value in cfg.items() if value is not None}))
    found = load_file(folder / "sae.safetensors") | (tensors or {})
    save_file({key: t.contiguous() for key, t in found.items() if t is not None}, folder / "sae.safetensors")
    return folder


def given(case):
    return load_file(GOLDEN / case / "sae.safetensors"), load_file(GOLDEN / case / "expected.safetensors")


@pytest.mark.parametrize("turned", [False, True])
def test_old_names_are_read_by_their_shapes(turned, tmp_path):
    tensors, expected = given("topk/layers.3")
    W_enc, W_dec = tensors["encoder.weight"], tensors["W_dec"]
    old = {"W_enc": W_enc.T if turned else W_enc, "decoder.weight": W_dec.T if turned else W_dec}
    folder = copied("topk/layers.3", tmp_path, tensors=old | {"encoder.weight": None, "W_dec": None})
    loaded = read_dictionary(folder)
    torch.testing.assert_close(loaded.dictionary(expected["x"]), expected["y"], rtol=1e-5, atol=1e-5)
    assert f"decoder.weight {'transposed to' if turned else 'renamed'} W_dec" in loaded.notes


def test_a_square_matrix_of_an_old_name_is_refused(tmp_path):
    square = {"W_dec": None, "decoder.weight": torch.eye(8), "encoder.weight": torch.eye(8), "encoder.bias": torch.zeros(8)}
    folder = copied("topk/layers.3", tmp_path, {"num_latents": 8}, square)
    with pytest.raises(ValueError, match=r"the orientation of a square decoder.weight is ambiguous"):
        read_dictionary(folder)


def test_missing_biases_are_zeros(tmp_path):
    tensors, expected = given("topk/layers.3")
    loaded = read_dictionary(copied("topk/layers.3", tmp_path, tensors={"encoder.bias": None, "b_dec": None}))
    p = (expected["x"] @ tensors["encoder.weight"].T).relu()
    best = p.topk(5, dim=-1)
    y = torch.zeros_like(p).scatter_(1, best.indices, best.values) @ tensors["W_dec"]
    torch.testing.assert_close(loaded.dictionary(expected["x"]), y, rtol=1e-5, atol=1e-5)
    assert {"b_enc missing, zeros", "b_dec missing, zeros"} <= set(loaded.notes)


def test_early_transcoders_may_have_subtracted_their_output_bias(tmp_path):
    tensors, expected = given("skip/layers.3.mlp")
    folder = copied("skip/layers.3.mlp", tmp_path, {"activation": None})
    now = read_dictionary(folder)
    assert "before February 2025 b_dec was also subtracted" in now.warnings[0]
    torch.testing.assert_close(now.dictionary(expected["x"]), expected["y"], rtol=1e-5, atol=1e-5)
    then = read_dictionary(folder, options=ReadOptions(subtract_b_dec=True))
    assert not then.warnings
    p = ((expected["x"] - tensors["b_dec"]) @ tensors["encoder.weight"].T + tensors["encoder.bias"]).relu()
    best = p.topk(5, dim=-1)
    y = torch.zeros_like(p).scatter_(1, best.indices, best.values) @ tensors["W_dec"] + tensors["b_dec"]
    y += expected["x"] @ tensors["W_skip"].T
    torch.testing.assert_close(then.dictionary(expected["x"]), y, rtol=1e-5, atol=1e-5)


def test_signed_latents_of_old_versions_keep_their_sign(tmp_path):
    tensors, expected = given("topk/layers.3")
    d = read_dictionary(copied("topk/layers.3", tmp_path, {"signed": True})).dictionary
    p = (expected["x"] - tensors["b_dec"]) @ tensors["encoder.weight"].T + tensors["encoder.bias"]
    best = p.abs().topk(5, dim=-1).indices
    code = torch.zeros_like(p).scatter_(1, best, p.gather(1, best))
    assert (code < 0).any()
    torch.testing.assert_close(d.encode(expected["x"]).to_dense(24), code, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"activation": "relu"}, "activation: expected one of topk, groupmax, got 'relu'"),
        ({"activation": ["topk"]}, r"activation: expected one of topk, groupmax, got \['topk'\]"),
        ({"num_latents": None, "expansion_factor": [1]}, "num_latents: expected a whole number"),
        ({"k": None}, "k: expected the number of latents per token, found none"),
        ({"k": 25}, "k: expected at most the 24 latents there are, got 25"),
        ({"activation": "groupmax", "k": 7}, "k: expected a divisor of the 24 latents for groupmax, got 7"),
        ({"d_in": None}, "d_in: expected a whole number in cfg.json, got None"),
        ({"num_latents": 10**13}, r"encoder.weight: expected shape \(10000000000000, 8\), got \(24, 8\)"),
        ({"num_latents": None, "expansion_factor": None, "normalize_decoder": True}, "num_latents: expected a whole number"),
        ({"skip_connection": True}, "skip_connection: True in cfg.json contradicts the file, which has no W_skip"),
    ],
)
def test_damaged_configurations_are_named(changes, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        read_dictionary(copied("topk/layers.3", tmp_path, changes))


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"encoder.weight": torch.zeros(8, 24)}, r"encoder.weight: expected shape \(24, 8\), got \(8, 24\)"),
        ({"W_dec": torch.zeros(8, 24)}, r"W_dec: expected shape \(24, 8\), got \(8, 24\)"),
        ({"W_dec": None}, "expected W_dec; W_dec missing among"),
        ({"decoder.weight": torch.zeros(24, 8)}, "expected one of W_dec, decoder.weight, got W_dec and decoder.weight"),
        ({"encoder.bias": torch.full((24,), torch.inf)}, "b_enc: expected finite numbers, got inf"),
        ({"b_dec": torch.zeros(8, dtype=torch.int32)}, "b_in: expected floating-point|b_out: expected floating-point"),
        ({"W_skip": torch.zeros(8, 8)}, "skip_connection: False in cfg.json contradicts the file, which has W_skip"),
        ({"gate": torch.zeros(8)}, "got also gate"),
    ],
)
def test_damaged_tensors_are_named(tensors, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        read_dictionary(copied("topk/layers.3", tmp_path, tensors=tensors))


def test_a_truncated_file_is_named(tmp_path):
    folder = copied("topk/layers.3", tmp_path)
    path = folder / "sae.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"sae\.safetensors"):
        read_dictionary(folder)


def test_families_that_keep_k_latents_have_a_counterpart(tmp_path):
    for i, (spec, activation) in enumerate(
        (
            ({"name": "topk", "k": 4}, "topk"),
            ({"name": "gradient_topk", "k": 4, "beta": 1.0}, "topk"),
            ({"name": "group_max", "k": 4}, "groupmax"),
        )
    ):
        for subtracts in (True, False):
            d = SAE(8, 20, build_encoder(spec), apply_b_dec_to_input=subtracts)
            with torch.no_grad():
                d.b_enc.normal_()
                d.b_dec.normal_()
            d.in_scale.fill_(1.7)
            d.out_scale.fill_(1.7)
            folder, x = tmp_path / f"{i}{subtracts}", torch.randn(13, 8)
            write_dictionary(d.eval(), folder, "sparsify", {"hook": "model.layers.2:out", "model": {"id": "Qwen/Qwen3-0.6B"}})
            assert json.loads((folder / "layers.2" / "cfg.json").read_text())["activation"] == activation
            torch.testing.assert_close(read_dictionary(folder).dictionary(x), d(x), rtol=1e-5, atol=1e-5)
            # Its Trainer normalises them before the first step.
            norms = load_file(folder / "layers.2" / "sae.safetensors")["W_dec"].norm(dim=1)
            torch.testing.assert_close(norms, torch.ones(20))


def test_transcoders_have_one_too(tmp_path):
    d = Transcoder(8, 8, 24, build_encoder({"name": "topk", "k": 4}), True)
    with torch.no_grad():
        for parameter in d.parameters():
            parameter.normal_()
        d.in_centre.normal_()
    d.in_scale.fill_(1.7)
    d.out_scale.fill_(0.6)
    about = {"hooks_in": ["transformer.h.2.mlp:in"], "hooks_out": ["transformer.h.2.mlp:out"]}
    write_dictionary(d.eval(), tmp_path, "sparsify", about)
    again, x = read_dictionary(tmp_path), torch.randn(13, 8)
    torch.testing.assert_close(again.dictionary(x), d(x), rtol=1e-5, atol=1e-5)
    assert (again.provenance["hooks_in"], again.provenance["hooks_out"]) == tuple(about.values())


def test_what_sparsify_cannot_hold_is_refused_with_a_reason(tmp_path):
    relu, topk = build_encoder({"name": "relu"}), build_encoder({"name": "topk", "k": 3})
    for d, reason in (
        (
            SAE(8, 24, relu),
            "relu: it keeps the same number of latents for every token. Use --to dictionary_learning or saelens",
        ),
        (SAE(8, 24, build_encoder({"name": "threshold"})), "threshold: it keeps the same number"),
        (SAE(8, 24, build_encoder({"name": "gated"})), "gated: it has no gated encoder"),
        (SAE(8, 24, build_encoder({"name": "signed_topk", "k": 3})), "topk_raw: its topk applies relu"),
        (SAE(8, 24, build_encoder({"name": "matching_pursuit", "k": 3})), "it has no matching pursuit"),
        (SAE(8, 24, topk, row_norm="layer_norm"), "row_norm: expected null, as the library has none, got layer_norm"),
        (Transcoder(8, 8, 24, relu), "Use --to circuit_tracer"),
        (Transcoder(8, 5, 24, topk), "expected d_out = d_in = 8, .* got d_out = 5"),
        (CrossLayerTranscoder(2, 8, 8, 26, relu), "no cross-layer transcoders that it can load"),
    ):
        with pytest.raises(ValueError, match=reason):
            write_dictionary(d.eval(), tmp_path / "out", "sparsify")
        assert not (tmp_path / "out").exists()


def test_the_shared_dictionary_gives_its_reference(shared_data):
    folder = shared_data / "saes"
    reference = load_file(folder / "stories3M_L3_topk16_reference.safetensors")
    forms = ("sparsify", "saelens", "dictionary_learning")
    ours = [read_dictionary(folder / f"stories3M_L3_topk16_{form}").dictionary for form in forms]
    for d in ours:
        code = d.encode(reference["x"])
        torch.testing.assert_close(code.to_dense(768), reference["z"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(d.decode(code), reference["r"], rtol=1e-5, atol=1e-5)
    x = 3 * torch.randn(50, 192)
    for d in ours[1:]:
        torch.testing.assert_close(d(x), ours[0](x), rtol=1e-5, atol=1e-5)
