"""A transcoder that starts from the neurons of the MLP that it replaces."""

import json
from types import SimpleNamespace

import pytest
import torch

import sparsary
from sparsary.sae.metrics import fvu
from sparsary.training.activations.tensor_stream import TensorStream
from sparsary.training.recipe import check_recipe
from sparsary.training.recipe.schema import DictionarySection
from sparsary.training.warm_start.begin import warm_start
from sparsary.training.warm_start.mlp import mlp_source
from sparsary.training.warm_start.source import with_start

TOKENS = 3000
HOOKS = {"gpt2": "transformer.h.1.mlp", "gpt_neox": "gpt_neox.layers.1.mlp", "llama": "model.layers.1.mlp"}


@pytest.fixture
def shrunk(load_beside):
    """Return a tiny model of an architecture, with random weights."""
    return load_beside("tiny_models").tiny_model


@pytest.fixture
def begun(tmp_path, shrunk):
    """Return what a transcoder of a tiny model's MLP begins with, its inputs, and the MLP's outputs."""

    def begin(kind, changes=None, start="mlp", **section):
        torch.manual_seed(0)
        model, path = shrunk(kind, **(changes or {})).eval(), HOOKS[kind]
        mlp = model.get_submodule(path)
        for part in mlp.modules():
            # Weights of tiny models are so small that every neuron is nearly linear.
            for parameter in part.parameters(recurse=False):
                torch.nn.init.normal_(parameter, std=0.4)
        x = 2 * torch.randn(TOKENS, 32) + torch.randn(32)
        with torch.no_grad():
            y = mlp(x[None])[0]
        dictionary = {"kind": "transcoder", "hook_in": f"{path}:in", "hook_out": f"{path}:out", "start": start, **section}
        values = {"dictionary": dictionary, "tokens": 2000, "batch_tokens": 100, "out_dir": str(tmp_path / "run")}
        outline = SimpleNamespace(module=model, device=torch.device("cpu"))
        recipe = check_recipe(values, "recipe")
        completed, source = with_start(recipe, lambda section: mlp_source(section, outline, lambda: outline))
        recipe = recipe.model_copy(update={"dictionary": completed})
        stream = TensorStream([(x, y)], 100, True, recipe.harvest)
        moments = stream.moments(), stream.target_moments()
        warm = warm_start(source, recipe, {f"{path}:in": 32, f"{path}:out": 32}, stream, stream.start_sample(TOKENS), moments)
        return warm, x, y

    return begin


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_with_relu_neurons_it_is_the_mlp_before_the_first_step(kind, begun):
    key = "activation_function" if kind == "gpt2" else "hidden_act"
    warm, x, y = begun(kind, {key: "relu"})
    assert warm.dictionary.encoder.__class__.__name__ == "ReLU"
    assert warm.recipe.dictionary.n_latents == warm.dictionary.n_latents > 32
    with torch.no_grad():
        assert float(fvu(y, warm.dictionary(x))) < 1e-9
    assert warm.record["before"]["fvu"] < 1e-9
    # The l0 of the neurons is the target of the penalty.
    assert warm.recipe.dictionary.encoder["target_l0"] == pytest.approx(warm.record["as_read"]["l0"], rel=1e-3)


def test_with_more_latents_it_is_still_the_mlp_and_with_fewer_the_densest_neurons_remain(begun):
    relu = {"activation_function": "relu"}
    n_neurons = begun("gpt2", relu)[0].dictionary.n_latents
    more, x, y = begun("gpt2", relu, start={"path": "mlp", "new_latents": "data"}, n_latents=n_neurons + 7)
    with torch.no_grad():
        # The new latents fire on a few tokens.
        assert float(fvu(y, more.dictionary(x))) < 0.05
    fewer, _, _ = begun("gpt2", relu, n_latents=n_neurons // 2)
    assert 0.01 < fewer.record["before"]["fvu"] < 1


@pytest.mark.parametrize(("kind", "changes", "most"), [("gpt2", {"activation_function": "gelu_new"}, 0.02), ("llama", {}, 0.8)])
def test_other_neurons_are_fitted_one_by_one(kind, changes, most, begun):
    warm, _, _ = begun(kind, changes)
    assert warm.record["before"]["fvu"] < most


def test_another_encoder_keeps_the_directions(begun):
    warm, _, _ = begun("gpt2", {"activation_function": "relu"}, encoder={"name": "topk", "k": 40})
    assert 0 < warm.record["before"]["fvu"] < 0.2
    assert warm.record["before"]["l0"] <= 40


def test_what_is_no_mlp_is_refused(shrunk):
    model = SimpleNamespace(module=shrunk("gpt2"), device=torch.device("cpu"))

    def refused(match, **section):
        with pytest.raises(ValueError, match=match):
            mlp_source(DictionarySection(start={"path": "mlp"}, **section), model, lambda: model)

    refused("mlp is a transcoder, the recipe's dictionary is a sae", hook="transformer.h.1.mlp:out")
    attention = {"kind": "transcoder", "hook_in": "transformer.h.1.attn:in", "hook_out": "transformer.h.1.attn:out"}
    refused("is a GPT2Attention with the linear maps", **attention)
    crossed = {"kind": "transcoder", "hook_in": "transformer.h.1.mlp:in", "hook_out": "transformer.h.2.mlp:out"}
    refused("expected the hooks of an MLP", **crossed)
    values = {"dictionary": {"kind": "transcoder", "layer": 1, "site": "mlp", "start": {"path": "mlp", "k": 4}}}
    with pytest.raises(ValueError, match=r"dictionary.start.k: expected none with path mlp"):
        check_recipe(values | {"tokens": 100, "out_dir": "run", "harvest": {"tokens": 1000}}, "recipe")


def test_a_run_on_the_embedded_model_starts_from_its_mlp(recipe_values, tmp_path):
    values = recipe_values | {"out_dir": str(tmp_path / "run")}
    values["dictionary"] = {
        "kind": "transcoder",
        "layer": 1,
        "site": "mlp",
        "start": "mlp",
        "encoder": {"name": "topk", "k": 64},
    }
    values["harvest"] = {key: value for key, value in values["harvest"].items() if key != "hooks"}
    out = sparsary.train(values)
    record = json.loads((out / "dictionary.json").read_text())["provenance"]["start"]
    assert (record["path"], record["kind"]) == ("mlp of transformer.h.1.mlp", "transcoder")
    assert record["as_read"]["fvu"] < 0.2
    assert sparsary.load(out).n_latents == record["n_latents"] == 512
