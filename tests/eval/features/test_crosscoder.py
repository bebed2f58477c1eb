"""Features of a crosscoder: contexts, each latent's decoder norms by site, and the logits that its last site reaches."""

import pytest
import torch

from sparsary import features
from sparsary.eval.features.logit_lens import unembedding
from sparsary.sae import ENCODERS, SAE
from sparsary.transcoders import Crosscoder

HOOKS = ["transformer.h.1:out", "transformer.h.3:out"]


def test_records_have_each_site_s_share_of_the_decoder_norm(tmp_path, embedded_model):
    torch.manual_seed(0)
    crosscoder = Crosscoder([128, 128], 40, ENCODERS["topk"](k=4), names=HOOKS)
    with torch.no_grad():
        crosscoder.W_dec[7, :128] = 0
        crosscoder.in_scale.fill_(0.5)
        crosscoder.out_scale.fill_(0.5)
    about = {"model": {"id": "embedded"}, "text": {"source": "embedded"}, "hooks_in": HOOKS, "hooks_out": HOOKS}
    crosscoder.save(tmp_path, about)
    found = features(tmp_path, tokens=1500)
    records = found.records_of(range(40))
    shares = torch.tensor([record["sites"] for record in records])
    torch.testing.assert_close(shares, crosscoder.relative_norms().detach(), rtol=1e-3, atol=1e-4)
    assert records[7]["sites"] == [0.0, 1.0]
    assert sum(not record["dead"] for record in records) > 10
    assert found["hooks_out"] == HOOKS
    assert "decoder norms" in (tmp_path / "features" / "features.html").read_text()
    # As the SAE of the last site alone would have it.
    sae = SAE(128, 40, ENCODERS["topk"](k=4))
    with torch.no_grad():
        sae.W_dec.copy_(crosscoder.W_dec[:, 128:])
        sae.out_scale.fill_(0.5)
    ours = unembedding(crosscoder, embedded_model, about)
    theirs = unembedding(sae, embedded_model, {"hook": HOOKS[1]})
    assert not isinstance(ours, str)
    torch.testing.assert_close(ours.written, theirs.written)
    assert records[7]["logits"]["promoted"][0]["effect"] == pytest.approx(
        float((ours.written[7] @ ours.readers.T - (ours.written[7] @ ours.readers.T).mean()).max()), rel=1e-3
    )


def test_a_crosscoder_of_two_models_has_the_logits_of_both(tmp_path, embedded_model):
    hooks = ["base/transformer.h.3:out", "tuned/transformer.h.3:out"]
    torch.manual_seed(0)
    crosscoder = Crosscoder([128, 128], 40, ENCODERS["topk"](k=4), names=hooks)
    words = [embedded_model.tokenizer.decode([token]) for token in range(len(embedded_model.tokenizer))]
    transformer = embedded_model.module.transformer
    with torch.no_grad():
        for side, word in enumerate(("coin", "ring")):
            row = transformer.wte.weight[words.index(word)] / transformer.ln_f.weight
            crosscoder.W_dec[7, 128 * side : 128 * (side + 1)] = row
    about = {"model": {"id": "embedded", "tuned": {"id": "embedded"}}, "text": {"source": "embedded"}}
    crosscoder.save(tmp_path, about | {"hooks_in": hooks, "hooks_out": hooks})
    found = features(tmp_path, tokens=1500)
    (record,) = found.records_of([7])
    assert record["logits_base"]["promoted"][0]["token"] == "coin"
    assert record["logits"]["promoted"][0]["token"] == "ring"
    assert found["models"] == ["embedded", "embedded"]
    page = (tmp_path / "features" / "features.html").read_text()
    assert "embedded and embedded" in page
    assert "', base model'" in page
