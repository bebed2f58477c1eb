"""Dunefsky et al.'s transcoders: files built after their layout against the equation written out in NumPy."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sparsary.sae.formats import SourceFiles, detect, read_dictionary, write_dictionaries, write_dictionary

D, LATENTS, D_OUT, TOKENS = 8, 24, 5, 40
CFG = {"hook_point": "blocks.2.ln2.hook_normalized", "out_hook_point": "blocks.2.hook_mlp_out", "model_name": "gemma-2b"}


class Settings:
    """Pickled beside the tensors, as theirs is."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def parameters(d_out=D_OUT):
    rng = np.random.default_rng(1)
    sizes = {"W_enc": (D, LATENTS), "b_enc": (LATENTS,), "W_dec": (LATENTS, d_out), "b_dec": (D,), "b_dec_out": (d_out,)}
    return {name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}


def tensors(found, dtype=torch.float32):
    return {name: torch.from_numpy(value).to(dtype) for name, value in found.items()}


def reference(found, x):
    a = np.maximum((x - found["b_dec"]) @ found["W_enc"] + found["b_enc"], 0)
    assert 0.02 < (a != 0).mean() < 0.9
    return a @ found["W_dec"] + found["b_dec_out"]


X = np.random.default_rng(9).normal(0.7, 1.2, (TOKENS, D)).astype(np.float32)


@pytest.mark.parametrize("form", ["nested", "flat", "safetensors"])
def test_it_is_its_equation(form, tmp_path):
    found = parameters()
    path = tmp_path / ("t.safetensors" if form == "safetensors" else "t.pt")
    if form == "safetensors":
        save_file(tensors(found), path)
    else:
        torch.save({"state_dict": tensors(found)} if form == "nested" else tensors(found), path)
    for where in (path, tmp_path):
        d = read_dictionary(where).dictionary
        np.testing.assert_allclose(d(torch.from_numpy(X)).detach().numpy(), reference(found, X), rtol=1e-5, atol=1e-5)
    noted = detect(SourceFiles(path))
    assert noted is not None
    assert noted[1] == f"{path.name} with b_dec_out"


def test_half_precision_is_computed_in_float32(tmp_path):
    found = parameters()
    torch.save({"state_dict": tensors(found, torch.bfloat16)}, tmp_path / "t.pt")
    y, ours = reference(found, X), read_dictionary(tmp_path).dictionary(torch.from_numpy(X)).detach().numpy()
    assert np.linalg.norm(ours - y) / np.linalg.norm(y) < 1e-2


def test_its_input_is_behind_the_norm_and_before_its_gain(tmp_path):
    found = parameters(D)
    torch.save({"state_dict": tensors(found), "cfg": CFG}, tmp_path / "t.pt")
    loaded = read_dictionary(tmp_path)
    normed = X / np.sqrt((X**2).mean(1, keepdims=True))
    np.testing.assert_allclose(
        loaded.dictionary(torch.from_numpy(X)).detach().numpy(), reference(found, normed), rtol=1e-5, atol=1e-5
    )
    assert loaded.provenance["hooks_in"] == ["model.layers.2.post_attention_layernorm:in"]
    # GPT-2's norm is of another kind: the hook stays as it is called, and is not known.
    torch.save({"state_dict": tensors(found), "cfg": CFG | {"model_name": "gpt2-small"}}, tmp_path / "t.pt")
    other = read_dictionary(tmp_path)
    assert "hooks_in" not in other.provenance
    assert "blocks.2.ln2.hook_normalized of gpt2-small are no module's input or output" in other.warnings[0]
    assert other.provenance["hooks_out"] == ["transformer.h.2.mlp:out"]


def test_its_biases_are_folded_for_formats_that_have_one(tmp_path):
    found = parameters(D)
    about = CFG | {"hook_point": "blocks.0.ln2.hook_normalized", "out_hook_point": "blocks.0.hook_mlp_out"}
    torch.save({"state_dict": tensors(found), "cfg": about}, tmp_path / "t.pt")
    loaded, x = read_dictionary(tmp_path / "t.pt"), torch.from_numpy(X)
    write_dictionaries({"a": loaded.dictionary}, tmp_path / "there", "circuit_tracer", {"a": loaded.provenance})
    again = read_dictionary(tmp_path / "there").dictionary
    torch.testing.assert_close(again(x), loaded.dictionary(x), rtol=1e-4, atol=1e-5)


def test_pickled_objects_are_refused_with_the_way_to_convert_them(tmp_path):
    torch.save({"cfg": Settings(tmp_path / "created"), "state_dict": tensors(parameters())}, tmp_path / "t.pt")
    with pytest.raises(ValueError, match=r"never loaded here .*separate process.*weights_only=False"):
        read_dictionary(tmp_path / "t.pt", "dunefsky")
    assert not (tmp_path / "created").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"b_dec": None}, "b_dec missing among"),
        ({"W_enc": torch.zeros(LATENTS, D)}, r"W_enc: expected shape \(8, 24\), got \(24, 8\)"),
        ({"W_dec": torch.zeros(D_OUT, LATENTS)}, r"W_dec: expected shape \(24, 5\), got \(5, 24\)"),
        ({"b_enc": torch.full((LATENTS,), torch.nan)}, "b_enc: expected finite numbers, got nan"),
        ({"b_dec_out": torch.zeros(D_OUT, dtype=torch.int32)}, "b_out: expected floating-point numbers"),
        ({"extra": torch.zeros(1)}, "got also extra"),
        ({"W_enc": torch.zeros(1).expand(D, LATENTS)}, "The file is damaged"),
    ],
)
def test_damaged_tensors_are_named(changes, says, tmp_path):
    found = {key: value for key, value in (tensors(parameters()) | changes).items() if value is not None}
    torch.save({"state_dict": found}, tmp_path / "t.pt")
    with pytest.raises(ValueError, match=says):
        read_dictionary(tmp_path, "dunefsky")


def test_it_is_not_written_and_several_files_are_not_guessed_among(tmp_path):
    for name in ("a.pt", "b.pt"):
        torch.save(tensors(parameters()), tmp_path / name)
    with pytest.raises(ValueError, match=r"expected one file of tensors, got a.pt, b.pt. Name the file"):
        read_dictionary(tmp_path, "dunefsky")
    with pytest.raises(ValueError, match="its files are pickled objects"):
        write_dictionary(read_dictionary(tmp_path / "a.pt").dictionary, tmp_path / "c", "dunefsky")
