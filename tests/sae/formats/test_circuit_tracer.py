"""circuit-tracer: files that it wrote give its outputs, and what we write reads back the same.

The golden folders were made by circuit-tracer itself: tests/parity/reference_formats_circuit_tracer.py.
"""

import json
import logging
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparsary
from sparsary.sae import SAE
from sparsary.sae.encoders import build_encoder
from sparsary.sae.formats import ReadOptions, SourceFiles, read_canonical, read_dictionary, write_dictionaries, write_dictionary
from sparsary.transcoders import CrossLayerTranscoder, Transcoder
from sparsary.transcoders.load import load
from sparsary.transcoders.stack import Stack

GOLDEN = Path(__file__).parents[2] / "golden" / "formats" / "circuit_tracer"
SETS = sorted(path.name for path in GOLDEN.glob("set_*"))
ACROSS = sorted(path.name for path in GOLDEN.glob("across_*"))
LAYERS, D, LATENTS = 3, 8, 24


def close(case, ours, theirs):
    if "bfloat16" in case:
        # They compute in it, we do not: single thresholds are met differently.
        assert (ours - theirs.float()).norm() / theirs.float().norm() < 1e-2
    else:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def beside(x):
    """Layers by tokens by width -> tokens by the layers' widths beside each other."""
    return x.transpose(0, 1).flatten(1)


def test_the_golden_files_are_all_there():
    about = json.loads((GOLDEN / "header.json").read_text())
    assert (about["library"], about["version"]) == ("circuit-tracer", "0.5.0")
    assert (len(SETS), len(ACROSS)) == (6, 3)


@pytest.mark.parametrize("case", SETS)
def test_a_set_gives_its_outputs(case):
    expected = load_file(GOLDEN / case / "expected.safetensors")
    stack = load(GOLDEN / case)
    assert isinstance(stack, Stack)
    assert list(stack) == [f"transformer.h.{i}.mlp:out" for i in range(LAYERS)]
    for i, d in enumerate(stack.values()):
        code = d.encode(expected["x"][i])
        close(case, d.decode(code, expected["x"][i]), expected["y"][i])
        close(case, code.to_dense(LATENTS), expected["code"][i])
    assert 0.02 < (expected["code"] != 0).float().mean() < 0.9
    # Only without a rectifier.
    assert bool((expected["code"] < 0).any()) == (case == "set_topk")
    assert stack["transformer.h.1.mlp:in"] is stack["transformer.h.1.mlp:out"]


@pytest.mark.parametrize("case", ACROSS)
def test_one_across_layers_gives_its_outputs(case):
    expected = load_file(GOLDEN / case / "expected.safetensors")
    loaded = read_dictionary(GOLDEN / case)
    d, x = loaded.dictionary, beside(expected["x"])
    assert isinstance(d, CrossLayerTranscoder)
    close(case, d(x), beside(expected["y"]))
    close(case, d.encode(x).to_dense(LAYERS * LATENTS), beside(expected["code"]))
    # Layer by layer, as a model runs it.
    codes = [d.encode_at(i, expected["x"][i]) for i in range(LAYERS)]
    for i in range(LAYERS):
        close(case, d.decode_at(i, codes), expected["y"][i])
    assert loaded.provenance["hooks_out"] == [f"transformer.h.{i}.mlp:out" for i in range(LAYERS)]
    assert loaded.provenance["model"] == {"id": "openai-community/gpt2"}


@pytest.mark.parametrize("case", [case for case in SETS if case != "set_topk"])
def test_a_set_written_then_read_again_changes_nothing(case, tmp_path):
    first = read_dictionary(GOLDEN / case)
    write_dictionaries(first.dictionaries, tmp_path, "circuit_tracer", first.provenances)
    again = read_dictionary(tmp_path)
    x = load_file(GOLDEN / case / "expected.safetensors")["x"]
    for i, (hook, d) in enumerate(first.dictionaries.items()):
        torch.testing.assert_close(again.dictionaries[hook](x[i]), d(x[i]), rtol=1e-5, atol=1e-5)
        for key in ("model", "hooks_in", "hooks_out"):
            assert again.provenances[hook].get(key) == first.provenances[hook].get(key)


@pytest.mark.parametrize("case", ACROSS)
def test_one_across_layers_written_then_read_again_changes_nothing(case, tmp_path):
    first = read_dictionary(GOLDEN / case)
    write_dictionary(first.dictionary, tmp_path, "circuit_tracer", first.provenance)
    again = read_dictionary(tmp_path)
    x = beside(load_file(GOLDEN / case / "expected.safetensors")["x"])
    torch.testing.assert_close(again.dictionary(x), first.dictionary(x), rtol=1e-5, atol=1e-5)
    assert again.provenance["hooks_in"] == first.provenance["hooks_in"]


def test_sparsary_load_takes_a_set_and_one_of_it(assert_same_tensors):
    stack = sparsary.load(GOLDEN / "set_relu")
    one = sparsary.load(GOLDEN / "set_relu", hook="transformer.h.2.mlp:out")
    assert_same_tensors(one, stack["transformer.h.2.mlp:out"])
    assert_same_tensors(sparsary.load(GOLDEN / "set_relu", hook="blocks.2.hook_mlp_out"), one)


def about(layer, model="openai-community/gpt2"):
    return {
        "model": {"id": model},
        "hooks_in": [f"transformer.h.{layer}.mlp:in"],
        "hooks_out": [f"transformer.h.{layer}.mlp:out"],
    }


def transcoder(spec, skip=False, width=D, batches=3):
    """A transcoder of ours with scales and a centre; thresholds are those of a few batches."""
    d = Transcoder(D, width, LATENTS, build_encoder(spec), skip)
    with torch.no_grad():
        for parameter in (p for name, p in d.named_parameters() if "log" not in name):
            parameter.normal_()
        d.renormalize()
        d.in_centre.normal_()
        d.in_scale.fill_(1.7)
        d.out_scale.fill_(0.6)
    for _ in range(batches):
        d.encode(torch.randn(13, D))
    return d.eval()


TOPK = {"name": "topk", "k": 15}
SPECS = {
    "relu": {"name": "relu"},
    "jumprelu": {"name": "jumprelu", "target_l0": 4},
    "batch_topk": {"name": "batch_topk", "k": 4},
    "mutual_choice": {"name": "mutual_choice", "k": 4},
}


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("family", SPECS)
def test_stacks_of_ours_have_a_counterpart(family, skip, tmp_path):
    members = {f"transformer.h.{i}.mlp:out": transcoder(SPECS[family], skip) for i in (1, 0)}
    provenances = {f"transformer.h.{i}.mlp:out": about(i) for i in (1, 0)}
    write_dictionaries(members, tmp_path, "circuit_tracer", provenances)
    x, again = torch.randn(17, D), read_dictionary(tmp_path)
    assert list(again.dictionaries) == ["transformer.h.0.mlp:out", "transformer.h.1.mlp:out"]
    for hook, d in members.items():
        torch.testing.assert_close(again.dictionaries[hook](x), d(x), rtol=1e-5, atol=1e-5)
        assert torch.equal(
            again.dictionaries[hook].encode(x).to_dense(99)[:, :LATENTS] != 0, d.encode(x).to_dense(99)[:, :LATENTS] != 0
        )
    config = SourceFiles(tmp_path).config("config.yaml")
    assert (config["model_name"], config["feature_input_hook"]) == ("gpt2-small", "mlp.hook_in")
    assert "activation" not in config


def cross_layer(spec, joint=False):
    d = CrossLayerTranscoder(LAYERS, LAYERS * D, LAYERS * D, LAYERS * LATENTS, build_encoder(spec), joint)
    with torch.no_grad():
        for parameter in (p for name, p in d.named_parameters() if "log" not in name):
            parameter.normal_()
        d.renormalize()
        d.in_centre.normal_()
        d.in_scale.copy_(torch.tensor([1.7, 0.4, 2.2]).repeat_interleave(D))
        d.out_scale.copy_(torch.tensor([0.6, 3.1, 1.3]).repeat_interleave(D))
    for _ in range(3):
        d.encode(torch.randn(13, LAYERS * D))
    return d.eval()


def about_all():
    return {key: [about(i)[key][0] for i in range(LAYERS)] for key in ("hooks_in", "hooks_out")} | {"model": about(0)["model"]}


@pytest.mark.parametrize(("spec", "joint"), [(SPECS["relu"], False), (SPECS["jumprelu"], False), (TOPK, True)])
def test_cross_layer_ones_of_ours_have_a_counterpart(spec, joint, tmp_path):
    d, x = cross_layer(spec, joint), torch.randn(17, LAYERS * D)
    write_dictionary(d, tmp_path, "circuit_tracer", about_all())
    again = read_dictionary(tmp_path).dictionary
    torch.testing.assert_close(again(x), d(x), rtol=1e-5, atol=1e-4)
    assert torch.equal(again.encode(x).to_dense(d.n_latents) != 0, d.encode(x).to_dense(d.n_latents) != 0)
    assert 0.02 < (d.encode(x).to_dense(d.n_latents) != 0).float().mean() < 0.9
    assert load_file(tmp_path / "W_dec_1.safetensors")["W_dec_1"].shape == (LATENTS, LAYERS - 1, D)


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({0: {"name": "gated"}}, "gated: it has no gate with separate weights"),
        ({0: {"name": "matching_pursuit", "k": 3}}, "pursuit: it encodes by one matrix product"),
        ({0: {"name": "group_max", "k": 4}}, "group_max: .* Use --to sparsify"),
        ({0: {"name": "signed_topk", "k": 4, "by": "size"}}, "abs_topk: its topk ranks by value, not by absolute value"),
        ({1: SPECS["relu"]}, "expected a transcoder for each layer from 0, got layers 1"),
        ({0: SPECS["relu"], 1: SPECS["jumprelu"]}, "expected the same gate and number of latents"),
        # Its version 0.5.0 reads topk as relu: 9,689 latents where 1,216 were meant.
        ({0: TOPK}, "topk: version 0.5.0 reads it as relu.*--calibrate TOKENS"),
        ({0: {"name": "gradient_topk", "k": 3, "beta": 1.0}}, "topk: version 0.5.0 reads it as relu"),
        ({0: {"name": "signed_topk", "k": 15}}, "topk_raw: version 0.5.0 reads it as relu"),
    ],
)
def test_sets_that_it_cannot_hold_are_refused_with_a_reason(members, says, tmp_path):
    built = {str(i): transcoder(spec, batches=0) for i, spec in members.items()}
    with pytest.raises(ValueError, match=f"circuit_tracer: (cannot represent )?{says}"):
        write_dictionaries(built, tmp_path / "out", "circuit_tracer", {key: about(key) for key in built})
    assert not (tmp_path / "out").exists()


def test_single_dictionaries_that_it_cannot_hold_are_refused_with_a_reason(tmp_path):
    elsewhere = about(0) | {"hooks_in": ["somewhere.else:in"]}
    for d, provenance, says in (
        (SAE(D, LATENTS, build_encoder(SPECS["relu"])), about(0), "expected transcoders, got an autoencoder"),
        (transcoder(SPECS["relu"], width=5), about(0), "expected d_out = d_in = 8, .* got d_out = 5"),
        (transcoder(SPECS["relu"]), {}, "expected a transcoder for each layer from 0, got layers None"),
        (transcoder(SPECS["relu"]), elsewhere, r"with names in TransformerLens, got None -> hook_mlp_out"),
        (cross_layer(TOPK), about_all(), "expected relu or jumprelu in a cross-layer transcoder, got topk, which no threshold"),
    ):
        with pytest.raises(ValueError, match=says):
            write_dictionary(d.eval(), tmp_path / "out", "circuit_tracer", provenance)
        assert not (tmp_path / "out").exists()


def test_what_other_libraries_keep_in_one_folder_each_is_written_so(tmp_path):
    members = {f"transformer.h.{i}.mlp:out": transcoder(SPECS["relu"]) for i in range(2)}
    write_dictionaries(members, tmp_path, "saelens", {hook: about(hook.split(".")[2]) for hook in members})
    again = read_dictionary(tmp_path).dictionaries
    x = torch.randn(5, D)
    for hook, d in members.items():
        torch.testing.assert_close(again[hook](x), d(x), rtol=1e-5, atol=1e-5)


def test_inputs_before_a_norm_s_gain_are_read_from_before_the_norm(tmp_path):
    llama = "meta-llama/Llama-3.2-1B"
    shutil.copytree(GOLDEN / "set_jumprelu", tmp_path / "set")
    config = (
        "model_kind: transcoder_set\nfeature_input_hook: ln2.hook_normalized\nfeature_output_hook: hook_mlp_out\nmodel_name: "
    )
    (tmp_path / "set" / "config.yaml").write_text(config + llama)
    loaded = read_dictionary(tmp_path / "set")
    hook = "model.layers.1.mlp:out"
    assert loaded.provenances[hook]["hooks_in"] == ["model.layers.1.post_attention_layernorm:in"]
    x = 3 * torch.randn(9, D) + 1
    normed = x / x.pow(2).mean(1, keepdim=True).sqrt()
    plain = read_dictionary(GOLDEN / "set_jumprelu").dictionaries["transformer.h.1.mlp:out"]
    torch.testing.assert_close(loaded.dictionaries[hook](x), plain(normed), rtol=1e-5, atol=1e-5)
    # And back.
    write_dictionaries(loaded.dictionaries, tmp_path / "again", "circuit_tracer", loaded.provenances)
    assert SourceFiles(tmp_path / "again").config("config.yaml")["feature_input_hook"] == "ln2.hook_normalized"
    assert torch.equal(
        load_file(tmp_path / "again" / "layer_1.safetensors")["W_enc"],
        load_file(tmp_path / "set" / "layer_1.safetensors")["W_enc"],
    )


def test_a_set_without_a_configuration_says_what_is_not_known(tmp_path, caplog):
    shutil.copytree(GOLDEN / "set_relu", tmp_path / "set")
    (tmp_path / "set" / "config.yaml").unlink()
    with caplog.at_level(logging.WARNING):
        loaded = read_dictionary(tmp_path / "set")
    assert list(loaded.dictionaries) == ["layer_0", "layer_1", "layer_2"]
    assert "no config.yaml: hooks and model are not known" in caplog.text
    one = read_dictionary(tmp_path / "set", options=ReadOptions(hook="layer_1"))
    assert one.dictionary.n_latents == LATENTS


def test_a_count_that_is_nowhere_written_may_be_given():
    """One published set is TopK by its repository's name alone."""
    x = load_file(GOLDEN / "set_relu" / "expected.safetensors")["x"][1]
    d = read_dictionary(GOLDEN / "set_relu", options=ReadOptions(k=20)).dictionaries["transformer.h.1.mlp:out"]
    tensors = load_file(GOLDEN / "set_relu" / "layer_1.safetensors")
    p = x @ tensors["W_enc"].T + tensors["b_enc"]
    assert torch.equal(d.encode(x).to_dense(LATENTS) != 0, p >= p.topk(20, dim=-1).values[:, -1:])


def test_sizes_that_a_file_does_not_have_are_not_allocated(tmp_path):
    shutil.copytree(GOLDEN / "set_relu", tmp_path / "a")
    header = json.dumps({"W_enc": {"dtype": "F32", "shape": [1 << 30, 1 << 10], "data_offsets": [0, 1 << 42]}}).encode()
    (tmp_path / "a" / "layer_1.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(
        ValueError, match=r"layer_1.safetensors: expected a safetensors file, got a damaged file or another format"
    ):
        read_dictionary(tmp_path / "a")


def test_a_list_of_files_may_name_local_ones(tmp_path, assert_same_tensors):
    shutil.copytree(GOLDEN / "set_relu", tmp_path / "set")
    config = (tmp_path / "set" / "config.yaml").read_text()
    (tmp_path / "set" / "deep").mkdir()
    for i, place in ((0, "deep/zero.safetensors"), (1, "one.safetensors")):
        (tmp_path / "set" / f"layer_{i}.safetensors").rename(tmp_path / "set" / place)
    path = tmp_path / "set" / "config.yaml"
    path.write_text(config + "transcoders: [deep/zero.safetensors, one.safetensors, layer_2.safetensors]\n")
    ours, plain = read_dictionary(tmp_path / "set").dictionaries, read_dictionary(GOLDEN / "set_relu").dictionaries
    for hook in plain:
        assert_same_tensors(ours[hook], plain[hook])
    for named, says in (
        ("['hf://google/gemma-scope/a.npz', 'hf://b/c/d']", "2 files are in other repositories: hf://google/gemma-scope/a.npz"),
        ("['../../secret.safetensors']", "expected a path within it, got '../../secret.safetensors'"),
        ("[/etc/passwd]", "expected a path within it, got '/etc/passwd'"),
        ("[none.safetensors]", "expected this file, found none"),
        ("[1, 2]", "expected a list of paths"),
        ("[]", "expected a list of paths"),
    ):
        path.write_text(f"{config}transcoders: {named}\n")
        with pytest.raises(ValueError, match=re.escape(says)):
            read_dictionary(tmp_path / "set")


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("layer_1", {"W_enc": torch.zeros(D, LATENTS)}, r"W_enc: expected shape \(24, any\), got \(8, 24\)"),
        ("layer_1", {"W_dec": torch.zeros(D, LATENTS)}, r"W_dec: expected shape \(24, 8\), got \(8, 24\)"),
        ("layer_1", {"b_dec": None}, "b_dec missing among W_dec, W_enc, b_enc"),
        ("layer_1", {"W_extra": torch.zeros(2)}, "got also W_extra"),
        ("layer_1", {"b_enc": torch.full((LATENTS,), torch.nan)}, "b_enc: expected finite numbers, got nan"),
        ("layer_1", {"b_enc": torch.zeros(LATENTS, dtype=torch.long)}, "b_enc: expected floating-point numbers"),
        ("layer_1", {"activation_function.threshold": torch.zeros(3)}, r"expected shape \(24\), got \(3,\)"),
        ("layer_1", {"activation_function.threshold": torch.full((LATENTS,), -1.0)}, "expected numbers from 0, got -1"),
        ("layer_1", {"k": torch.tensor([1, 2])}, r"k: expected shape \(1\), got \(2,\)"),
        ("layer_1", {"k": torch.tensor(2.5)}, "k: expected a whole number from 1, got 2.5"),
        ("layer_1", {"k": torch.tensor(99)}, "k: expected at most the 24 latents"),
        ("layer_1", {"W_skip": torch.zeros(5, 8)}, r"W_skip: expected shape \(8, any\), got \(5, 8\)"),
        ("W_enc_1", {"W_enc_1": torch.zeros(D, LATENTS)}, r"W_enc_1: expected shape \(24, any\), got \(8, 24\)"),
        ("W_enc_1", {"b_dec_1": None}, "expected W_enc_1, b_enc_1, W_dec_1, b_dec_1, got"),
        ("W_enc_1", {"W_skip_1": torch.zeros(D, D)}, "expected no skip path, which circuit-tracer does not support"),
        ("W_enc_1", {"threshold_1": torch.zeros(LATENTS)}, "expected thresholds in all layers or none"),
        ("W_dec_1", {"W_dec_1": torch.zeros(LATENTS, LAYERS, D)}, r"expected shape \(24, 2, 8\), got \(24, 3, 8\)"),
        ("W_dec_1", {"W_dec_1": torch.full((LATENTS, 2, D), torch.inf)}, "layer 1: W_dec: expected finite numbers, got inf"),
    ],
)
def test_damaged_tensors_are_named(file, changes, says, tmp_path):
    shutil.copytree(GOLDEN / ("set_relu" if file.startswith("layer") else "across_relu"), tmp_path / "a")
    path = tmp_path / "a" / f"{file}.safetensors"
    tensors = {key: tensor for key, tensor in (load_file(path) | changes).items() if tensor is not None}
    save_file(tensors, path)
    with pytest.raises(ValueError, match=says):
        read_dictionary(tmp_path / "a")


@pytest.mark.parametrize(
    ("case", "missing", "says"),
    [
        ("set_relu", "layer_1.safetensors", "all layers from 0, got layers 0, 2"),
        ("across_relu", "W_enc_1.safetensors", "all layers from 0, got layers 0, 2"),
        ("across_relu", "W_dec_2.safetensors", "W_dec_2.safetensors: expected this file, found none"),
    ],
)
def test_missing_layers_are_named(case, missing, says, tmp_path):
    shutil.copytree(GOLDEN / case, tmp_path / "a")
    (tmp_path / "a" / missing).unlink()
    with pytest.raises(ValueError, match=says):
        read_dictionary(tmp_path / "a")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model_kind: crosscoder", "model_kind: expected transcoder_set or cross_layer_transcoder, got 'crosscoder'"),
        ("model_kind: transcoder_set\nactivation: swish", "activation: expected topk, jumprelu or relu"),
        ("model_kind: transcoder_set\nactivation: topk", "k: expected the number of latents per token, found none"),
        ("model_kind: transcoder_set\nactivation: jump_relu", "contradict each other"),
        ("model_kind: !!python/object/apply:os.system ['touch x']", "expected YAML"),
        ("model_kind: [transcoder_set", "expected YAML"),
    ],
)
def test_damaged_configurations_are_named(text, says, tmp_path):
    shutil.copytree(GOLDEN / "set_relu", tmp_path / "a")
    (tmp_path / "a" / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=says):
        read_dictionary(tmp_path / "a")


def test_a_choice_among_all_layers_needs_a_threshold(tmp_path):
    """As ByteDance's cross-layer set: no biases, decoder norms beside, k latents per layer and token chosen together."""
    torch.manual_seed(8)
    (tmp_path / "config.json").write_text(json.dumps({"k": 2, "d_feature": LATENTS}))
    W_enc = torch.randn(LAYERS, LATENTS, D)
    W_dec = [torch.randn(LATENTS, LAYERS - i, D) for i in range(LAYERS)]
    for i in range(LAYERS):
        save_file({f"W_enc_{i}": W_enc[i]}, tmp_path / f"W_enc_{i}.safetensors")
        norms = {f"W_dec_norm_{i}": W_dec[i].flatten(1).norm(dim=1)} if i else {}
        save_file({f"W_dec_{i}": W_dec[i], **norms}, tmp_path / f"W_dec_{i}.safetensors")
    with pytest.raises(ValueError, match=r"chosen among all layers at once.*threshold=NUMBER"):
        read_dictionary(tmp_path)
    x = torch.randn(LAYERS, 11, D)
    d = read_dictionary(tmp_path, options=ReadOptions(threshold=10.0)).dictionary
    p = torch.einsum("lbd,lfd->lbf", x, W_enc)
    y = torch.zeros(LAYERS, 11, D)
    for s in range(LAYERS):
        a = p[s] * (p[s] * W_dec[s].flatten(1).norm(dim=1) > 10.0)
        assert 0.02 < (a != 0).float().mean() < 0.5
        for t in range(s, LAYERS):
            y[t] += a @ W_dec[s][:, t - s]
    torch.testing.assert_close(d(beside(x)), beside(y), rtol=1e-5, atol=1e-4)


def test_readers_keep_the_file_s_memory():
    n = read_canonical(SourceFiles(GOLDEN / "across_relu"))
    assert n.layers[0].W_dec.shape == (LATENTS, LAYERS * D)
    assert n.layers[0].W_dec.is_contiguous()
