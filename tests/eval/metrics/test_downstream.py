"""What the model loses, against NumPy on its logits; intervals over documents."""

import numpy as np
import pytest
import torch

from sparsary.eval.bootstrap import RESAMPLES, SEED, ByDocument
from sparsary.eval.heldout import text_batches
from sparsary.eval.metrics.base import DictionaryOutputs, Setting
from sparsary.eval.metrics.downstream import SplicedModel, scattered
from sparsary.eval.metrics.model_outputs import ModelOutputs
from sparsary.eval.undefined import Undefined
from sparsary.sae import ENCODERS, SAE
from sparsary.training.recipe import HarvestSection, TextSection
from sparsary.training.text import Cursor

HOOK = "transformer.h.2:out"


@pytest.fixture(scope="module")
def text(embedded_model):
    """Two batches of held-out contexts to fit on, and two to score."""
    section = HarvestSection(hooks=(HOOK,), tokens=1, heldout=0.3, exclude_leading=2)
    found = list(text_batches(embedded_model, TextSection(context_length=32), section, Cursor(0, 0), 900))
    return found[:2], found[2:4]


@pytest.fixture(scope="module")
def judged(embedded_model, text):
    """A dictionary that is bad enough, its report, and what a plain computation in NumPy starts from."""
    torch.manual_seed(0)
    sae = SAE(128, 67, ENCODERS["topk"](k=5)).requires_grad_(False)
    sae.b_dec.copy_(torch.randn(128))
    setting = Setting(sae, embedded_model.device, model=embedded_model, hook_in=HOOK, hook_out=HOOK, fit_tokens=450)
    group = SplicedModel(setting)
    with torch.no_grad():
        for piece in text[0]:
            group.fit(DictionaryOutputs(setting, ModelOutputs(embedded_model, piece, (HOOK,), with_logits=False)))
        for piece in text[1]:
            group.score(DictionaryOutputs(setting, ModelOutputs(embedded_model, piece, (HOOK,), with_logits=True)))
    return sae, group.report()


def log_probabilities(logits):
    logits = logits.double().numpy()
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_every_figure_equals_numpy(embedded_model, text, judged):
    sae, report = judged
    fitted = torch.cat([embedded_model.activations(piece.token_ids, (HOOK,))[HOOK][piece.kept] for piece in text[0]])
    scored = 0
    found = {name: [] for name in ("clean", "spliced", "zero", "mean", "resample")}
    kl, agrees, owners = {name: [] for name in found}, [], []
    for piece in text[1]:
        rows = torch.cat([piece.kept.flatten().nonzero().flatten()])
        others = fitted[scattered(scored, len(rows), len(fitted))]
        scored += len(rows)

        def changed(x, rows=rows, others=others, name="clean"):
            flat = x.flatten(0, 1).clone()
            of = {"clean": flat[rows], "spliced": sae(flat[rows]), "zero": torch.zeros(len(rows), 128), "resample": others}
            flat[rows] = (of | {"mean": fitted.double().mean(0).float().expand(len(rows), -1)})[name]
            return flat.view(x.shape)

        counted, ids = piece.counted.numpy(), piece.token_ids.numpy()
        owners.append(piece.document_ids[:, :-1][counted])
        clean = None
        for name in found:
            with embedded_model.replacing(HOOK, lambda x, name=name, changed=changed: changed(x, name=name)):
                logs = log_probabilities(embedded_model.logits(piece.token_ids))[:, :-1]
            found[name].append(-np.take_along_axis(logs, ids[:, 1:, None], -1)[..., 0][counted])
            clean = logs if clean is None else clean
            kl[name].append((np.exp(clean) * (clean - logs)).sum(-1)[counted])
            if name == "spliced":
                agrees.append((clean.argmax(-1) == logs.argmax(-1))[counted])
    losses = {name: np.concatenate(parts) for name, parts in found.items()}
    increase = losses["spliced"] - losses["clean"]
    assert report["downstream_tokens"] == len(increase)
    for name, loss in losses.items():
        assert report[f"ce_{name}"] == pytest.approx(loss.mean(), rel=1e-5)
        if name != "clean":
            assert report[f"kl_{name}"] == pytest.approx(np.concatenate(kl[name]).mean(), rel=1e-4)
        if name not in ("clean", "spliced"):
            recovered = (loss.mean() - losses["spliced"].mean()) / (loss.mean() - losses["clean"].mean())
            assert report[f"ce_recovered_{name}"] == pytest.approx(recovered, rel=1e-3)
    assert report["ce_increase"] == pytest.approx(increase.mean(), rel=1e-5)
    assert report["token_ce_increase_median"] == pytest.approx(np.quantile(increase, 0.5), rel=0.02)
    assert report["token_ce_increase_p99"] == pytest.approx(np.quantile(increase, 0.99), rel=0.1)
    assert report["token_ce_better_fraction"] == pytest.approx((increase < 0).mean())
    assert report["top1_agreement"] == np.concatenate(agrees).mean()
    # The interval, by resampling documents one by one.
    owners = np.concatenate(owners)
    documents = [increase[owners == document] for document in np.unique(owners)]
    rng = np.random.default_rng(SEED)
    means = []
    for _ in range(RESAMPLES):
        drawn = [documents[i] for i in rng.integers(len(documents), size=len(documents))]
        means.append(np.concatenate(drawn).mean())
    low, high = np.quantile(means, [0.025, 0.975])
    assert report["ce_increase_low"] == pytest.approx(low, rel=1e-4)
    assert report["ce_increase_high"] == pytest.approx(high, rel=1e-4)
    for key in ("kl_spliced", "top1_agreement", "ce_recovered_zero", "ce_recovered_mean"):
        assert report[f"{key}_low"] < report[key] < report[f"{key}_high"]


def test_other_tokens_are_drawn_alike_however_tokens_are_cut():
    whole = scattered(0, 1000, 97)
    assert torch.equal(torch.cat([scattered(0, 13, 97), scattered(13, 987, 97)]), whole)
    assert set(whole.tolist()) == set(range(97))
    assert torch.bincount(whole).max() < 30


def test_documents_may_come_in_parts_and_one_alone_has_no_interval():
    rng = np.random.default_rng(0)
    owners, values = rng.integers(0, 19, 500), rng.normal(size=500)
    statistics = {"mean": lambda sums: sums["value"] / sums["count"]}
    ends = []
    for cuts in ([], [3, 250], list(range(0, 500, 7))):
        sums = ByDocument(("value", "count"))
        for part in np.split(np.arange(500), cuts):
            sums.update(owners[part], {"value": values[part], "count": np.ones(len(part))})
        ends.append(list(sums.intervals(statistics).values()))
    assert ends[1] == pytest.approx(ends[0], rel=1e-12)
    assert ends[2] == pytest.approx(ends[0], rel=1e-12)
    # About the textbook's: the documents are of about equal size.
    assert ends[0][1] - ends[0][0] == pytest.approx(2 * 1.96 / np.sqrt(500), rel=0.35)
    alone = ByDocument(("value", "count"))
    alone.update(np.zeros(5, dtype=int), {"value": values[:5], "count": np.ones(5)})
    assert "two documents" in alone.intervals(statistics)["mean_low"].reason
    assert isinstance(ByDocument(("value",)).intervals(statistics)["mean_high"], Undefined)


def test_without_a_prediction_everything_is_null_with_a_reason(embedded_model):
    sae = SAE(128, 67, ENCODERS["topk"](k=5))
    report = SplicedModel(Setting(sae, embedded_model.device, model=embedded_model, hook_in=HOOK, hook_out=HOOK)).report()
    assert report.pop("downstream_tokens") == 0
    assert report
    assert all(isinstance(value, Undefined) for value in report.values())
