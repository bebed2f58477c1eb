"""Stacks: a directory of checkpoints, addressed by hook."""

import json

import pytest
import torch

from sparsary.sae import ENCODERS, SAE
from sparsary.transcoders import Stack, Transcoder, load_stack
from sparsary.transcoders.stack import hooks_of_provenance, is_stack


def provenance(layer, **more):
    hooks = {"hooks_in": [f"h.{layer}.mlp:in"], "hooks_out": [f"h.{layer}.mlp:out"]}
    return {"model": {"id": "tiny"}} | hooks | more


@pytest.fixture
def folder(tmp_path):
    for layer in (0, 2, 10):
        torch.manual_seed(layer)
        Transcoder(3, 5, 7, ENCODERS["topk"](k=2)).save(tmp_path / f"layer={layer}", provenance(layer))
    return tmp_path


def test_dictionaries_are_found_by_either_hook_in_the_order_of_layers(folder):
    assert is_stack(folder)
    assert not is_stack(folder / "layer=0")
    stack = load_stack(folder)
    assert list(stack) == ["h.0.mlp:out", "h.2.mlp:out", "h.10.mlp:out"]
    assert stack["h.2.mlp:in"] is stack["h.2.mlp:out"]
    assert len(stack) == 3
    with pytest.raises(KeyError, match=r"h\.1\.mlp:in: expected one of h\.0\.mlp:out"):
        stack["h.1.mlp:in"]


def test_saved_then_loaded_is_the_same(folder, tmp_path):
    stack = load_stack(folder)
    stack.save(tmp_path / "again")
    again = load_stack(tmp_path / "again")
    assert again.provenances == stack.provenances
    for hook, transcoder in stack.items():
        for name, tensor in transcoder.state_dict().items():
            assert torch.equal(again[hook].state_dict()[name], tensor)


def test_an_sae_s_hook_is_both():
    assert hooks_of_provenance({"hook": "h.1:out"}) == (("h.1:out",), ("h.1:out",))
    sae = SAE(3, 7, ENCODERS["topk"](k=2))
    stack = Stack({"h.1:out": sae}, {"h.1:out": {"hook": "h.1:out"}})
    assert stack["h.1:out"] is sae
    with pytest.raises(ValueError, match="expected the hooks the dictionary was trained on"):
        hooks_of_provenance({})


def test_what_is_no_stack_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"expected folders with dictionary\.json below it"):
        load_stack(tmp_path / "nothing")
    dictionary = Transcoder(3, 5, 7, ENCODERS["topk"](k=2))
    dictionary.save(folder / "seed=1", provenance(2))
    with pytest.raises(ValueError, match=r"expected one dictionary for each hook, got layer=2 and seed=1 for h\.2\.mlp:out"):
        load_stack(folder)
    dictionary.save(folder / "seed=1", provenance(3, model={"id": "other"}))
    with pytest.raises(ValueError, match="expected dictionaries of one model, got other, tiny"):
        load_stack(folder)
    dictionary.save(folder / "seed=1", provenance(3, hooks_in=["a:in", "b:in"], hooks_out=["a:out", "b:out"]))
    with pytest.raises(ValueError, match=r"seed=1: expected a dictionary of one hook in a stack, got one of 2"):
        load_stack(folder)
    dictionary.save(folder / "seed=1", {})
    with pytest.raises(ValueError, match=r"seed=1: provenance: expected the hooks"):
        load_stack(folder)
    config = json.loads((folder / "layer=0" / "dictionary.json").read_text())
    assert config["dictionary"]["kind"] == "transcoder"
