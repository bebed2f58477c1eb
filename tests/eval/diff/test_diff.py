"""`sparsary diff`: crosscoders of two models whose difference is known, the files, and bad input."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sparsary
from sparsary.eval.diff.run import diff
from sparsary.eval.diff.summary import diff_summary, diff_tables
from sparsary.sae.files import read_json
from sparsary.training.activations.shards import ActivationStore, ColumnReader
from sparsary.training.embedded import MODEL_DIR
from sparsary.training.embedded.corpus import embedded_documents
from sparsary.training.recipe import ModelSection

HOOK = "transformer.h.2:out"
# A neuron of block 2 that fires on 4% of the tokens and is rarely weakly active.
NEURON, FIRES = 194, 0.5


def recipe(folder, tuned, **changes):
    dictionary = {"kind": "crosscoder", "hook": HOOK, "n_latents": 96, "encoder": {"name": "batch_topk", "k": 6}}
    return {
        "models": ["embedded", str(tuned)],
        "model": {"device": "cpu"},
        "text": {"context_length": 64},
        "harvest": {"tokens": 24_000, "store": str(folder / "store"), "exclude_leading": 2},
        "dictionary": dictionary,
        "tokens": 60_000,
        "batch_tokens": 500,
        "lr": 3e-3,
        "lr_warmup_steps": 10,
        "calibration_tokens": 8000,
        "dead_after_tokens": 10_000,
        "eval_tokens": 6000,
        "out_dir": str(folder / "run"),
    } | changes


@pytest.fixture(scope="module")
def direction():
    """Return the vector that the neuron writes in the tuned model for an activation of 1."""
    torch.manual_seed(0)
    return 3 * torch.nn.functional.normalize(torch.randn(128), dim=0)


@pytest.fixture(scope="module")
def marked(tmp_path_factory, direction):
    """A copy of the embedded model, one neuron of which also writes a vector that no part of the base writes."""
    folder = tmp_path_factory.mktemp("marked") / "model"
    shutil.copytree(MODEL_DIR, folder)
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.2.mlp.c_proj.weight"][NEURON] += direction
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def marked_run(marked, tmp_path_factory):
    return sparsary.train(recipe(tmp_path_factory.mktemp("run"), marked))


@pytest.fixture(scope="module")
def found(marked_run):
    return diff(str(marked_run), difference_sae=True)


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    """A crosscoder of the embedded model with itself."""
    folder = tmp_path_factory.mktemp("own")
    values = recipe(folder, "embedded", tokens=10_000)
    values["harvest"]["tokens"] = 8000
    return sparsary.train(values)


def test_a_model_against_itself_has_no_exclusive_latents(own_run):
    found = diff(str(own_run), tokens=4000, difference_sae=True)
    assert found["reasons"]["difference_sae"] == "the two models' activations are equal"
    assert "difference_sae" not in found
    assert found["counts"]["tuned_only"] == found["counts"]["base_only"] == found["counts"]["rotated"] == 0
    assert found["counts"]["shared"] > 20
    assert found["latents"] == []
    assert found["mean_difference"]["norm"] == 0
    assert found["patching"]["kl_base"] == 0
    assert "predict the same" in found.html


def test_the_latent_of_what_was_added_is_found(found, direction, marked_run):
    """The base has a latent for where the neuron fires; what it writes there is turned by the vector."""
    assert found["counts"]["rotated"] + found["counts"]["tuned_only"] >= 1
    latent = found["latents"][0]["latent"]
    crosscoder = sparsary.load(marked_run)
    added = (crosscoder.decoder(1)[latent] - crosscoder.decoder(0)[latent]).detach()
    assert float(torch.nn.functional.cosine_similarity(added, direction, dim=0)) > 0.9
    assert found["latents"][0]["cosine"] < 0.8


def test_changed_latents_fire_where_the_neuron_does(found, marked_run, direction):
    crosscoder = sparsary.load(marked_run)
    store = ActivationStore.open(marked_run.parent / "store")
    rows = np.arange(store.tokens("heldout"))
    x = ColumnReader(store, "heldout", [f"x:base/{HOOK}", f"x:tuned/{HOOK}"]).gather(rows)
    base, tuned = crosscoder.split(x)
    wanted = (tuned - base) @ direction / direction.square().sum() > FIRES
    assert 0.01 < float(wanted.float().mean()) < 0.1
    fires = crosscoder.encode(x).to_dense(crosscoder.n_latents) > 0
    scores = []
    for row in found["latents"]:
        fired = fires[:, row["latent"]]
        scores.append(2 * float((fired & wanted).sum()) / float(fired.sum() + wanted.sum()))
    assert max(scores) > 0.7


def test_patches_stand_between_floor_and_ceiling(found):
    closed = {name: each["share"] for name, each in found["patching"]["closed"].items()}
    assert closed["activation"] > 0.9
    # Patches of several directions may come as close, to rounding.
    assert closed["activation"] > max(closed.values()) - 0.005
    assert closed["changed"] > max(closed["random"], closed["unchanged"])


def test_an_sae_on_the_difference_is_a_floor_by_the_same_recipe(found, marked_run, direction):
    sae, crosscoder = sparsary.load(marked_run / "diff" / "difference_sae"), sparsary.load(marked_run)
    assert (sae.n_latents, sae.d_in) == (crosscoder.n_latents, 128)
    assert sae.arguments()["encoder"] == crosscoder.arguments()["encoder"]
    recipes = [found.provenance["recipe"] for found in (sae, crosscoder)]
    for key in ("tokens", "batch_tokens", "lr", "seed", "dead_after_tokens"):
        assert recipes[0][key] == recipes[1][key]
    entry = found["difference_sae"]
    assert 0 < entry["fvu"] < 0.2
    # What was added is one direction, with either sign, as neurons are negative at times.
    rows = (sae.atoms * sae.out_scale)[[row["latent"] for row in entry["latents"]]].detach()
    cosines = torch.nn.functional.cosine_similarity(rows, direction[None], dim=1)
    assert float(cosines[0].abs()) > 0.9
    assert float(cosines.max()) > 0.9
    shares = [row["contribution"] for row in entry["latents"]]
    assert shares == sorted(shares, reverse=True)
    assert 0.1 < sum(shares) < 1.0001
    closed = {name: each["share"] for name, each in found["patching"]["closed"].items()}
    assert closed["activation"] + 0.005 > closed["difference_sae"] > 0.5
    assert "SAE on the difference" in found.html
    assert "SAE on difference" in dict(diff_summary(found))


def test_an_sae_on_the_difference_needs_the_crosscoder_s_store(shifted_run, own_run, tmp_path):
    with pytest.raises(ValueError, match=r"--difference-sae: expected a crosscoder with its recipe, got .* without"):
        diff(str(shifted_run), difference_sae=True)
    for change, message in (
        (None, r"--difference-sae: expected a crosscoder trained from a store, got one trained on live activations"),
        (
            str(tmp_path / "gone"),
            r"--difference-sae: expected the activations .*gone: .*sparsary harvest CHECKPOINT/recipe\.yaml",
        ),
    ):
        copy = shutil.copytree(own_run, tmp_path / f"copy{change is None}")
        path = copy / "dictionary.json"
        config = json.loads(path.read_text())
        config.pop("checksum", None)
        config["provenance"]["recipe"]["harvest"]["store"] = change
        path.write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            diff(str(copy), out=tmp_path / "out", difference_sae=True)


@pytest.fixture(scope="module")
def shifted_run(tmp_path_factory):
    """A tuned model that adds one vector everywhere, and a crosscoder with one latent for it, built by hand."""
    root = tmp_path_factory.mktemp("shifted")
    shutil.copytree(MODEL_DIR, root / "model")
    weights = load_file(root / "model" / "model.safetensors")
    torch.manual_seed(0)
    vector = 6 * torch.nn.functional.normalize(torch.randn(128), dim=0)
    weights["transformer.h.2.mlp.c_proj.bias"] += vector
    save_file(weights, root / "model" / "model.safetensors", {"format": "pt"})
    base = sparsary.LanguageModel.from_pretrained("embedded", device="cpu")
    text = " ".join(next(embedded_documents(1)).text for _ in range(3))
    mean = base.activations(text, HOOK).values[4:].mean(0)
    crosscoder = sparsary.Crosscoder([128, 128], 2, sparsary.ENCODERS["topk"](k=1), names=[f"base/{HOOK}", f"tuned/{HOOK}"])
    with torch.no_grad():
        crosscoder.W_enc.zero_()
        crosscoder.b_enc.copy_(torch.tensor([6.0, 0.0]))
        crosscoder.W_dec.zero_()
        crosscoder.W_dec[0, 128:] = vector / 6
        crosscoder.b_dec.copy_(torch.cat([mean, mean]))
    about = {
        "model": ModelSection(id="embedded", device="cpu", tuned={"id": str(root / "model"), "device": "cpu"}).model_dump(),
        "hooks_in": [f"base/{HOOK}", f"tuned/{HOOK}"],
        "hooks_out": [f"base/{HOOK}", f"tuned/{HOOK}"],
        "text": {"source": "embedded", "context_length": 64},
        "harvest": {"dtype": "float32", "heldout": 0.05, "exclude_special": True, "exclude_leading": 2},
    }
    crosscoder.save(root / "run", about)
    return root / "run"


@pytest.fixture(scope="module")
def shifted(shifted_run):
    return diff(str(shifted_run), tokens=2000)


def test_an_exclusive_latent_is_confirmed_and_closes_the_divergence(shifted):
    found = shifted
    assert found["counts"] == {"base_only": 0, "shared": 0, "rotated": 0, "tuned_only": 1, "uneven": 0, "dead": 1}
    assert found["true_exclusive"] == {"base_only": 0, "tuned_only": 1}
    (latent,) = found["latents"]
    assert latent["relative_norm"] == 1
    assert abs(latent["nu_error"]) < 0.2
    closed = found["patching"]["closed"]
    assert closed["exclusive"]["share"] > 0.8
    assert closed["exclusive"]["share"] == pytest.approx(closed["mean_difference"]["share"], abs=0.01)


def test_the_result_is_written_and_rendered_again(shifted, shifted_run):
    path = shifted_run / "diff" / "diff.json"
    written = read_json(path)
    assert {key: value for key, value in shifted.items() if key not in ("page_path", "path")} == written
    page = path.with_suffix(".html")
    before = page.read_bytes()
    page.unlink()
    assert sparsary.render(path) == page
    assert page.read_bytes() == before
    assert len(shifted.to_pandas()) == len(shifted["latents"])
    assert "sparsary diff" in page.read_text()


def test_figures_of_the_terminal(shifted):
    lines = dict(diff_summary(shifted))
    assert lines["latents"].startswith(f"{shifted['counts']['base_only']} base only")
    (head, *_), *_ = diff_tables(shifted)
    assert head == ["base changed by", "KL closed", "KL left"]


def test_commands_of_one_model_s_predictions_are_refused(shifted_run):
    for command in (sparsary.evaluate, sparsary.probe):
        with pytest.raises(ValueError, match=r"measures the predictions of one model, .* trained on two\. Run: sparsary diff"):
            command(str(shifted_run))


def test_an_sae_is_refused(recipe_values, tmp_path):
    run = sparsary.train(recipe_values)
    with pytest.raises(ValueError, match=r"expected a crosscoder of two models, got kind sae\. Train one with models:"):
        diff(str(run))


def test_a_crosscoder_of_one_model_s_layers_is_refused(tmp_path):
    values = recipe(tmp_path, "embedded", tokens=2000)
    values["harvest"]["tokens"] = 1500
    del values["models"]
    values["dictionary"] = {key: value for key, value in values["dictionary"].items() if key != "hook"} | {
        "hooks": [HOOK, "transformer.h.1:out"]
    }
    run = sparsary.train(values)
    with pytest.raises(ValueError, match=r"one hook of each, got one of transformer\.h\.2:out, transformer\.h\.1:out"):
        diff(str(run))


def test_another_model_in_place_of_the_pair_is_refused(shifted_run, tmp_path):
    copy = shutil.copytree(shifted_run, tmp_path / "copy")
    path = copy / "dictionary.json"
    config = json.loads(path.read_text())
    config.pop("checksum", None)
    config["provenance"]["model"]["tuned"] = None
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="model: expected two models, got embedded alone"):
        diff(str(copy))
