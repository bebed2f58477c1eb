"""Gemma Scope, both releases: files built after their layout against the equation, and golden ones read by circuit-tracer."""

import io
import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsary.sae import load_dictionary
from sparsary.sae.formats import ReadOptions, SourceFiles, detect, read_dictionary, write_dictionary
from sparsary.transcoders import Crosscoder, CrossLayerTranscoder

GOLDEN = Path(__file__).parents[2] / "golden" / "formats" / "circuit_tracer"
LAYERS, D, LATENTS, D_OUT, TOKENS = 3, 8, 24, 5, 40
RNG = np.random.default_rng


def parameters(d_out=D, seed=0, targets=()):
    """Upper-case, as in the first release: biases not zero, norms not one, thresholds amid what is positive."""
    rng = RNG(seed)
    sizes = {"W_enc": (D, LATENTS), "W_dec": (LATENTS, *targets, d_out), "b_enc": (LATENTS,), "b_dec": (d_out,)}
    found = {name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    return found | {"threshold": np.abs(rng.normal(2, 1, LATENTS)).astype(np.float32)}


def inputs(layers=1):
    return RNG(9).normal(0.7, 1.2, (layers, TOKENS, D)).astype(np.float32)


def activations(found, x):
    p = x @ found["W_enc"] + found["b_enc"]
    a = np.maximum(p, 0) * (p > found["threshold"])
    assert 0.02 < (a != 0).mean() < 0.9
    return a


def same(ours, theirs, tolerance=1e-5):
    np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=tolerance, atol=tolerance)


def archive(directory, found, lower=False):
    directory.mkdir(parents=True)
    np.savez(directory / "params.npz", **{key.lower() if lower else key: value for key, value in found.items()})
    return directory


def second(directory, found, config=None, dtype=torch.float32, name="params.safetensors"):
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {key.replace("W_", "w_"): torch.from_numpy(value).to(dtype) for key, value in found.items()}
    save_file(tensors, directory / name)
    if config is not None:
        (directory / "config.json").write_text(json.dumps({"architecture": "jump_relu", **config}))
    return directory


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize(
    ("repository", "model", "hook"),
    [
        ("gemma-scope-2b-pt-res", "google/gemma-2-2b", "model.layers.7:out"),
        ("gemma-scope-9b-it-mlp", "google/gemma-2-9b-it", "model.layers.7.post_feedforward_layernorm:out"),
        ("gemma-scope-9b-pt-att", "google/gemma-2-9b", "model.layers.7.self_attn.o_proj:in"),
    ],
)
def test_the_first_release_is_its_equation(repository, model, hook, lower, tmp_path):
    found, x = parameters(), inputs()[0]
    folder = archive(tmp_path / repository / "layer_7" / "width_16k" / "average_l0_71", found, lower)
    loaded = read_dictionary(folder)
    code = loaded.dictionary.encode(torch.from_numpy(x))
    a = activations(found, x)
    same(code.to_dense(LATENTS), a)
    same(loaded.dictionary.decode(code), a @ found["W_dec"] + found["b_dec"])
    assert (loaded.provenance["model"], loaded.provenance["hook"]) == ({"id": model}, hook)
    assert "first token was excluded" in loaded.warnings[-1]


def test_its_transcoders_read_from_before_the_norm(tmp_path):
    found, x = parameters(), inputs()[0]
    folder = archive(tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_3" / "width_16k" / "average_l0_76", found)
    loaded = read_dictionary(folder)
    normed = x / np.sqrt((x**2).mean(1, keepdims=True))
    same(loaded.dictionary(torch.from_numpy(x)), activations(found, normed) @ found["W_dec"] + found["b_dec"])
    assert loaded.provenance["hooks_in"] == ["model.layers.3.pre_feedforward_layernorm:in"]
    assert loaded.provenance["hooks_out"] == ["model.layers.3.post_feedforward_layernorm:out"]


def test_its_embedding_s_is_for_embeddings_without_the_model_s_factor(tmp_path):
    folder = archive(tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "average_l0_6", parameters())
    loaded = read_dictionary(folder)
    assert loaded.provenance["hook"] == "model.embed_tokens:out"
    assert any("without the model's factor sqrt(d)" in note for note in loaded.notes)


def test_a_file_out_of_its_place_is_for_the_hook_that_is_given(tmp_path):
    (tmp_path / "x").mkdir()
    np.savez(tmp_path / "x" / "anything.npz", **parameters())
    loaded = read_dictionary(tmp_path / "x" / "anything.npz")
    assert "give hook=MODULE:SIDE" in loaded.warnings[0]
    told = read_dictionary(
        tmp_path / "x" / "anything.npz", options=ReadOptions(hook="model.layers.2:out", model="google/gemma-2-2b")
    )
    assert told.provenance["hook"] == "model.layers.2:out"
    assert told.provenance["model"] == {"id": "google/gemma-2-2b"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [False, True])
def test_the_second_release_is_its_equation(affine, dtype, tmp_path):
    found, x = parameters(D_OUT), inputs()[0]
    found |= {"affine_skip_connection": RNG(4).normal(size=(D, D_OUT)).astype(np.float32)} if affine else {}
    config = {
        "model_name": "gemma-v3-1b-it",
        "hf_hook_point_in": "model.layers.5.mlp.input",
        "hf_hook_point_out": "model.layers.5.mlp.output",
    }
    loaded = read_dictionary(second(tmp_path / "a", found, config, dtype))
    y = activations(found, x) @ found["W_dec"] + found["b_dec"] + (x @ found["affine_skip_connection"] if affine else 0)
    ours = loaded.dictionary(torch.from_numpy(x)).detach().numpy()
    # Half precision is that of the file: single thresholds are met differently.
    assert np.linalg.norm(ours - y) / np.linalg.norm(y) < (1e-5 if dtype == torch.float32 else 2e-2)
    assert loaded.provenance["hooks_in"] == ["model.layers.5.mlp:in"]
    assert loaded.provenance["hooks_out"] == ["model.layers.5.mlp:out"]
    assert loaded.provenance["model"] == {"id": "google/gemma-3-1b-it"}


@pytest.mark.parametrize(
    ("site", "reads", "writes"),
    [
        ("resid_post", ":out", ":out"),
        ("attn_out", ".self_attn.o_proj:in", ".self_attn.o_proj:in"),
        ("mlp_out", ".post_feedforward_layernorm:out", ".post_feedforward_layernorm:out"),
        ("transcoder", ".pre_feedforward_layernorm:out", ".post_feedforward_layernorm:out"),
    ],
)
def test_without_a_configuration_the_path_says_what_it_is_for(site, reads, writes, tmp_path):
    folder = tmp_path / "gemma-scope-2-270m-pt" / site / "layer_12_width_16k_l0_small"
    loaded = read_dictionary(second(folder, parameters()))
    assert loaded.provenance["model"] == {"id": "google/gemma-3-270m"}
    assert loaded.provenance["hooks_in"] == [f"model.layers.12{reads}"]
    assert loaded.provenance["hooks_out"] == [f"model.layers.12{writes}"]
    assert loaded.dictionary.arguments()["kind"] == ("transcoder" if site == "transcoder" else "sae")


def across(directory, dtype=torch.float32, padding=0.0, affine=False):
    found = [parameters(D_OUT, seed, (LAYERS,)) for seed in range(LAYERS)]
    for seed, own in enumerate(found if affine else []):
        own["affine_skip_connection"] = RNG(50 + seed).normal(size=(D, D_OUT)).astype(np.float32)
    for i, own in enumerate(found):
        own["W_dec"][:, :i] = padding
        second(directory, own, {"model_name": "gemma-3-1b-pt"}, dtype, f"params_layer_{i}_l0_small.safetensors")
    return found


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("padding", [0.0, 3.0])
def test_one_across_layers_is_its_equation(padding, affine, tmp_path):
    folder = tmp_path / "clt" / "width_16k"
    found, x = across(folder, padding=padding, affine=affine), inputs(LAYERS)
    loaded = read_dictionary(folder)
    assert isinstance(loaded.dictionary, CrossLayerTranscoder)
    y = np.stack([np.tile(own["b_dec"], (TOKENS, 1)) for own in found])
    for s, own in enumerate(found):
        for t in range(s, LAYERS):
            y[t] += activations(own, x[s]) @ own["W_dec"][:, t]
        y[s] += x[s] @ own["affine_skip_connection"] if affine else 0
    beside = np.concatenate(list(x), axis=1)
    same(loaded.dictionary(torch.from_numpy(beside)), np.concatenate(list(y), axis=1))
    assert any("are not zero: padding, left out" in warning for warning in loaded.warnings) == (padding != 0)
    d, rows = loaded.dictionary, torch.from_numpy(x)
    codes = [d.encode_at(i, rows[i]) for i in range(LAYERS)]
    for i in range(LAYERS):
        same(d.decode_at(i, codes, rows[i]), y[i])
    # Ours keeps it, and other libraries cannot.
    d.save(tmp_path / "ours", loaded.provenance)
    again = load_dictionary(tmp_path / "ours")
    torch.testing.assert_close(again(torch.from_numpy(beside)), d(torch.from_numpy(beside)), rtol=1e-5, atol=1e-5)
    if affine:
        with pytest.raises(ValueError, match="expected a cross-layer transcoder without skip path"):
            write_dictionary(again, tmp_path / "b", "circuit_tracer", loaded.provenance)
    assert loaded.provenance["hooks_in"][2] == "model.layers.2.pre_feedforward_layernorm:out"


def test_one_across_layers_keeps_half_precision_within_it(tmp_path):
    found, x = across(tmp_path / "clt", torch.bfloat16), inputs(LAYERS)
    d = read_dictionary(tmp_path / "clt").dictionary
    rounded = [{k: torch.from_numpy(v).bfloat16().float().numpy() for k, v in own.items()} for own in found]
    y0 = activations(rounded[0], x[0]) @ rounded[0]["W_dec"][:, 0] + rounded[0]["b_dec"]
    same(d(torch.from_numpy(np.concatenate(list(x), axis=1)))[:, :D_OUT], y0)


@pytest.mark.parametrize("case", ["gemma_scope_1", "gemma_scope_2"])
def test_golden_ones_give_what_circuit_tracer_makes_of_them(case):
    folder = next((GOLDEN / case).rglob("expected.safetensors")).parent
    expected, loaded = load_file(folder / "expected.safetensors"), read_dictionary(folder)
    code = loaded.dictionary.encode(expected["x"])
    torch.testing.assert_close(loaded.dictionary.decode(code, expected["x"]), expected["y"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(code.to_dense(LATENTS), expected["code"], rtol=1e-5, atol=1e-5)
    assert loaded.provenance["hooks_out"] == ["model.layers.4.post_feedforward_layernorm:out"]


def test_the_golden_one_across_layers_too():
    folder = next((GOLDEN / "gemma_scope_2_across").rglob("expected.safetensors")).parent
    expected, d = load_file(folder / "expected.safetensors"), read_dictionary(folder).dictionary
    x, y = (expected[key].transpose(0, 1).flatten(1) for key in "xy")
    torch.testing.assert_close(d(x), y, rtol=1e-5, atol=1e-5)


def test_the_golden_crosscoder_too():
    folder = next((GOLDEN / "gemma_scope_2_crosscoder").rglob("expected.safetensors")).parent
    expected, read = load_file(folder / "expected.safetensors"), read_dictionary(folder)
    x, y = (expected[key].transpose(0, 1).flatten(1) for key in "xy")
    torch.testing.assert_close(read.dictionary(x), y, rtol=1e-5, atol=1e-5)
    hooks = [f"model.layers.{layer}:out" for layer in (7, 13, 22)]
    assert (read.provenance["hooks_in"], read.provenance["hooks_out"]) == (hooks, hooks)


def test_a_repository_of_several_is_told_apart_by_what_they_write(tmp_path):
    for layer in (2, 11):
        archive(tmp_path / "gemma-scope-2b-pt-res" / f"layer_{layer}" / "width_16k" / "average_l0_9", parameters(seed=layer))
    loaded = read_dictionary(tmp_path)
    assert list(loaded.dictionaries) == ["model.layers.2:out", "model.layers.11:out"]
    found = detect(SourceFiles(tmp_path / "gemma-scope-2b-pt-res/layer_2/width_16k/average_l0_9"))
    assert found is not None
    assert found[1] == "params.npz with W_enc and threshold"


class Bomb:
    """Pickled, it would create a file when loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"threshold": None}, "threshold missing among b_dec, b_enc, w_dec, w_enc"),
        ({"W_enc": np.zeros((LATENTS, D), np.float32)}, r"W_enc, its latents last: expected shape \(any, 24\), got \(24, 8\)"),
        ({"W_dec": np.zeros((D, LATENTS), np.float32)}, r"W_dec, its latents first: expected shape \(24, 8\), got \(8, 24\)"),
        ({"b_dec": np.full(D, np.nan, np.float32)}, "b_out: expected finite numbers, got nan"),
        ({"b_enc": np.zeros(LATENTS, np.int64)}, "b_enc: expected floating-point numbers, got torch.int64"),
        ({"b_enc": np.float32(3)}, r"expected shape \(any, 0\)"),
        ({"extra": np.zeros(2)}, "got also extra"),
    ],
)
def test_damaged_archives_are_named(changes, says, tmp_path):
    found = {key: value for key, value in (parameters() | changes).items() if value is not None}
    with pytest.raises(ValueError, match=says):
        read_dictionary(archive(tmp_path / "a", found), "gemma_scope")


def test_hostile_archives_run_and_allocate_nothing(tmp_path):
    bomb = np.array([Bomb(tmp_path / "created")], dtype=object)
    folder = archive(tmp_path / "a", parameters() | {"threshold": bomb})
    with pytest.raises(ValueError, match="Objects are not unpickled"):
        read_dictionary(folder)
    assert not (tmp_path / "created").exists()
    whole = (archive(tmp_path / "b", parameters()) / "params.npz").read_bytes()
    (tmp_path / "b" / "params.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="expected an npz archive of numbers, got a damaged file or another format"):
        read_dictionary(tmp_path / "b")
    head = repr({"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 1 << 20)}).encode()
    head += b" " * (-(len(head) + 11) % 64) + b"\n"
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as out:
        out.writestr("W_enc.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + b"\0" * 8)
    (tmp_path / "b" / "params.npz").write_bytes(content.getvalue())
    with pytest.raises(ValueError, match="the archive has 8"):
        read_dictionary(tmp_path / "b")


def test_damaged_files_of_the_second_release_are_named(tmp_path):
    for number, (changes, config, says) in enumerate(
        [
            ({"affine_skip_connection": np.zeros((D_OUT, D), np.float32)}, {}, r"expected shape \(8, 5\), got \(5, 8\)"),
            ({}, {"architecture": "topk"}, "architecture: expected jump_relu, got 'topk'"),
            (parameters(D_OUT, 0, (LAYERS,)), {}, "one layer of a cross-layer transcoder of 3"),
        ]
    ):
        folder = second(tmp_path / str(number), parameters(D_OUT) | changes, config)
        with pytest.raises(ValueError, match=says):
            read_dictionary(folder)


def test_missing_and_misshapen_layers_of_one_across_layers_are_named(tmp_path):
    across(tmp_path / "clt")
    last = tmp_path / "clt" / "params_layer_2_l0_small.safetensors"
    whole = last.read_bytes()
    last.unlink()
    with pytest.raises(ValueError, match=r"W_dec, latents by layers by width: expected shape \(any, 2, 5\), got \(24, 3, 5\)"):
        read_dictionary(tmp_path / "clt")
    last.write_bytes(whole)
    (tmp_path / "clt" / "params_layer_1_l0_small.safetensors").unlink()
    with pytest.raises(ValueError, match="expected one file for each layer from 0, got layers 0, 2"):
        read_dictionary(tmp_path / "clt")
    (tmp_path / "clt" / "params_layer_1_l0_small.safetensors").write_bytes(whole[:-40])
    with pytest.raises(ValueError, match="expected a safetensors file, got a damaged file or another format"):
        read_dictionary(tmp_path / "clt")


def test_it_is_not_written(tmp_path):
    d = read_dictionary(archive(tmp_path / "a", parameters())).dictionary
    with pytest.raises(ValueError, match=r"read-only format, .* Use --to saelens or circuit_tracer"):
        write_dictionary(d, tmp_path / "b", "gemma_scope")


# Crosscoders: a file for each of four layers, in a folder that names them.

CROSSCODER = "gemma-scope-2-1b-pt/crosscoder/layer_7_13_17_22_width_96_l0_medium"


def crosscoder_files(directory, causal):
    every = []
    for i in range(4):
        found = parameters(D, seed=20 + i, targets=(4,))
        if causal:
            found["W_dec"][:, :i] = 0
        second(directory, found, {"model_name": "gemma-v3-1b-pt"}, name=f"params_layer_{i}.safetensors")
        every.append(found)
    return every


def crosscoder_reference(every, x):
    codes = [activations(found, x[i]) for i, found in enumerate(every)]
    return [sum(codes[s] @ every[s]["W_dec"][:, t] for s in range(4)) + every[t]["b_dec"] for t in range(4)]


def test_a_weakly_causal_crosscoder_reads_one_layer_and_writes_to_it_and_later_ones(tmp_path):
    every = crosscoder_files(tmp_path / CROSSCODER, causal=True)
    read = read_dictionary(tmp_path / CROSSCODER)
    (ours,), (about,) = read.dictionaries.values(), read.provenances.values()
    assert isinstance(ours, CrossLayerTranscoder)
    hooks = [f"model.layers.{layer}:out" for layer in (7, 13, 17, 22)]
    assert (about["hooks_in"], about["hooks_out"], about["model"]) == (hooks, hooks, {"id": "google/gemma-3-1b-pt"})
    x = inputs(4)
    for y, expected in zip(ours([torch.from_numpy(part) for part in x]), crosscoder_reference(every, x), strict=True):
        same(y, expected, 1e-4)
    # Site by site, as when the model runs.
    codes = []
    for site, expected in enumerate(crosscoder_reference(every, x)):
        codes.append(ours.encode_at(site, torch.from_numpy(x[site])))
        same(ours.decode_at(site, codes), expected, 1e-4)


def test_a_crosscoder_that_writes_to_earlier_layers_is_read_as_one_code_of_all(tmp_path):
    every = crosscoder_files(tmp_path / CROSSCODER, causal=False)
    read = read_dictionary(tmp_path / CROSSCODER)
    (ours,) = read.dictionaries.values()
    assert isinstance(ours, Crosscoder)
    assert (ours.widths, ours.n_latents) == ((D,) * 4, 4 * LATENTS)
    assert any("3 layers also write to earlier layers" in warning for warning in read.warnings)
    x = inputs(4)
    for y, expected in zip(ours(list(x)), crosscoder_reference(every, x), strict=True):
        same(y, expected, 1e-4)


def test_a_crosscoder_without_one_of_its_files_is_refused(tmp_path):
    crosscoder_files(tmp_path / CROSSCODER, causal=True)
    (tmp_path / CROSSCODER / "params_layer_3.safetensors").unlink()
    with pytest.raises(ValueError, match=r"expected a file for each of the layers 7, 13, 17, 22, got 3"):
        read_dictionary(tmp_path / CROSSCODER)
