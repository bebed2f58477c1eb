"""Alignment of a start: maps that are folded in exactly, where pairs come from, what is refused, and what a run records."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sparsary
from sparsary.sae import ENCODERS, SAE
from sparsary.sae.encoders import build_encoder
from sparsary.sae.metrics import fvu
from sparsary.training.activations.harvested_rows import HarvestedRows
from sparsary.training.preflight import preflight
from sparsary.training.recipe import check_recipe
from sparsary.training.resolve_hooks import ModelOutline, resolve_recipe
from sparsary.training.warm_start import unpaired
from sparsary.training.warm_start.alignment import preferred_map
from sparsary.training.warm_start.maps import AffineMap, SideMaps, fitted_regression, fitted_rotation, mapped
from sparsary.training.warm_start.pairs import matched_pairs
from sparsary.transcoders import Transcoder

D, D_OUT, N, TOKENS = 16, 12, 40, 400
EARLIER, LATER = "transformer.h.1:out", "transformer.h.2:out"


def drift(d, seed=0, angle=math.inf):
    """Return a rotation as a matrix: by one angle in every plane of a random basis, or any."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    if math.isinf(angle):
        return basis
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    planes = torch.block_diag(*[turn] * (d // 2), *[torch.eye(1, dtype=torch.float64)] * (d % 2))
    return basis @ planes @ basis.T


def rows(d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(TOKENS, d, generator=generator) + torch.randn(d, generator=generator)


def drifted(x, matrix, scale=1.3):
    return (x.double() @ (scale * matrix).T + torch.linspace(-2, 3, x.shape[1])).float()


def randomized(dictionary):
    """Return a dictionary with random weights, scales and biases, as if it were trained."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, tensor in dictionary.state_dict().items():
            if name.split(".")[0] in ("b_dec", "b_enc", "W_enc", "W_skip", "in_centre"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * (0.25 if tensor.ndim > 1 else 0.3))
        dictionary.W_dec.copy_(F.normalize(torch.randn(dictionary.W_dec.shape, generator=generator), dim=-1))
        dictionary.in_scale.fill_(2.5)
        dictionary.out_scale.fill_(2.5 if isinstance(dictionary, SAE) else 1.7)
        for encoder in dictionary.modules():
            if hasattr(encoder, "r_mag"):
                encoder.r_mag.uniform_(-0.3, 0.3)
                encoder.b_mag.uniform_(-0.3, 0.3)
    return dictionary.eval()


# Maps.


@pytest.mark.parametrize("name", ["topk", "batch_topk", "jumprelu", "gated", "lista", "matching_pursuit"])
def test_a_planted_rotation_scale_and_mean_is_folded_in_exactly(name, encoder_arguments):
    x = rows(D)
    y = drifted(x, drift(D))
    old = randomized(SAE(D, N, build_encoder({"name": name, **encoder_arguments[name]})))
    old.calibrate(x.split(100))
    maps = fitted_rotation(x, y)
    assert maps.scale == pytest.approx(1.3, rel=1e-5)
    new = mapped(old, maps, maps)
    with torch.no_grad():
        code, moved = old.encode(x), new.encode(y)
        # A value at its threshold may round to the other side.
        assert int((code.l0() != moved.l0()).sum()) <= 2
        wanted = drifted(old.decode(code, x), drift(D))
        off = (new(y) - wanted).norm(dim=1) > 1e-4 * wanted.norm(dim=1)
    assert int(off.sum()) <= 2
    torch.testing.assert_close(new.W_dec.norm(dim=1), torch.ones(N))


def linear_map(matrix, offset):
    """Return the maps of any linear drift, in both directions."""
    back = matrix.inverse()
    return SideMaps(AffineMap(matrix, offset), AffineMap(back, -back @ offset), 1.7)


@pytest.mark.parametrize("skip", [False, True])
def test_both_sides_of_a_transcoder_are_mapped(skip):
    x = rows(D)
    A = drift(D) + 0.3 * torch.eye(D)
    B = drift(D_OUT, 1) @ torch.diag(torch.linspace(0.5, 2, D_OUT, dtype=torch.float64))
    sides = [linear_map(matrix, torch.linspace(-2, 3, len(matrix)).double()) for matrix in (A, B)]
    old = randomized(Transcoder(D, D_OUT, N, ENCODERS["relu"](), skip=skip))
    new = mapped(old, *sides)
    with torch.no_grad():
        torch.testing.assert_close(new(sides[0].forward(x)), sides[1].forward(old(x)), rtol=1e-4, atol=1e-4)


def test_a_regression_predicts_a_linear_map():
    x, A = rows(D), drift(D) + 0.3 * torch.eye(D)
    found = fitted_regression(x, x.double() @ A.T + 2)
    torch.testing.assert_close(found.matrix, A, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found(x), (x.double() @ A.T + 2).float(), rtol=1e-4, atol=1e-4)


def test_an_sae_that_subtracts_no_bias_is_mapped():
    x = rows(D)
    y = drifted(x, drift(D))
    old = randomized(SAE(D, N, ENCODERS["relu"](), apply_b_dec_to_input=False))
    maps = fitted_rotation(x, y)
    with torch.no_grad():
        torch.testing.assert_close(mapped(old, maps, maps)(y), drifted(old(x), drift(D)), rtol=1e-3, atol=1e-3)


def test_a_regression_is_taken_only_if_it_is_better_by_a_margin():
    errors = {"none": 0.5, "rotation": 0.1, "rotation_regression": 0.0995, "regression": 0.2}
    assert preferred_map(errors) == "rotation"
    assert preferred_map(errors | {"rotation_regression": 0.098}) == "rotation_regression"
    assert preferred_map({"none": 0.1, "rotation": 0.1}) == "none"


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_the_reconstruction_of_every_encoder_turns_the_map(name, encoder_arguments, monkeypatch):
    monkeypatch.setattr(unpaired, "STEPS", 3)
    x = rows(D)
    old = randomized(SAE(D, N, build_encoder({"name": name, **encoder_arguments[name]})))
    old.calibrate(x.split(100))
    maps = unpaired.unpaired_rotation(old, x, torch.device("cpu"))
    turned = maps.forward.matrix / maps.scale
    assert float((turned - torch.eye(D)).abs().max()) > 1e-4
    torch.testing.assert_close(turned @ turned.T, torch.eye(D, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(maps.back(maps.forward(x)), x, rtol=1e-4, atol=1e-4)


# Runs on vectors.


@pytest.fixture(scope="module")
def base(planted, tmp_path_factory):
    """Return planted rows and the folder of an SAE trained on them."""
    x, folder = planted(4000, 5), tmp_path_factory.mktemp("base")
    values = {"dictionary": {"n_latents": 23, "encoder": {"name": "topk", "k": 3}}, "tokens": 40_000, "batch_tokens": 100}
    sparsary.train(values | {"out_dir": str(folder / "old"), "lr": 3e-3}, x)
    np.save(folder / "x.npy", x.numpy())
    return x, folder


@pytest.fixture
def run(base, tmp_path):
    """Return a function that continues the SAE on rows, and the record of its start."""

    def train(out, y, align, **changes):
        section = {"start": {"path": str(base[1] / "old"), "align": align}, **changes.pop("dictionary", {})}
        values = {"dictionary": section, "tokens": 1000, "batch_tokens": 100, "lr_warmup_steps": 3, "save_every": 3}
        folder = sparsary.train(values | {"out_dir": str(tmp_path / out)} | changes, y)
        return folder, json.loads((folder / "dictionary.json").read_text())["provenance"]["start"]

    return train


def judged(folder, x):
    with torch.no_grad():
        return float(fvu(x, sparsary.load(folder)(x)))


def test_a_run_is_aligned_by_vectors_of_the_same_rows(base, run, caplog):
    x, folder = base
    with caplog.at_level("INFO"):
        _, record = run("new", drifted(x, drift(17)), {"files": [str(folder / "x.npy")]})
    found, first = record["alignment"], judged(folder / "old", x)
    assert record["as_read"]["fvu"] > 5 * first
    assert record["before"]["fvu"] < 1.01 * first
    assert found["fvu"]["none"] > 5 * found["fvu"]["rotation"]
    assert found["map"] == preferred_map(found["fvu"])
    assert found["fvu"].keys() == {"none", "rotation", "rotation_regression", "regression"}
    assert (found["by"], found["fitted_tokens"], found["judged_tokens"]) == (f"the vectors {folder / 'x.npy'}", 3000, 1000)
    assert found["scale"] == pytest.approx(1.3, rel=1e-4)
    assert "aligned to the vectors" in caplog.text


def test_files_are_paired_with_files_row_by_row(base, run, tmp_path):
    x, folder = base
    np.save(tmp_path / "y.npy", drifted(x, drift(17)).numpy())
    align = {"files": [str(folder / "x.npy")], "tokens": 800}
    _, record = run("new", None, align, harvest={"files": [str(tmp_path / "y.npy")], "heldout": 0.1})
    assert record["alignment"]["fvu"]["rotation"] < 1.2 * judged(folder / "old", x)
    assert record["judged_on"] == "training"
    np.save(tmp_path / "fewer.npy", x[1:].numpy())
    with pytest.raises(ValueError, match=r"align.files: expected as many vectors as in harvest.files, 4,000, got 3,999"):
        run("other", None, {"files": [str(tmp_path / "fewer.npy")]}, harvest={"files": [str(tmp_path / "y.npy")]})


def test_a_map_that_does_not_help_leaves_the_dictionary(base, run, planted, tmp_path):
    x, folder = base
    np.save(tmp_path / "unrelated.npy", planted(4000, 6).numpy())
    _, record = run("new", x, {"files": [str(tmp_path / "unrelated.npy")]})
    assert record["alignment"]["map"] == "none"
    assert record["alignment"]["scale"] == 1
    assert record["before"]["fvu"] == pytest.approx(judged(folder / "old", x), rel=1e-3)


def test_a_small_drift_is_undone_without_pairs(base, run):
    x, folder = base
    y = drifted(x, drift(17, angle=0.5), scale=2.0)
    _, record = run("new", y, "unpaired")
    assert record["alignment"]["by"] == "its own reconstruction"
    assert record["as_read"]["fvu"] > 3 * judged(folder / "old", x)
    assert record["before"]["fvu"] < 1.2 * judged(folder / "old", x)


def test_an_aligned_run_is_resumed_without_the_vectors(base, run, tmp_path, stopped_after, assert_same_tensors):
    x, _ = base
    pairs = tmp_path / "pairs.npy"
    np.save(pairs, x.numpy())
    y, align = drifted(x, drift(17)), {"files": [str(pairs)], "tokens": 400}
    whole, first = run("whole", y, align)
    with stopped_after(5):
        run("parts", y, align)
    pairs.unlink()
    parts, second = run("parts", y, align)
    assert_same_tensors(sparsary.load(whole), sparsary.load(parts))
    assert first == second


def test_too_few_tokens_or_another_width_are_refused(base, run, tmp_path):
    x, folder = base
    with pytest.raises(ValueError, match=r"align.tokens: expected at least 34 tokens to fit a map on.*got 40 in all"):
        run("few", x, {"files": [str(folder / "x.npy")], "tokens": 40})
    np.save(tmp_path / "narrow.npy", x[:, :9].numpy())
    with pytest.raises(ValueError, match=r"align.files: expected vectors of width 17, as the start has, got 9"):
        run("narrow", x, {"files": [str(tmp_path / "narrow.npy")]})
    with pytest.raises(ValueError, match=r"align: expected files or unpaired with activations given in Python.*model embedded"):
        run("model", x, "embedded")
    with pytest.raises(ValueError, match=r"align: .*old does not record the model that it was trained on. Name it"):
        run("unknown", x, "auto")


# Runs on models: the residual stream one block earlier stands for that of another model.


@pytest.fixture
def earlier(tmp_path):
    """Return the folder of an SAE of the embedded model's stream behind the block before, which keeps its largest numbers."""
    sae = SAE(128, 256, ENCODERS["topk"](k=40))
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([torch.eye(128), -torch.eye(128)]))
        sae.copy_atoms_to_encoder()
    sae.eval().save(tmp_path / "earlier", {"hook": EARLIER, "model": {"id": "embedded"}})
    return tmp_path / "earlier"


@pytest.fixture
def values(recipe_values, earlier):
    """Return a recipe that continues that SAE one block later, aligned by what its files record."""
    section = {"hook": LATER, "start": {"path": str(earlier), "align": {"tokens": 900}}}
    recipe_values["harvest"] |= {"tokens": 3000}
    return recipe_values | {"dictionary": section, "tokens": 404}


def test_models_and_stores_give_the_same_pairs(values, tmp_path):
    """The map is fitted on the same tokens, whichever side is read from a store."""
    store = str(tmp_path / "both")
    sparsary.harvest(values | {"harvest": values["harvest"] | {"hooks": [EARLIER, LATER], "store": store}})
    live = {"harvest": values["harvest"] | {"store": None, "live_buffer_tokens": 900}}
    stored = {"harvest": values["harvest"] | {"store": store}}
    by_store = {
        "dictionary": values["dictionary"]
        | {"start": values["dictionary"]["start"] | {"align": {"store": store, "tokens": 900}}}
    }
    found = {}
    for name, changes in {
        "live, model": live,
        "stored, model": stored,
        "live, store": live | by_store,
        "stored, store": stored | by_store,
    }.items():
        folder = sparsary.train(values | changes | {"out_dir": str(tmp_path / name)})
        found[name] = json.loads((folder / "dictionary.json").read_text())["provenance"]["start"]["alignment"]
    first = found["live, model"]
    assert first["by"] == "the model embedded"
    assert found["live, store"]["by"] == f"the store {store}"
    assert (first["fitted_tokens"], first["judged_tokens"]) == (675, 225)
    assert first["map"].endswith("regression")
    assert first["fvu"][first["map"]] < 0.9 * first["fvu"]["none"]
    for other in found.values():
        assert other["fvu"] == pytest.approx(first["fvu"], rel=1e-3)


def test_both_sides_of_a_transcoder_are_fitted_on_their_own_pairs(values, tmp_path):
    old = randomized(Transcoder(128, 128, 200, ENCODERS["topk"](k=20)))
    hooks = {"hooks_in": ["transformer.h.0.mlp:in"], "hooks_out": ["transformer.h.0.mlp:out"]}
    old.save(tmp_path / "transcoder", hooks | {"model": {"id": "embedded"}})
    start = {"path": str(tmp_path / "transcoder"), "align": {"tokens": 900}}
    section = {"kind": "transcoder", "layer": 1, "site": "mlp", "start": start}
    harvest = values["harvest"] | {"hooks": [], "store": None, "live_buffer_tokens": 900}
    folder = sparsary.train(values | {"dictionary": section, "harvest": harvest})
    record = json.loads((folder / "dictionary.json").read_text())["provenance"]["start"]
    assert record["alignment"]["map"].endswith("regression")
    assert record["alignment"]["fvu"][record["alignment"]["map"]] < 0.8 * record["alignment"]["fvu"]["rotation"]
    # What was judged is what the run begins with: latents are ranked by values times norms, which stay.
    assert record["before"]["fvu"] < 0.8 * record["as_read"]["fvu"]
    assert record["changes"] == []


def test_rows_are_matched_by_document_and_position_and_other_texts_are_refused():
    places = torch.arange(200, dtype=torch.int32)
    labels = {"token": places % 7, "document": places // 10, "offset": places % 10, "position": places % 10}
    first = HarvestedRows(labels, {"x:a:out": places[:, None].float()})
    sides = ((("a:out",), ("a:out",)), (("b:out",), ("b:out",)))
    second = HarvestedRows(labels, {"x:b:out": -places[:, None].float()})
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:150]
    pairs = matched_pairs(first, second.select(order), sides, "here")
    assert len(pairs) == 150
    assert torch.equal(pairs.own.x, -pairs.runs.x)
    # Behind another context an activation is another one.
    shifted = HarvestedRows(labels | {"position": places % 10 + (places < 50)}, second.tensors)
    assert len(matched_pairs(first, shifted, sides, "here")) == 150
    other = HarvestedRows(labels | {"token": (places + 1) % 7}, second.tensors)
    with pytest.raises(
        ValueError, match=r"here: expected the text and the tokenizer of the recipe, got other tokens at 200 of 200"
    ):
        matched_pairs(first, other, sides, "here")


def test_a_plan_says_by_what_it_is_aligned(values):
    member = resolve_recipe(check_recipe(values, "recipe"))
    lines = dict(preflight(member).lines(member))
    # A map is there for the other hook.
    assert "doubtful" not in lines
    assert lines["start"].endswith("topk, k 40; aligned by the model embedded, if that lowers its error")


def test_what_cannot_be_aligned_is_refused_before_the_run(values, earlier, tmp_path, monkeypatch):
    def refused(match, align, path=earlier, **section):
        start = {"dictionary": values["dictionary"] | {"start": {"path": str(path), "align": align}} | section}
        start["harvest"] = values["harvest"] | {"hooks": []}
        with pytest.raises(ValueError, match=match) as error:
            preflight(resolve_recipe(check_recipe(values | start, "recipe")))
        assert len(str(error.value).splitlines()) == 1

    refused(
        r"align: expected another model than the recipe's, or another hook, got embedded at .*h.1:out", "auto", hook=EARLIER
    )
    refused(r"align.files: expected them with harvest.files", {"files": ["x.npy"]})
    refused(r"align.store: .*is not in|nowhere", {"store": str(tmp_path / "nowhere")})
    refused(r"align: expected one of model, store, files, unpaired, got store and unpaired", {"store": "s", "unpaired": True})
    refused(r"align.column: expected null without files", {"column": "x"})
    refused(r"start.align: expected none with path mlp", "auto", path="mlp", kind="transcoder", hook=None, layer=1, site="mlp")
    transcoder = {"kind": "transcoder", "hook": None, "layer": 1, "site": "mlp"}
    refused(r"align.unpaired: expected it with kind sae only, got kind transcoder", "unpaired", **transcoder)
    crosscoder = {"kind": "crosscoder", "hook": None, "hooks": [EARLIER, LATER]}
    refused(r"align: expected null with kind crosscoder", "auto", **crosscoder)
    SAE(128, N, ENCODERS["topk"](k=3), row_norm="layer_norm").save(tmp_path / "normed", {"hook": EARLIER})
    refused(r"normed normalizes the inputs of every token \(layer_norm\)", "embedded", path=tmp_path / "normed")
    digests = {"embedded": "one"}
    monkeypatch.setattr(ModelOutline, "tokenizer_sha256", lambda self: digests.pop(self.section.id, "two"))
    refused(r"align.model: expected the tokenizer of embedded, so that both models read the same token ids", "auto")
