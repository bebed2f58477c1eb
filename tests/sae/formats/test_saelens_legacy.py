"""Flat SAELens configurations; that they give SAELens's outputs is tested with the golden files of test_saelens.py."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsary.sae.formats import read_dictionary, write_dictionary

GOLDEN = Path(__file__).parents[2] / "golden" / "formats" / "saelens"


@pytest.fixture
def legacy(tmp_path):
    """A flat folder with changes: fields set, or with None taken out, and tensors added."""

    def build(case="legacy_bare", tensors=None, **changes):
        folder = tmp_path / "folder"
        shutil.copytree(GOLDEN / case, folder)
        cfg = json.loads((folder / "cfg.json").read_text()) | changes
        (folder / "cfg.json").write_text(json.dumps({key: value for key, value in cfg.items() if value is not None}))
        if tensors:
            save_file(load_file(folder / "sae_weights.safetensors") | tensors, folder / "sae_weights.safetensors")
        return folder

    return build


def test_old_names_are_understood_and_said(legacy):
    loaded = read_dictionary(legacy())
    assert loaded.evidence == "SAELens before version 6: cfg.json, flat, with hook_point"
    assert "hook_point renamed hook_name" in loaded.notes
    assert loaded.provenance["hook"] == "transformer.h.3:in"
    assert loaded.provenance["text"] == {"context_length": 128, "bos": "context"}
    assert loaded.provenance["source"]["config"]["hook_point"] == "blocks.3.hook_resid_pre"


@pytest.mark.parametrize("name", ["activation_fn", "activation_fn_str"])
def test_either_spelling_of_topk_is_topk(name, legacy):
    loaded = read_dictionary(legacy(**{name: "topk"}, activation_fn_kwargs={"k": 3})).dictionary
    assert (loaded.encode(torch.randn(9, 8)).values != 0).sum() <= 27
    assert loaded.encoder.k == 3


def test_what_is_not_known_is_no_relu(legacy):
    with pytest.raises(ValueError, match=r"activation function: expected relu or topk, got 'tanh-relu', which applies tanh"):
        read_dictionary(legacy(activation_fn_str="tanh-relu"))


def test_spellings_that_contradict_each_other_are_refused(legacy):
    with pytest.raises(ValueError, match=r"expected one activation function, got \['relu', 'topk'\]"):
        read_dictionary(legacy(activation_fn_str="topk", activation_fn="relu"))


def test_topk_without_k_is_refused(legacy):
    with pytest.raises(ValueError, match=r"k: expected the number of latents per token, found none. Give it: k=NUMBER"):
        read_dictionary(legacy(activation_fn_str="topk"))


def test_a_flag_for_normalisation_means_the_expected_average(legacy):
    with pytest.raises(ValueError, match=r"expected_average_only_in: expected the input scale factor"):
        read_dictionary(legacy(normalize_activations=True))


def test_scaling_factors_are_folded_where_they_were_used(legacy):
    factor, x = torch.rand(24) + 0.5, torch.randn(5, 8)
    loaded = read_dictionary(legacy(tensors={"scaling_factor": factor}, finetuning_scaling_factor=True))
    plain = read_dictionary(GOLDEN / "legacy_bare").dictionary
    expected = (plain.encode(x).to_dense(24) * factor) @ plain.W_dec + plain.b_dec
    torch.testing.assert_close(loaded.dictionary(x), expected)
    assert "per-latent scaling factors folded into the atoms" in loaded.notes


def test_scaling_factors_of_one_are_dropped(legacy, assert_same_tensors):
    loaded = read_dictionary(legacy(tensors={"scaling_factor": torch.ones(24)})).dictionary
    assert_same_tensors(loaded, read_dictionary(GOLDEN / "legacy_bare").dictionary)


def test_scaling_factors_that_were_not_used_are_refused(legacy):
    with pytest.raises(ValueError, match=r"expected scaling factors of 1, as cfg.json has finetuning_scaling_factor: false"):
        read_dictionary(legacy(tensors={"scaling_factor": torch.rand(24)}))


def test_pickles_are_not_opened(tmp_path):
    (tmp_path / "sae.pkl.gz").write_bytes(b"anything")
    with pytest.raises(ValueError, match=r"got pickled objects \(sae.pkl.gz\), as version 1 wrote, which are never loaded"):
        read_dictionary(tmp_path, format="saelens_legacy")


def test_old_layouts_are_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"read-only format\. Use --to saelens"):
        write_dictionary(read_dictionary(GOLDEN / "legacy_bare").dictionary, tmp_path, "saelens_legacy")
