"""What a researcher asks in Python, each in at most three lines: the script that the documentation shows."""

import numpy as np
import pytest
import torch

import sparsary

HOOK = "transformer.h.2:out"
TEXT = "the war lasted from the year 1732 to the year 1741"
TOPK = {"name": "topk", "k": 5}


@pytest.fixture(scope="module")
def m():
    return sparsary.LanguageModel.from_pretrained("embedded", device="cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory, m):
    """A small SAE, trained from a mapping on a model in memory."""
    recipe = {"dictionary": {"hook": HOOK, "n_latents": 96, "encoder": TOPK}, "tokens": 3000, "batch_tokens": 100}
    harvest = {"live_buffer_tokens": 2000}
    out = tmp_path_factory.mktemp("api") / "sae"
    return sparsary.train(recipe | {"harvest": harvest, "eval_tokens": 1200}, model=m, out_dir=str(out))


@pytest.fixture(scope="module")
def d(run):
    return sparsary.load(run)


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    from sparsary.transcoders import Stack, Transcoder

    torch.manual_seed(0)
    hooks = {f"transformer.h.{layer}.mlp:out": f"transformer.h.{layer}.mlp:in" for layer in range(4)}
    about = {"model": {"id": "embedded", "device": "cpu"}, "text": {"source": "embedded"}}
    members = {hook: Transcoder(128, 128, 64, sparsary.ENCODERS["topk"](k=4)).eval() for hook in hooks}
    return Stack(members, {out: about | {"hooks_in": [into], "hooks_out": [out]} for out, into in hooks.items()})


def test_hooks_with_widths_and_sites(m):
    found = {hook.name: hook for hook in m.hooks()}
    assert found[HOOK].width == 128
    assert (found[HOOK].layer, "resid_post" in found[HOOK].sites) == (2, True)
    assert found["transformer.h.0.mlp.c_proj:out" if "transformer.h.0.mlp.c_proj:out" in found else "transformer.h.0.mlp:out"]


def test_activations_of_a_text_with_its_tokens(m):
    x = m.activations(TEXT, HOOK)
    assert x.shape == (len(x.tokens), 128) == (len(x), 128)
    assert "".join(x.tokens).replace(" ", "").endswith("1741")
    ids = m.token_ids(TEXT)
    torch.testing.assert_close(x.values, m.activations(ids, (HOOK,))[HOOK][0])
    assert np.asarray(x).dtype == np.float32
    with pytest.raises(ValueError, match="expected at least one token, got ''"):
        m.activations("", HOOK)


def test_a_model_in_memory_is_the_same(m):
    again = sparsary.LanguageModel.from_pretrained(m.module, m.tokenizer)
    torch.testing.assert_close(again.activations(TEXT, HOOK).values, m.activations(TEXT, HOOK).values)
    with pytest.raises(ValueError, match="tokenizer: expected the model's tokenizer"):
        sparsary.LanguageModel.from_pretrained(m.module)


def test_a_dictionary_and_its_latents(m, d):
    assert (d.hook, d.model_id, d.recipe["tokens"]) == (HOOK, "embedded", 3000)
    assert "96 latents" in repr(d)
    x = m.activations(TEXT, HOOK)
    code = d.encode(x)
    latents, values = code[5]
    assert len(latents) == len(values) == 5
    batch = m.activations(m.token_ids(TEXT), (HOOK,))[HOOK]
    assert d(batch).shape == batch.shape
    torch.testing.assert_close(d(batch)[0], d(x))
    top = d.top_latents(x, n=3)
    strongest = d.activations_of(top[0].latent, x)
    assert float(strongest.max()) == pytest.approx(top[0].value)
    assert d.direction(top[0].latent).shape == (128,)


def test_steering_and_ablation_are_what_directions_say(m, d):
    x = m.activations(TEXT, HOOK)
    latent = d.top_latents(x)[0].latent
    strength = d.activations_of(latent, x)
    ids = m.token_ids(TEXT)
    from sparsary.training.activations.hooked_model import next_token_loss

    def loss_with(delta):
        with m.replacing(HOOK, lambda x: x + delta):
            return float(next_token_loss(m.logits(ids), ids).mean())

    plain = m.loss(TEXT)
    assert m.loss(TEXT, ablate=[(d, latent)]) == pytest.approx(loss_with(-strength[:, None] * d.direction(latent)), rel=1e-4)
    assert m.loss(TEXT, ablate=[(d, latent)]) != pytest.approx(plain, abs=1e-6)
    assert m.loss(TEXT, steer=[(d, latent, 5.0)]) == pytest.approx(loss_with(5.0 * d.direction(latent)), rel=1e-4)
    assert m.loss(TEXT, steer=[(d, latent, 0.0)]) == pytest.approx(plain, rel=1e-5)
    said = m.generate("the war", max_new_tokens=6)
    assert said.startswith("the war")
    assert m.generate("the war", steer=[(d, latent, 0.0)], max_new_tokens=6) == said
    assert m.generate("the war", steer=[(d, latent, 80.0)], max_new_tokens=6) != said


@pytest.mark.parametrize(
    ("how", "entry", "message"),
    [
        ("steer", lambda d: (d, 4), r"steer: expected \(dictionary, latent, amount\), got 2 entries"),
        ("ablate", lambda d: (4, d), r"ablate: expected \(dictionary, latent\), got 2 entries beginning with int"),
        ("ablate", lambda d: (d, 96), "latent: expected 0 to 95, got 96"),
        ("ablate", lambda d: (sparsary.SAE(128, 9, d.encoder), 1), "provenance: expected the hooks"),
    ],
)
def test_what_cannot_be_steered_is_said(m, d, how, entry, message):
    with pytest.raises(ValueError, match=message):
        m.loss(TEXT, **{how: [entry(d)]})


def test_a_graph_of_loaded_transcoders_on_a_model_in_memory(m, stack, tmp_path):
    facts = sparsary.attribution_graph(stack, TEXT, out=tmp_path, model=m, context_tokens=0, max_latents=20)
    assert 0 <= facts["replacement_score"] <= 1
    assert facts.page.is_file()
    assert "transformer.h.0.mlp:out" in repr(stack)


def test_training_on_arrays_needs_no_hook_and_no_file(tmp_path):
    x = np.random.default_rng(0).normal(size=(4000, 16)).astype(np.float32)
    recipe = {"dictionary": {"n_latents": 40, "encoder": TOPK}, "tokens": 4000, "batch_tokens": 500}
    d = sparsary.load(sparsary.train(recipe, activations=x, out_dir=str(tmp_path / "sae")))
    assert (d.d_in, d.n_latents, d.model_id) == (16, 40, None)
    pairs = recipe | {"dictionary": recipe["dictionary"] | {"kind": "transcoder"}}
    t = sparsary.load(sparsary.train(pairs, activations=[(x, x[:, :7])], out_dir=str(tmp_path / "transcoder")))
    assert (t.d_in, t.d_out) == (16, 7)
    with pytest.raises(ValueError, match="recipe: dictionary: "):
        sparsary.train({"tokens": 5}, activations=x, out_dir=str(tmp_path / "none"))


def test_results_are_tables_and_pages(run, tmp_path):
    pytest.importorskip("pandas")
    report = sparsary.evaluate(run, tokens=400)
    assert report.to_pandas().loc[0, "fvu"] == report["fvu"]
    assert "<html" in report.html
    assert "fvu" in report._repr_html_()
    features = sparsary.features(run, tmp_path, tokens=600)
    table = features.to_pandas()
    assert len(table) == 96
    assert "scores.predicate_f1" in table.columns
    with pytest.raises(ValueError, match="page: expected a result with a page"):
        _ = sparsary.Report({"fvu": 0.1}).page
