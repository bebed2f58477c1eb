"""The dark matter's groups: what they read of a piece, the second question of a transcoder, reasons for what is undefined."""

import numpy as np
import pytest
import torch

from sparsary.eval.heldout import TextBatch
from sparsary.eval.metrics.base import DictionaryOutputs, Setting
from sparsary.eval.metrics.dark_matter.metrics import ErrorCost, ErrorSplit
from sparsary.eval.metrics.model_outputs import ModelOutputs
from sparsary.eval.pages.glossary import EXPLANATIONS
from sparsary.eval.undefined import Undefined, settled
from sparsary.sae import ENCODERS, SAE
from sparsary.training.activations.hooked_model import next_token_loss
from sparsary.training.text import Cursor
from sparsary.transcoders.transcoder import Transcoder

HOOK = "transformer.h.2:out"


def on_tensors(dictionary, x, y, **options):
    setting = Setting(dictionary, torch.device("cpu"), options=options)
    group = ErrorSplit(setting)
    half = len(x) // 2
    with torch.no_grad():
        for rows in torch.arange(half).split(100):
            group.fit(DictionaryOutputs(setting, None, (x[rows], y[rows])))
        for rows in torch.arange(half, len(x)).split(77):
            group.score(DictionaryOutputs(setting, None, (x[rows], y[rows])))
    return group.report()


def test_a_transcoder_is_asked_both_questions_and_an_sae_one():
    x, y = torch.randn(900, 6), torch.randn(900, 4)
    found = on_tensors(Transcoder(6, 4, 13, ENCODERS["topk"](k=2)), x, y)
    # Target and input are independent: of the error, y - y_hat(x), the target explains its own part, the input none of that.
    assert found["fvu_nonlinear_on_target"] == pytest.approx(found["reconstruction_variance"], rel=0.03)
    assert found["fvu_nonlinear"] > 1
    assert "linear_error_share_rescaled_on_target" in found
    assert "linear_error_share_rescaled" not in found
    own = on_tensors(SAE(6, 13, ENCODERS["topk"](k=2)), x, x)
    assert "linear_error_share_rescaled" in own
    assert not [key for key in own if key.endswith("_on_target")]


def test_every_entry_is_explained():
    known = {key for entries in EXPLANATIONS.values() for key in entries}
    found = on_tensors(Transcoder(6, 4, 13, ENCODERS["topk"](k=2)), torch.randn(300, 6), torch.randn(300, 4), authors=True)
    found |= on_tensors(SAE(6, 13, ENCODERS["topk"](k=2)), torch.randn(300, 6), torch.randn(300, 6))
    assert set(found) <= known


def test_options_reach_the_fit_and_the_authors_figures_come_when_asked_for():
    x = torch.randn(900, 6) + 3
    found = on_tensors(SAE(6, 13, ENCODERS["topk"](k=2)), x, x, bias=False, ridge=0.01, authors=True)
    assert (found["dark_matter_bias"], found["dark_matter_ridge"]) == (False, 0.01)
    assert found["authors_fvu_total"] == pytest.approx(found["fvu_total"], rel=0.1)
    assert "authors_fvu_total" not in on_tensors(SAE(6, 13, ENCODERS["topk"](k=2)), x, x)


def test_too_few_tokens_are_undefined_with_the_number_that_is_needed():
    values, reasons = settled(on_tensors(SAE(6, 13, ENCODERS["topk"](k=2)), torch.randn(10, 6), torch.randn(10, 6)))
    assert values["fvu_nonlinear"] is None
    assert "fitted on 5 tokens, so that nothing can be said of it. Give at least 70" in reasons["fvu_nonlinear"]


@pytest.fixture
def passages(embedded_model):
    """Two pieces of random tokens, two contexts each; the first position is not kept, and a document ends within."""

    def build(seed):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 900, (2, 40), generator=generator)
        documents = np.repeat([[10 * seed, 10 * seed + 1], [10 * seed + 2] * 2], 20, axis=1).astype(np.int32)
        kept = torch.ones(2, 40, dtype=torch.bool)
        kept[:, 0] = False
        counted = kept[:, :-1] & torch.from_numpy(documents[:, 1:] == documents[:, :-1])
        piece = TextBatch(ids, kept, counted, Cursor(0, 0), {10 * seed}, document_ids=documents)
        return ModelOutputs(embedded_model, piece, (HOOK,), with_logits=True)

    return build


@pytest.fixture
def narrow():
    """An SAE of block 2, judged where it reads: its error is large, and linear in part."""
    sae = SAE(128, 64, ENCODERS["topk"](k=8))
    sae.in_scale.fill_(2.0)
    sae.out_scale.fill_(2.0)
    return sae


def judged(model, sae, fitted, scored):
    setting = Setting(sae, torch.device("cpu"), model=model, hook_in=HOOK, hook_out=HOOK)
    group = ErrorCost(setting)
    with torch.no_grad():
        for passage in fitted:
            group.fit(DictionaryOutputs(setting, passage))
        for passage in scored:
            group.score(DictionaryOutputs(setting, passage))
    return group


def test_the_cost_of_a_part_is_the_loss_of_the_model_with_it_put_back(embedded_model, narrow, passages):
    fitted, scored = [passages(i) for i in range(1, 6)], [passages(i) for i in (6, 7)]
    values, _ = settled(judged(embedded_model, narrow, fitted, scored).report())
    with torch.no_grad():
        x = torch.cat([passage.activations(HOOK) for passage in fitted])
        ones = np.column_stack([x.double().numpy(), np.ones(len(x))])
        e = (x - narrow(x)).double().numpy()
        ridge = 1e-6 * (x.double().pow(2).sum(0).mean().item())
        gram = ones.T @ ones + ridge * np.diag([1.0] * 128 + [0.0])
        a = torch.from_numpy(np.linalg.solve(gram, ones.T @ e)).float()
        losses = {name: [] for name in ("clean", "spliced", "linear", "nonlinear")}
        for passage in scored:
            ids, kept = passage.piece.token_ids, passage.piece.kept.unsqueeze(-1)

            def parts(z):
                flat = z.flatten(0, 1)
                x_hat = narrow(flat)
                linear = flat @ a[:-1] + a[-1]
                changed = {"clean": flat, "spliced": x_hat, "linear": x_hat + linear, "nonlinear": flat - linear}
                return {name: part.view_as(z) for name, part in changed.items()}

            for name, found in losses.items():
                with embedded_model.replacing(HOOK, lambda z, name=name, kept=kept: torch.where(kept, parts(z)[name], z)):
                    logits = embedded_model.logits(ids)
                found.append(next_token_loss(logits, ids)[passage.piece.counted].double())
    ce = {name: float(torch.cat(found).mean()) for name, found in losses.items()}
    for part in ("linear", "nonlinear"):
        assert values[f"ce_spliced_with_{part}_error"] == pytest.approx(ce[part], rel=1e-4)
        share = (ce["spliced"] - ce[part]) / (ce["spliced"] - ce["clean"])
        assert values[f"ce_recovered_by_{part}_error"] == pytest.approx(share, abs=1e-3)
    assert values["share_documents"] == 6
    assert values["norm_fit_tokens"] == sum(int(passage.piece.counted.sum()) for passage in fitted)
    known = {key for section in ("Cost of the error's parts", "What predicts norms") for key in EXPLANATIONS[section]}
    assert set(values) == known


def test_a_single_document_or_too_few_tokens_are_undefined_with_a_reason(embedded_model, narrow, passages):
    values, reasons = settled(judged(embedded_model, narrow, [passages(1)], [passages(2)]).report())
    assert values["ce_recovered_by_linear_error"] is None
    assert (
        "needs more than 129 tokens to fit on, and at least 1290 to be worth it, got 78"
        in (reasons["ce_recovered_by_linear_error"])
    )
    one = passages(3)
    one.piece.document_ids[:] = 5
    report = judged(embedded_model, narrow, [passages(i) for i in range(1, 4)], [one]).report()
    assert report["ce_recovered_by_linear_error"] is not None
    assert isinstance(report["ce_recovered_by_linear_error_low"], Undefined)
    assert "at least two documents" in report["ce_recovered_by_linear_error_low"].reason
