"""Remedies against nonlinear error, several dictionaries in one pass, and the law of their width."""

import math

import numpy as np
import pytest
import torch

from sparsary.eval.heldout import EvalData
from sparsary.eval.metrics.dark_matter.decomposition import DarkMatter, LinearFit
from sparsary.eval.metrics.dark_matter.remedies import EarlierLayer, ErrorParts, parts_of, pursued
from sparsary.eval.metrics.dark_matter.widths import evaluate_widths, fit_width_law
from sparsary.sae import ENCODERS, SAE
from sparsary.sae.pursuit import gradient_pursuit
from sparsary.training.recipe import HarvestSection, TextSection, check_recipe
from sparsary.training.resolve_hooks import resolve_recipe
from sparsary.training.run import train_recipe
from sparsary.training.text import Cursor

HOOK, BEFORE = "transformer.h.2:out", "transformer.h.1:out"


@pytest.fixture
def sae():
    """Free atoms, a bias and a scale, so that none of them can be forgotten; a code whose l0 differs between tokens."""
    sae = SAE(7, 29, ENCODERS["relu"](sparsity=0.1))
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(29, 1) + 0.5)
        sae.b_dec.normal_()
        sae.b_enc.fill_(-0.8)
    sae.in_scale.fill_(1.7)
    sae.out_scale.fill_(1.7)
    return sae.eval()


@torch.no_grad()
def test_the_pursuit_spends_each_token_s_own_l0_on_the_dictionary_s_atoms(sae):
    x = 2 * torch.randn(211, 7)
    code = sae.encode(x)
    found = pursued(sae, x, code)
    assert code.l0().unique().numel() > 3
    assert (found.l0() <= code.l0()).all()
    assert (x - sae.decode(found)).pow(2).sum() < (x - sae.decode(code)).pow(2).sum()
    # In raw units, token by token: what is written is what a pursuit of x - bias with these atoms writes.
    unit = torch.nn.functional.normalize(sae.W_dec, dim=-1)
    for token in range(0, 211, 40):
        steps = int(code.l0()[token])
        alone = gradient_pursuit((x[token : token + 1] / 1.7 - sae.b_dec).double(), unit.double(), steps)
        written = 1.7 * (alone.to_dense(29) @ unit.double() + sae.b_dec)
        torch.testing.assert_close(sae.decode(found)[token], written[0].float(), rtol=1e-3, atol=1e-3)


def test_an_earlier_layer_explains_what_comes_from_it_and_only_that():
    generator = torch.Generator().manual_seed(3)
    fit, score = slice(0, 900), slice(900, 2000)
    z, other = torch.randn(2000, 5, generator=generator).double(), torch.randn(2000, 5, generator=generator).double()
    linear, noise = other @ torch.randn(5, 4).double(), 0.5 * torch.randn(2000, 4).double()
    nonlinear = z @ torch.randn(5, 4).double() + noise
    parts = {"error": linear + nonlinear, "linear": linear, "nonlinear": nonlinear}
    earlier = {"activation": z + other, "reconstruction": z, "linear": other, "nonlinear": z.abs()}
    layer = EarlierLayer(5, 4)
    for scored, rows in ((False, fit), (True, score)):
        for some in torch.arange(2000)[rows].split(130):
            layer.update(scored, {k: v[some] for k, v in parts.items()}, {k: v[some] for k, v in earlier.items()})
    report = layer.report(spread=10.0)

    def left(source, target):
        inputs = np.column_stack([source.numpy(), np.ones(2000)])
        guess = inputs @ np.linalg.lstsq(inputs[fit], target.numpy()[fit], rcond=None)[0]
        return ((target.numpy() - guess)[score] ** 2).sum()

    for source, rows in earlier.items():
        for part, target in parts.items():
            spread = float((target[score] - target[score].mean(0)).pow(2).sum())
            expected = 1 - left(rows, target) / spread
            assert report[f"earlier_r2_of_{part}_from_{source}"] == pytest.approx(expected, abs=1e-5), (part, source)
    assert report["earlier_fvu_nonlinear"] == pytest.approx(left(z, nonlinear) / 10, rel=1e-5)
    assert report["earlier_fvu_nonlinear"] == pytest.approx(float(noise[score].pow(2).sum()) / 10, rel=0.05)
    assert report["earlier_fvu_total"] == pytest.approx(left(z, parts["error"]) / 10, rel=1e-5)
    assert set(EarlierLayer(5, 4).report(1.0).values()) == {None}


def split(sae, x):
    fit = LinearFit(7, 7)
    with torch.no_grad():
        fit.update(x, x - sae(x))
    return DarkMatter(fit)


def test_parts_of_the_error_add_up_and_are_handed_to_training_again_and_again(sae):
    batches = [torch.randn(50, 7) for _ in range(4)]
    matter = split(sae, torch.cat(batches))
    with torch.no_grad():
        parts = parts_of(batches[0], batches[0], sae(batches[0]), matter)
    torch.testing.assert_close(parts["linear"] + parts["nonlinear"], parts["error"])
    tensors = ErrorParts(batches, sae, matter, "nonlinear")
    for _ in range(2):
        found = list(tensors)
        assert len(found) == 4
        torch.testing.assert_close(found[0], parts["nonlinear"].float())
    with pytest.raises(ValueError, match="part: expected one of error, linear, nonlinear, got 'all'"):
        ErrorParts(batches, sae, matter, "all")


def test_a_dictionary_of_the_nonlinear_error_trains_on_tensors(sae, tmp_path):
    batches = [torch.randn(101, 7) for _ in range(8)]
    values = {
        "harvest": {"hooks": ["error:out"], "tokens": 1},
        "dictionary": {"hook": "error:out", "n_latents": 23, "encoder": {"name": "topk", "k": 3}, "init": "random"},
        "tokens": 808,
        "batch_tokens": 101,
        "lr_warmup_steps": 2,
        "out_dir": str(tmp_path / "run"),
    }
    tensors = ErrorParts(batches, sae, split(sae, torch.cat(batches)), "nonlinear")
    assert (train_recipe(resolve_recipe(check_recipe(values, "recipe")), tensors) / "dictionary.safetensors").exists()


@pytest.fixture(scope="module")
def ground(embedded_model):
    exclusions = HarvestSection(hooks=(BEFORE, HOOK), tokens=1, exclude_leading=2)
    return EvalData(embedded_model, TextSection(source="embedded", context_length=64), exclusions)


@pytest.fixture(scope="module")
def judged(ground):
    torch.manual_seed(1)
    saes = {"a": SAE(128, 90, ENCODERS["topk"](k=8)), "b": SAE(128, 150, ENCODERS["topk"](k=8))}
    earlier = SAE(128, 70, ENCODERS["topk"](k=8))
    return saes, earlier, evaluate_widths(ground, (HOOK, HOOK), saes, 2400, (earlier, (BEFORE, BEFORE)))


def rows_of(ground, saes, earlier):
    """Everything as whole matrices: of the documents that fit, and of those that are scored."""
    halves, cursor = [], None
    for tokens in (1200, 1200):
        start = Cursor(0, 0) if cursor is None else Cursor(cursor.document + 1, 0)
        found = []
        for piece in ground.pieces(start, tokens):
            seen = ground.model.activations(piece.token_ids, (BEFORE, HOOK))
            found.append([seen[hook][piece.kept] for hook in (HOOK, BEFORE)])
            cursor = piece.cursor
        x, before = (torch.cat(part) for part in zip(*found, strict=True))
        with torch.no_grad():
            hats = {name: sae(x).double().numpy() for name, sae in saes.items()} | {"earlier": earlier(before).double().numpy()}
        halves.append({"x": x.double().numpy(), "before": before.double().numpy()} | hats)
    return halves


def test_dictionaries_judged_together_get_the_figures_of_whole_matrices(ground, judged):
    saes, earlier, found = judged
    fit, score = rows_of(ground, saes, earlier)

    def regressed(inputs, target):
        z = np.column_stack([inputs(fit), np.ones(len(fit["x"]))])
        penalty = 1e-6 * (inputs(fit).reshape(len(z), -1) ** 2).sum(0).mean() * np.diag([1.0] * (z.shape[1] - 1) + [0.0])
        solved = np.linalg.solve(z.T @ z + penalty, z.T @ target(fit))
        return lambda half: np.column_stack([inputs(half), np.ones(len(half["x"]))]) @ solved

    spread = ((score["x"] - score["x"].mean(0)) ** 2).sum()
    nonlinear, errors = {}, {}
    for name in saes:
        error = errors[name] = lambda half, name=name: half["x"] - half[name]
        linear = regressed(lambda half: half["x"], error)
        nonlinear[name] = lambda half, error=error, linear=linear: error(half) - linear(half)
        report = found.reports[name]
        assert report["fvu_total"] == pytest.approx((error(score) ** 2).sum() / spread, rel=1e-4)
        assert report["fvu_nonlinear"] == pytest.approx((nonlinear[name](score) ** 2).sum() / spread, rel=1e-3)
        after = nonlinear[name](score) - regressed(lambda half: half["earlier"], nonlinear[name])(score)
        assert report["earlier_fvu_nonlinear"] == pytest.approx((after**2).sum() / spread, rel=2e-2)
        assert report["pursued_fvu_total"] < report["fvu_total"]
        assert report["pursued_l0"] <= 8
    for i, one in enumerate(saes):
        for j, other in enumerate(saes):
            target = np.linalg.norm(errors[other](score), axis=1)
            norms = lambda half, one=one: np.linalg.norm(errors[one](half), axis=1)  # noqa: E731
            slope, offset = np.polyfit(norms(fit), np.linalg.norm(errors[other](fit), axis=1), 1)
            r2 = 1 - ((target - slope * norms(score) - offset) ** 2).sum() / ((target - target.mean()) ** 2).sum()
            assert found.scaling["scaling_norm_r2"][i][j] == pytest.approx(r2, abs=1e-3)


def test_all_figures_are_finite_or_none(judged):
    for report in judged[2].reports.values():
        assert not [key for key, value in report.items() if isinstance(value, float) and not math.isfinite(value)]
        assert report["ce_recovered_by_linear_error"] is not None
        assert report["nonlinear_norm_r2_from_activation"] is not None


def test_text_for_one_half_only_is_refused(ground, tmp_path):
    (tmp_path / "t.txt").write_text("The war lasted from the year 1732 to the year 1741. " * 6)
    text = TextSection(source="files", files=(str(tmp_path / "t.txt"),), context_length=64)
    exclusions = ground.exclusions.model_copy(update={"heldout": 0.999})
    with pytest.raises(ValueError, match="none was left to score"):
        evaluate_widths(EvalData(ground.model, text, exclusions), (HOOK, HOOK), {"a": SAE(128, 9, ENCODERS["topk"](k=2))}, 2000)


@pytest.mark.parametrize(("c", "a", "m"), [(0.05, 0.8, -0.6), (0.0, 1.3, -0.25), (0.2, 40.0, -1.5)])
def test_the_width_law_is_recovered(c, a, m):
    widths = [128, 256, 512, 1024, 2048]
    law = fit_width_law(widths, [c + a * w**m for w in widths])
    assert (law.c, law.a, law.m) == pytest.approx((c, a, m), rel=0.05, abs=5e-3)
    assert law.absent_share(512) == pytest.approx(a * 512**m / (c + a * 512**m), abs=0.02)
    assert law(300) == pytest.approx(c + a * 300**m, rel=1e-3)


def test_a_law_of_too_few_widths_is_refused():
    with pytest.raises(ValueError, match="expected at least 4 distinct widths, and an fvu for each, got 3"):
        fit_width_law([1, 2, 4], [3.0, 2.0, 1.0])
    with pytest.raises(ValueError, match="fvus: expected numbers above 0"):
        fit_width_law([1, 2, 4, 8], [3.0, 2.0, 1.0, float("nan")])
