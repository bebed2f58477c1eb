"""Transcoders, stacks and cross-layer transcoders judged in the embedded model."""

import math

import pytest
import torch

from sparsary.eval.pages.stack import EXPLANATIONS, render_stack
from sparsary.eval.report.evaluate import evaluate
from sparsary.eval.report.stack import ReplacedLayer, _reconstructed, judge_stack
from sparsary.eval.report.summary import report_summary
from sparsary.sae import ENCODERS, SAE
from sparsary.sae.files import read_json
from sparsary.training.activations.insertions import Insertion
from sparsary.training.activations.splice import model_spliced
from sparsary.training.text import Cursor
from sparsary.transcoders.cross_layer import CrossLayerTranscoder
from sparsary.transcoders.transcoder import Transcoder

READS, WRITES = ([f"transformer.h.{layer}.mlp:{side}" for layer in range(4)] for side in ("in", "out"))
SOURCE = {
    "model": {"id": "embedded", "device": "cpu"},
    "text": {"source": "embedded", "context_length": 32},
    "harvest": {"exclude_leading": 2},
    "recipe": {"eval_tokens": 1200},
    "training_tokens": 12_345,
}


def topk(k=8):
    return ENCODERS["topk"](k=k)


@pytest.fixture(scope="module")
def activations(embedded_model):
    """Inputs and outputs of every MLP on a few thousand tokens of training text."""
    from sparsary.eval.heldout import eval_data

    where = eval_data(SOURCE, (*READS, *WRITES))
    rows = {hook: [] for hook in (*READS, *WRITES)}
    for piece in where.pieces(Cursor(0, 0), 3000):
        for hook, x in embedded_model.activations(piece.token_ids, (*READS, *WRITES)).items():
            rows[hook].append(x[piece.kept])
    return {hook: torch.cat(parts) for hook, parts in rows.items()}


def least_squares(x, y):
    ones = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    solution = torch.linalg.lstsq(ones, y.double()).solution.float()
    return solution[:-1].T, solution[-1]


@pytest.fixture(scope="module")
def linear(activations):
    """For every layer a transcoder of which only the skip does anything, fitted by least squares."""
    found = []
    for reads, writes in zip(READS, WRITES, strict=True):
        dictionary = Transcoder(128, 128, 67, topk(), skip=True).eval()
        with torch.no_grad():
            skip, bias = least_squares(activations[reads], activations[writes])
            dictionary.W_skip.copy_(skip)
            dictionary.b_dec.copy_(bias)
            dictionary.b_enc.fill_(-1e6)
        found.append(dictionary)
    return found


def save(dictionary, folder, reads, writes):
    dictionary.save(folder, SOURCE | {"hooks_in": list(reads), "hooks_out": list(writes)})
    return str(folder)


@pytest.fixture(scope="module")
def stack(linear, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stack")
    for layer, dictionary in enumerate(linear):
        save(dictionary, folder / f"layer={layer}", READS[layer : layer + 1], WRITES[layer : layer + 1])
    return folder


@pytest.fixture(scope="module")
def report(stack):
    return evaluate(str(stack))


def test_a_transcoder_s_fvu_is_of_its_target_and_stands_beside_the_affine_floor(stack):
    """That of a least-squares map is the floor itself, but for the text it was fitted on."""
    # Fewer tokens and the fitted floor is too high: it has 129 coefficients per dimension.
    found = evaluate(str(stack / "layer=1"), tokens=4000)
    assert found["hook"] == f"{READS[1]} -> {WRITES[1]}"
    assert found["fvu"] == pytest.approx(found["fvu_affine"], rel=0.15)
    assert 0.01 < found["fvu_affine"] < 0.9
    assert found["l0_mean"] == 0
    assert found["ce_clean"] < found["ce_spliced"] < found["ce_zero"]
    assert 0.2 < found["ce_recovered_mean"] < 1
    # No linear map predicts what is left.
    assert found["linear_error_share"] < 0.1
    assert "affine map" in dict(report_summary(found))["fvu"]
    assert "fvu_affine" in (stack / "layer=1" / "report.html").read_text()


def test_the_model_runs_on_the_transcoder_in_place_of_the_mlp(embedded_model, stack, linear, no_page):
    """The reported cross-entropy is that of a model whose MLP was taken out by hand, positions left out aside."""
    from sparsary.eval.heldout import eval_data
    from sparsary.training.activations.hooked_model import next_token_loss

    found = evaluate(str(stack / "layer=1"))
    where = eval_data(SOURCE, (READS[1], WRITES[1]))
    fitted = list(where.pieces(Cursor(0, 0), 600))[-1].cursor
    total, tokens = 0.0, 0
    for piece in where.pieces(Cursor(fitted.document + 1, 0), 600):
        x = embedded_model.activations(piece.token_ids, (READS[1],))[READS[1]]
        with torch.no_grad():
            y_hat = linear[1](x.flatten(0, 1)).view(x.shape)
        with embedded_model.replacing(WRITES[1], lambda y, p=piece, z=y_hat: torch.where(p.kept.unsqueeze(-1), z, y)):
            losses = next_token_loss(embedded_model.logits(piece.token_ids), piece.token_ids)[piece.counted]
        total, tokens = total + float(losses.double().sum()), tokens + len(losses)
    assert found["downstream_tokens"] == tokens
    assert found["ce_spliced"] == pytest.approx(total / tokens, rel=1e-5)


def test_a_stack_is_judged_whole_and_by_layer(stack, report):
    saved = read_json(stack / "report.json")
    assert saved == {key: value for key, value in report.items() if key != "report_path"}
    for key, value in saved.items():
        assert isinstance(value, str | int | float | None | list), key
        for item in value if isinstance(value, list) else [value]:
            assert not isinstance(item, float) or math.isfinite(item), key
        assert not key.startswith("layer_") or len(value) == 4, key
    assert report["kind"] == "stack of transcoders"
    assert report["layer_hooks"] == [f"{a} -> {b}" for a, b in zip(READS, WRITES, strict=True)]
    assert report["ce_clean"] < max(report["layer_ce_spliced"]) < report["ce_spliced"] < report["ce_mean"]
    assert 0 < report["top1_mean"] < report["top1_agreement"] < min(report["layer_top1_spliced"]) < 1
    assert report["fvu_layer_mean"] == pytest.approx(sum(report["layer_fvu"]) / 4)
    assert report["training_tokens"] == 12_345


def test_a_layer_alone_is_what_its_own_report_says(stack, report, no_page):
    for layer in (0,):
        alone = evaluate(str(stack / f"layer={layer}"))
        for key, other in (("fvu", "fvu"), ("ce_spliced", "ce_spliced"), ("ce_zero", "ce_zero"), ("ce_mean", "ce_mean")):
            assert report[f"layer_{key}"][layer] == pytest.approx(alone[other], rel=1e-5), key
        assert report["layer_kl_spliced"][layer] == pytest.approx(alone["kl_spliced"], rel=1e-4)
        assert report["layer_top1_spliced"][layer] == alone["top1_agreement"]
        assert report["ce_clean"] == alone["ce_clean"]


def test_a_cross_layer_transcoder_that_is_a_stack_is_judged_as_one(linear, stack, tmp_path, no_page):
    """Without skips, for it has none: its latents are those of per-layer transcoders."""
    clt = CrossLayerTranscoder(4, 512, 512, 4 * 67, topk()).eval()
    with torch.no_grad():
        for layer in range(4):
            clt.W_dec[layer][:, 128:] = 0
            single = Transcoder(128, 128, 67, topk()).eval()
            for name in ("W_enc", "b_enc"):
                getattr(single, name).copy_(getattr(clt, name)[layer])
            single.W_dec.copy_(clt.W_dec[layer][:, :128])
            save(single, tmp_path / "stack" / str(layer), READS[layer : layer + 1], WRITES[layer : layer + 1])
    whole = evaluate(save(clt, tmp_path / "clt", READS, WRITES), tokens=400)
    parts = evaluate(str(tmp_path / "stack"), tokens=400)
    assert whole["kind"] == "cross_layer_transcoder"
    for key, value in parts.items():
        if isinstance(value, float) or (isinstance(value, list) and value and isinstance(value[0], float)):
            assert whole[key] == pytest.approx(value, rel=1e-4, abs=1e-4), key


def test_a_stack_of_one_is_the_same_at_once_and_alone(linear, tmp_path, no_page):
    save(linear[2], tmp_path / "a", READS[2:3], WRITES[2:3])
    found = evaluate(str(tmp_path), tokens=300)
    for name in ("spliced", "zero", "mean"):
        assert found[f"ce_{name}"] == found[f"layer_ce_{name}"][0]


def test_each_layer_of_a_cross_layer_transcoder_is_reconstructed_from_all_before_it(activations):
    clt = CrossLayerTranscoder(4, 512, 512, 4 * 67, topk()).eval()
    insertion = Insertion(clt, tuple(READS), tuple(WRITES))
    layers = [ReplacedLayer((0, layer), READS[layer], WRITES[layer]) for layer in range(4)]
    rows = {hook: x[:50] for hook, x in activations.items()}
    with torch.no_grad():
        codes, outputs = _reconstructed([insertion], layers, rows)
        x = torch.cat([rows[hook] for hook in READS], dim=1)
        torch.testing.assert_close(torch.cat(outputs, dim=1), clt(x))
        expected = clt.encode(x).to_dense(4 * 67)
    torch.testing.assert_close(torch.cat([code.to_dense(67) for code in codes], dim=1), expected)


def test_saes_and_transcoders_may_stand_side_by_side(stack, linear, tmp_path, no_page):
    save(linear[1], tmp_path / "a", READS[1:2], WRITES[1:2])
    hook = "transformer.h.2:out"
    sae = SAE(128, 67, topk())
    sae.save(tmp_path / "b", SOURCE | {"hook": hook})
    found = evaluate(str(tmp_path), tokens=300)
    assert found["layer_hooks"] == [f"{READS[1]} -> {WRITES[1]}", hook]
    assert found["kind"] == "stack of transcoders and saes"


def test_what_does_not_fit_together_is_refused(linear, tmp_path, no_page):
    save(linear[0], tmp_path / "a", READS[:1], WRITES[:1])
    save(linear[1], tmp_path / "b", READS[:1], WRITES[:1])
    with pytest.raises(ValueError, match=r"expected one dictionary for each hook, got a and b"):
        evaluate(str(tmp_path))
    other = SOURCE | {"hooks_in": READS[1:2], "hooks_out": WRITES[1:2], "harvest": {"exclude_leading": 3}}
    linear[1].save(tmp_path / "b", other)
    with pytest.raises(
        ValueError, match=r"harvest: expected dictionaries trained on the same harvest, but transformer\.h\.1\.mlp:out"
    ):
        evaluate(str(tmp_path))
    save(Transcoder(128, 96, 67, topk()), tmp_path / "b", READS[1:2], WRITES[1:2])
    with pytest.raises(ValueError, match=r"transformer\.h\.1\.mlp:out: expected width 96, the dictionary's d_out, got 128"):
        evaluate(str(tmp_path))
    with pytest.raises(ValueError, match="expected one checkpoint for --oracle, --pursuit or activations, got a stack"):
        evaluate(str(tmp_path), activations=torch.randn(9, 128))


def test_targets_are_judged_without_a_model(tmp_path, no_page):
    x = torch.randn(600, 7)
    y = x @ torch.randn(7, 5) + 0.5 * torch.randn(600, 5)
    dictionary = Transcoder(7, 5, 23, topk(3))
    dictionary.save(tmp_path)
    found = evaluate(str(tmp_path), activations=(x, y))
    assert found["tokens"] == 300
    assert found["fvu"] > found["fvu_affine"] > 0
    assert report_summary(found)
    with torch.no_grad():
        expected = (y[300:] - dictionary.eval()(x[300:])).pow(2).sum() / (y[300:] - y[300:].mean(0)).pow(2).sum()
    assert found["fvu"] == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(ValueError, match="targets: tensor 0: expected targets for a transcoder"):
        evaluate(str(tmp_path), activations=x)
    with pytest.raises(ValueError, match=r"activations: y: expected \(600, 5\), got \(600, 4\)"):
        evaluate(str(tmp_path), activations=(x, y[:, :4]))
    SAE(7, 23, topk(3)).save(tmp_path / "sae")
    with pytest.raises(ValueError, match="expected x alone for a sae"):
        evaluate(str(tmp_path / "sae"), activations=(x, x))


def test_the_error_is_regressed_on_what_is_read(tmp_path, no_page):
    """Half of a linear map is missing: all of that error is linear in x, though none of it need be in y."""
    x = torch.randn(2000, 7)
    A = torch.randn(5, 7)
    dictionary = Transcoder(7, 5, 23, topk(3), skip=True)
    with torch.no_grad():
        dictionary.W_skip.copy_(A / 2)
        dictionary.b_enc.fill_(-1e6)
    dictionary.save(tmp_path)
    found = evaluate(str(tmp_path), activations=(x, x @ A.T))
    assert found["linear_error_share"] == pytest.approx(1, abs=1e-6)
    assert found["fvu"] == pytest.approx(0.25, abs=0.02)


def test_judging_leaves_the_dictionaries_where_the_model_is(linear, embedded_model):
    insertions = [Insertion(linear[0], (READS[0],), (WRITES[0],))]
    found = judge_stack(insertions, SOURCE, 400)
    assert found["tokens"] >= 200
    ids = torch.randint(3, 900, (1, 9))
    with model_spliced(embedded_model, insertions):
        assert embedded_model.logits(ids).isfinite().all()


def test_the_page_shows_every_figure(report):
    html = render_stack({key: value for key, value in report.items() if key != "report_path"})
    for key in EXPLANATIONS:
        assert f"<code>{key}</code>" in html
    shown = {key for key in report if not key.startswith("layer_") and isinstance(report[key], int | float)}
    assert shown - set(EXPLANATIONS) <= {"stack_report_version", "training_tokens"}
    assert html.count("<svg") == 2
    assert "all at once" in html
    assert "transformer.h.3.mlp" in html
    # The name of SVG in scripts is no address.
    assert "http" not in html.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    lines = report_summary(report)
    assert lines[0] == ("stack", lines[0][1])
    assert len(lines) == 8 + 4
    assert lines[-1][0] == "transformer.h.3.mlp"
