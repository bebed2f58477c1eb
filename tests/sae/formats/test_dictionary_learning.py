"""dictionary_learning: its classes' files give its outputs, and what we write reads back the same.

The golden folders were made with the library itself: tests/parity/reference_formats_dictionary_learning.py.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsary.sae import SAE
from sparsary.sae.encoders import build_encoder
from sparsary.sae.formats import ReadOptions, SourceFiles, detect, read_canonical, read_dictionary, write_dictionary
from sparsary.transcoders import CrossLayerTranscoder, Transcoder

GOLDEN = Path(__file__).parents[2] / "golden" / "formats" / "dictionary_learning"
CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
HOOK = "gpt_neox.layers.3:out"


def test_the_golden_files_are_all_there():
    about = json.loads((GOLDEN / "header.json").read_text())
    assert (about["library"], about["version"], len(CASES)) == ("dictionary-learning", "0.1.0", 11)


@pytest.mark.parametrize("case", CASES)
def test_what_the_library_wrote_gives_its_outputs(case):
    expected = load_file(GOLDEN / case / "expected.safetensors")
    loaded = read_dictionary(GOLDEN / case)
    d = loaded.dictionary
    code = d.encode(expected["x"])
    dense = code.to_dense(d.n_latents)
    torch.testing.assert_close(d.decode(code, expected["x"]), expected["y"], rtol=1e-5, atol=1e-5)
    assert torch.equal(dense != 0, expected["code"] != 0)
    # Random weights prove little where nothing fires, or everything does.
    assert 0.1 < (dense != 0).float().mean() < 0.6
    # A backup is in the units of its training.
    torch.testing.assert_close(dense * (2.7 if "backup" in case else 1.0), expected["code"], rtol=1e-5, atol=1e-5)
    assert loaded.provenance["hook"] == HOOK
    assert loaded.provenance["model"] == {"id": "EleutherAI/pythia-70m-deduped"}
    assert loaded.provenance["text"] == {"context_length": 128}
    assert loaded.warnings == ()


@pytest.mark.parametrize("case", CASES)
def test_written_then_read_again_changes_nothing(case, tmp_path):
    first = read_dictionary(GOLDEN / case)
    x = load_file(GOLDEN / case / "expected.safetensors")["x"]
    write_dictionary(first.dictionary, tmp_path, "dictionary_learning", first.provenance)
    again = read_dictionary(tmp_path)
    torch.testing.assert_close(again.dictionary(x), first.dictionary(x), rtol=1e-5, atol=1e-5)
    for key in ("model", "hook", "text"):
        assert again.provenance[key] == first.provenance[key]
    was, now = (loaded.provenance["source"]["config"]["trainer"] for loaded in (first, again))
    kind = {"AutoEncoderNew": "AutoEncoder", "MatryoshkaBatchTopKSAE": "BatchTopKSAE"}
    assert now["dict_class"] == kind.get(was["dict_class"], was["dict_class"])
    # What it does not know it keeps.
    assert now["lr"] == was["lr"] == 1e-3
    size = (tmp_path / "ae.pt").stat().st_size
    assert size < 2 * sum(t.nbytes for t in torch.load(tmp_path / "ae.pt", weights_only=True).values()) + 4000


@pytest.mark.parametrize("case", ["AutoEncoderTopK", "BatchTopKSAE", "JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"])
def test_a_file_alone_takes_its_configuration_from_beside_it(case):
    loaded = read_dictionary(GOLDEN / case / "ae.pt")
    assert loaded.provenance["source"]["config"]["trainer"]["dict_class"] == case
    checkpoint = read_dictionary(GOLDEN / "AutoEncoderTopK-checkpoint" / "checkpoints" / "ae_100.pt")
    assert checkpoint.provenance["hook"] == HOOK


def alone(case, tmp_path, **changes):
    """A state file without configuration, with other tensors; ``None`` takes one out."""
    state = torch.load(GOLDEN / case / "ae.pt", weights_only=True) | changes
    torch.save({key: value for key, value in state.items() if value is not None}, tmp_path / "ae.pt")
    return tmp_path


@pytest.mark.parametrize("case", [c for c in CASES if "TopKSAE" not in c and "-" not in c and "AutoEncoderTopK" not in c])
def test_without_a_configuration_keys_say_the_class(case, tmp_path):
    expected = load_file(GOLDEN / case / "expected.safetensors")
    loaded = read_dictionary(alone(case, tmp_path))
    assert f"the keys of {case}" in loaded.evidence
    torch.testing.assert_close(loaded.dictionary(expected["x"]), expected["y"], rtol=1e-5, atol=1e-5)


def test_topk_and_batch_topk_have_the_same_keys(tmp_path):
    folder = alone("BatchTopKSAE", tmp_path)
    with pytest.raises(ValueError, match=r"AutoEncoderTopK or BatchTopKSAE.* Give k=NUMBER .* or threshold=NUMBER"):
        read_dictionary(folder)
    expected = load_file(GOLDEN / "BatchTopKSAE" / "expected.safetensors")
    by_threshold = read_dictionary(folder, options=ReadOptions(threshold=0.6)).dictionary
    torch.testing.assert_close(by_threshold(expected["x"]), expected["y"], rtol=1e-5, atol=1e-5)
    by_k = read_dictionary(folder, options=ReadOptions(k=5)).dictionary
    assert by_k.arguments()["encoder"] == {"name": "topk", "k": 5}
    matryoshka = read_dictionary(alone("MatryoshkaBatchTopKSAE", tmp_path)).dictionary
    assert matryoshka.arguments()["encoder"] == {"name": "threshold"}


def changed(case, tmp_path, changes=None, tensors=None):
    """A golden folder with changes to its trainer's configuration and to its tensors."""
    folder = tmp_path / case
    shutil.copytree(GOLDEN / case, folder)
    config = json.loads((folder / "config.json").read_text())
    config["trainer"] = {k: v for k, v in (config["trainer"] | (changes or {})).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))
    state = torch.load(folder / "ae.pt", weights_only=True) | (tensors or {})
    torch.save({key: value for key, value in state.items() if value is not None}, folder / "ae.pt")
    return folder


def test_early_files_have_k_in_the_configuration_alone(tmp_path):
    folder = changed("AutoEncoderTopK", tmp_path, tensors={"k": None, "threshold": None})
    assert read_dictionary(folder).dictionary.arguments()["encoder"] == {"name": "topk", "k": 5}
    folder = changed("AutoEncoderTopK", tmp_path / "neither", {"k": None}, {"k": None})
    with pytest.raises(ValueError, match=r"k: expected the number of latents per token, found none. Give it: k=NUMBER"):
        read_dictionary(folder)
    assert read_dictionary(folder, options=ReadOptions(k=3)).dictionary.arguments()["encoder"] == {"name": "topk", "k": 3}


def test_a_threshold_never_measured_is_refused_until_given(tmp_path):
    folder = changed("BatchTopKSAE", tmp_path, tensors={"threshold": torch.tensor(-1.0)})
    with pytest.raises(
        ValueError, match=r"threshold: .* got -1, which means that none was measured.* give it: threshold=NUMBER"
    ):
        read_dictionary(folder)
    expected = load_file(folder / "expected.safetensors")
    given = read_dictionary(folder, options=ReadOptions(threshold=0.6)).dictionary
    torch.testing.assert_close(given(expected["x"]), expected["y"], rtol=1e-5, atol=1e-5)
    folder = changed("MatryoshkaBatchTopKSAE", tmp_path, tensors={"threshold": None})
    with pytest.raises(ValueError, match="threshold measured in training, got none"):
        read_dictionary(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dict_class": "IdentityDict"}, "IdentityDict returns its input and has no weights"),
        ({"dict_class": "AutoEncoderTopk"}, "dict_class: expected one of AutoEncoder, .* Did you mean 'AutoEncoderTopK'"),
        ({"dict_class": "GatedAutoEncoder"}, "decoder_bias, r_mag, gate_bias, mag_bias missing among"),
        ({"dict_class": ["AutoEncoder"]}, r"dict_class: expected one of .* got \['AutoEncoder'\]"),
        ({"activation_dim": 9}, "activation_dim: expected 8, as in the weights, got 9"),
        ({"dict_size": 10**12}, "dict_size: expected 24, as in the weights, got 1000000000000"),
        ({"k": 7}, "k: expected the same number in weights and config.json, got 5 and 7. Give the correct one: k=NUMBER"),
    ],
)
def test_damaged_configurations_are_named(changes, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        read_dictionary(changed("AutoEncoderTopK", tmp_path, changes))


@pytest.mark.parametrize(
    ("case", "tensors", "says"),
    [
        ("AutoEncoderTopK", {"encoder.weight": torch.zeros(8, 24)}, r"encoder.weight: expected shape \(24, 8\), got \(8, 24\)"),
        ("AutoEncoderTopK", {"decoder.weight": torch.zeros(24, 8)}, r"decoder.weight: expected shape \(8, 24\), got \(24, 8\)"),
        ("JumpReluAutoEncoder", {"W_enc": torch.zeros(24, 8)}, r"W_enc: expected shape \(8, 24\), got \(24, 8\)"),
        ("JumpReluAutoEncoder", {"threshold": torch.zeros(23)}, r"threshold: expected shape \(24\), got \(23,\)"),
        ("AutoEncoder", {"bias": torch.full((8,), torch.nan)}, r"b_in: expected finite numbers, got nan at \[0\]"),
        ("AutoEncoder", {"bias": None}, "bias missing among decoder.weight, encoder.bias, encoder.weight"),
        ("AutoEncoder", {"b_dec": torch.zeros(8)}, "of AutoEncoder, got also b_dec"),
        ("AutoEncoder", {"encoder.bias": torch.zeros(24, dtype=torch.int64)}, "b_enc: expected floating-point numbers"),
        (
            "AutoEncoder",
            {"decoder.weight": torch.ones(8, 24).to(torch.float8_e4m3fn)},
            "W_dec: expected floating-point numbers",
        ),
        ("AutoEncoder", {"decoder.weight": torch.ones(8, 24).to_sparse()}, "decoder.weight: expected a plain tensor"),
        ("AutoEncoder", {"encoder.bias": torch.zeros(1).expand(10**9)}, "encoder.bias: .* The file is damaged"),
        ("AutoEncoderTopK", {"k": torch.tensor([5, 5])}, r"k: expected shape \(\), got \(2,\)"),
        ("AutoEncoderTopK", {"k": torch.tensor(2.5)}, "k: expected the same number in weights and config.json, got 2.5 and 5"),
        ("BatchTopKSAE", {"threshold": torch.zeros(24)}, r"threshold: expected shape \(\), got \(24,\)"),
        ("GatedAutoEncoder", {"r_mag": torch.zeros(8)}, r"r_mag: expected shape \(24\), got \(8,\)"),
        ("JumpReluAutoEncoder", {"W_dec": torch.zeros(24, 8)}, "W_dec: expected nonzero decoder directions, got only zeros"),
    ],
)
def test_damaged_tensors_are_named(case, tensors, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        read_dictionary(changed(case, tmp_path, tensors=tensors))


def test_damaged_files_are_named(tmp_path):
    folder = changed("AutoEncoder", tmp_path)
    whole = (folder / "ae.pt").read_bytes()
    (folder / "ae.pt").write_bytes(whole[:-700])
    with pytest.raises(ValueError, match=r"expected a torch file .* got a damaged or older one"):
        read_dictionary(folder)
    (folder / "ae.pt").write_bytes(whole.replace(b"PK\x01\x02", b"PK\x01\x02\x00\x00\xe6", 1))
    with pytest.raises(ValueError, match="got a damaged or older one"):
        read_dictionary(folder)
    (folder / "ae.pt").unlink()
    with pytest.raises(ValueError, match="expected a dictionary of a known format"):
        read_dictionary(folder)
    with pytest.raises(ValueError, match=r"expected ae.pt or one state file, found none"):
        read_dictionary(folder, "dictionary_learning")
    for step in (10, 20):
        (folder / f"ae_{step}.pt").write_bytes(whole)
    with pytest.raises(ValueError, match=r"found ae_10.pt, ae_20.pt. Name the file itself"):
        read_dictionary(folder)


class Bomb:
    """Pickled, it would create a file when loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("place", ["ae", "config", "top"])
def test_no_pickled_object_is_built(place, tmp_path):
    bomb, folder = Bomb(tmp_path / "ran"), changed("AutoEncoder", tmp_path)
    state = torch.load(folder / "ae.pt", weights_only=True)
    backup = {"step": 1, "ae": state, "config": {}, "norm_factor": 1.0}
    contents = {
        "ae": backup | {"ae": state | {"x": bomb}},
        "config": backup | {"config": {"k": bomb}},
        "top": state | {"x": bomb},
    }
    torch.save(contents[place], folder / "ae.pt")
    for path in (folder, folder / "ae.pt"):
        with pytest.raises(ValueError, match="pickled Python objects, which are never loaded here"):
            read_dictionary(path)
    assert not (tmp_path / "ran").exists()


def test_names_that_are_none_are_left_out(tmp_path):
    loaded = read_dictionary(changed("AutoEncoder", tmp_path, {"lm_name": [1]}))
    assert "expected a name of hook or model, got [1]: left out" in loaded.warnings
    assert loaded.provenance["model"] is None


def test_a_backup_s_factor_is_checked(tmp_path):
    folder = tmp_path / "case"
    shutil.copytree(GOLDEN / "GatedAutoEncoder-backup", folder)
    state = torch.load(folder / "ae.pt", weights_only=True)
    for wrong in (0.0, -2.0, "2", float("nan")):
        torch.save(state | {"norm_factor": wrong}, folder / "ae.pt")
        with pytest.raises(ValueError, match="norm_factor: expected a number above 0"):
            read_dictionary(folder)
    (folder / "config.json").unlink()
    torch.save(state | {"norm_factor": None}, folder / "ae.pt")
    n = read_canonical(SourceFiles(folder))
    assert n.scale_in == n.scale_out == 1.0
    assert n.provenance["hook"] == HOOK
    assert "backup" in n.evidence


@pytest.mark.parametrize(
    ("name", "io", "hook"),
    [
        ("resid_post_layer_8", "out", "model.layers.8:out"),
        ("mlp_out_layer8", "out", "model.layers.8.mlp:out"),
        ("blocks.4.hook_resid_pre", "out", "model.layers.4:in"),
        ("model.layers.5.mlp", "in", "model.layers.5.mlp:in"),
        ("model.layers.5.mlp", "out", "model.layers.5.mlp:out"),
        ("somewhere", "out", None),
    ],
)
def test_places_are_understood(name, io, hook, tmp_path):
    folder = changed("AutoEncoder", tmp_path, {"submodule_name": name, "lm_name": "Qwen/Qwen3-0.6B"})
    config = json.loads((folder / "config.json").read_text())
    config["buffer"]["io"] = io
    (folder / "config.json").write_text(json.dumps(config))
    loaded = read_dictionary(folder)
    assert loaded.provenance.get("hook") == hook
    assert bool(loaded.warnings) == (hook is None)
    if hook is None:
        assert "the hook somewhere of Qwen/Qwen3-0.6B is none" in loaded.warnings[0]
        assert (
            read_dictionary(folder, options=ReadOptions(hook="model.layers.2:out")).provenance["hook"] == "model.layers.2:out"
        )


def made(spec, subtracts=True):
    """A dictionary of ours with scales, and a known threshold where it has one."""
    encoder = build_encoder(spec)
    d = SAE(7, 19, encoder, apply_b_dec_to_input=subtracts)
    with torch.no_grad():
        for parameter in (p for name, p in d.named_parameters() if "log" not in name):
            parameter.normal_()
        d.renormalize()
    d.in_scale.fill_(1.7)
    d.out_scale.fill_(1.7)
    if hasattr(encoder, "threshold") and isinstance(encoder.threshold, torch.Tensor):
        encoder.threshold.uniform_(0.1, 1)
    for _ in range(3):
        d.encode(torch.randn(13, 7), torch.randn(13, 7))
    return d.eval()


FAMILIES = {
    "topk": ({"name": "topk", "k": 4}, "AutoEncoderTopK"),
    "gradient_topk": ({"name": "gradient_topk", "k": 4, "beta": 2.0}, "AutoEncoderTopK"),
    "mutual_choice": ({"name": "mutual_choice", "k": 4}, "BatchTopKSAE"),
    "feature_choice": ({"name": "feature_choice", "k": 4}, "JumpReluAutoEncoder"),
    "batch_topk": ({"name": "batch_topk", "k": 4}, "BatchTopKSAE"),
    "matryoshka": ({"name": "matryoshka", "k": 4}, "BatchTopKSAE"),
    "relu": ({"name": "relu"}, "AutoEncoder"),
    "jumprelu": ({"name": "jumprelu", "target_l0": 4}, "JumpReluAutoEncoder"),
    "threshold": ({"name": "threshold"}, "JumpReluAutoEncoder"),
    "gated": ({"name": "gated"}, "GatedAutoEncoder"),
}


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_counterpart(family, subtracts, tmp_path):
    spec, kind = FAMILIES[family]
    d, x = made(spec, subtracts), torch.randn(17, 7)
    write_dictionary(
        d, tmp_path, "dictionary_learning", {"hook": "transformer.h.2:out", "model": {"id": "openai-community/gpt2"}}
    )
    trainer = json.loads((tmp_path / "config.json").read_text())["trainer"]
    assert (trainer["dict_class"], trainer["submodule_name"], trainer["layer"]) == (kind, "transformer.h.2", 2)
    again = read_dictionary(tmp_path).dictionary
    torch.testing.assert_close(again(x), d(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(again.encode(x).to_dense(19) > 0, d.encode(x).to_dense(19) > 0)


def test_what_it_cannot_hold_is_refused_with_a_reason(tmp_path):
    topk = build_encoder({"name": "topk", "k": 3})
    for d, reason in (
        (Transcoder(7, 5, 19, topk).eval(), "expected an SAE, got a transcoder. Use --to sparsify"),
        (CrossLayerTranscoder(2, 8, 8, 26, build_encoder({"name": "relu"})).eval(), "expected an SAE, got a transcoder"),
        (made({"name": "signed_topk", "k": 3}), "its topk applies relu. Use --to circuit_tracer"),
        (made({"name": "signed_topk", "k": 3, "by": "size"}), "Use --to saelens, which has abstopk"),
        (made({"name": "group_max", "k": 19}), "there is no equivalent. Use --to sparsify"),
        (made({"name": "matching_pursuit", "k": 3}), "it has no matching pursuit. Use --to saelens"),
        (SAE(7, 19, topk, row_norm="layer_norm").eval(), "row_norm: expected null, as the library has none, got layer_norm"),
    ):
        with pytest.raises(ValueError, match=reason):
            write_dictionary(d, tmp_path / "out", "dictionary_learning")
        assert not (tmp_path / "out").exists()


def test_the_shared_dictionaries_give_their_references(shared_data):
    folder = shared_data / "saes"
    reference = load_file(folder / "stories3M_L3_topk16_reference.safetensors")
    d = read_dictionary(folder / "stories3M_L3_topk16_dictionary_learning").dictionary
    code = d.encode(reference["x"])
    torch.testing.assert_close(code.to_dense(768), reference["z"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d.decode(code), reference["r"], rtol=1e-5, atol=1e-5)
    for name, latents in (("dl_autoencoder_48x192", 192), ("dl_autoencoder_120x1920", 1920)):
        assert read_dictionary(folder / name).dictionary.n_latents == latents
    for k in (3, 4):
        loaded = read_dictionary(folder / f"list_comp_batchtopk_k{k}")
        assert loaded.dictionary.arguments()["encoder"] == {"name": "threshold"}
        assert loaded.provenance["source"]["config"]["trainer"]["k"] == k


@pytest.mark.parametrize(("k", "l0", "unexplained"), [(3, 3.024, 0.0106), (4, 3.892, 0.0115)])
def test_public_dictionaries_have_their_published_figures(k, l0, unexplained, shared_data):
    """On the stream after layer 0 at the separator, which in this model sees the two digits but not itself."""
    w = load_file(shared_data / "models" / "toy" / "list_comp_2l" / "model.safetensors")
    a = {name.rpartition(".")[2]: tensor.squeeze(0) for name, tensor in w.items() if name.startswith("blocks.0.attn.")}
    digits = torch.cartesian_prod(torch.arange(100), torch.arange(100))
    embedded = w["embed.W_E"][torch.cat([digits, torch.full((len(digits), 1), 101)], dim=1)] + w["pos_embed.W_pos"][:3]
    before, separator = embedded[:, :2], embedded[:, 2]
    query = separator @ a["W_Q"] + a["b_Q"]
    share = (((before @ a["W_K"] + a["b_K"]) @ query[:, :, None]) / 64**0.5).softmax(dim=1)
    x = separator + (share * (before @ a["W_V"] + a["b_V"])).sum(dim=1) @ a["W_O"] + a["b_O"]
    folder = shared_data / "saes" / f"list_comp_batchtopk_k{k}"
    mean = torch.load(folder / "act_mean.pt", weights_only=True)
    d = read_dictionary(folder).dictionary
    code = d.encode(x - mean)
    error = d.decode(code) + mean - x
    assert len(code.values) / len(x) == pytest.approx(l0, abs=1e-3)
    assert (error.pow(2).sum() / (x - x.mean(dim=0)).pow(2).sum()).item() == pytest.approx(unexplained, abs=1e-4)


def test_only_what_says_so_is_taken_for_it(tmp_path):
    (tmp_path / "config.json").write_text('{"trainer": "other"}')
    torch.save({"weight": torch.zeros(2, 2)}, tmp_path / "ae.pt")
    assert detect(SourceFiles(tmp_path)) is None
