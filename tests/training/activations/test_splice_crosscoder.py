"""A crosscoder in a model: its code is that of the unmodified model, at every site that it replaces."""

import pytest
import torch

from sparsary.sae import ENCODERS, SAE
from sparsary.training.activations.insertions import Insertion, Intervention
from sparsary.training.activations.splice import generate, model_spliced
from sparsary.transcoders import Crosscoder

HOOKS = ("transformer.h.0:out", "transformer.h.2.mlp:in", "transformer.h.2:out")
IDS = torch.arange(3, 17).view(2, 7)


@pytest.fixture(scope="module")
def crosscoder(embedded_model):
    torch.manual_seed(0)
    built = Crosscoder([128, 128, 128], 61, ENCODERS["topk"](k=5), names=HOOKS)
    with torch.no_grad():
        built.b_dec.normal_(std=0.1)
        for parameter in (built.W_enc, built.W_dec):
            parameter.add_(0.05 * torch.randn_like(parameter))
    return built.eval()


@pytest.fixture(scope="module")
def clean(embedded_model):
    return embedded_model.activations(IDS, HOOKS)


def inserted(crosscoder, *written):
    return Insertion(crosscoder, HOOKS, HOOKS, written or None)


def replaced_by_hand(model, outputs):
    """Logits of the model with fixed tensors at some hooks."""
    with model.hooked({hook: lambda _, y=y: y for hook, y in outputs.items()}):
        return model.logits(IDS)


@pytest.mark.parametrize("written", [(0,), (1,), (2,), (0, 2), ()], ids=str)
def test_sites_get_the_reconstruction_of_the_unmodified_model(embedded_model, crosscoder, clean, written):
    with torch.no_grad():
        y_hat = crosscoder([clean[hook] for hook in HOOKS])
        code = crosscoder.encode([clean[hook] for hook in HOOKS])
        with model_spliced(embedded_model, [inserted(crosscoder, *written)]) as splice:
            logits = embedded_model.logits(IDS)
    sites = written or (0, 1, 2)
    expected = replaced_by_hand(embedded_model, {HOOKS[site]: y_hat[site] for site in sites})
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert set(splice.codes) == {(0, site) for site in sites}
    for found in splice.codes.values():
        assert torch.equal(found.latents, code.latents)
    assert not torch.allclose(logits, embedded_model.logits(IDS), atol=1e-2)


def test_the_model_is_restored_and_errors_added_back_change_nothing(embedded_model, crosscoder):
    before = embedded_model.logits(IDS)
    with torch.no_grad(), model_spliced(embedded_model, [inserted(crosscoder)], add_error=True):
        torch.testing.assert_close(embedded_model.logits(IDS), before, rtol=0, atol=0)
    torch.testing.assert_close(embedded_model.logits(IDS), before, rtol=0, atol=0)


def test_tokens_that_are_not_replaced_keep_the_model_s_own(embedded_model, crosscoder, clean):
    kept = torch.ones_like(IDS, dtype=torch.bool)
    kept[:, :3] = False
    with torch.no_grad(), model_spliced(embedded_model, [inserted(crosscoder)], kept=kept):
        logits = embedded_model.logits(IDS)
    torch.testing.assert_close(logits[:, :3], embedded_model.logits(IDS)[:, :3])
    y_hat = [torch.where(kept[..., None], y, clean[hook]) for hook, y in zip(HOOKS, crosscoder([*clean.values()]), strict=True)]
    expected = replaced_by_hand(embedded_model, dict(zip(HOOKS, y_hat, strict=True)))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_an_edit_acts_at_every_site(embedded_model, crosscoder, clean):
    edit = Intervention("add", [7], 3.0)
    with torch.no_grad(), model_spliced(embedded_model, [inserted(crosscoder)], edits=[edit]):
        logits = embedded_model.logits(IDS)
        code = crosscoder.encode([clean[hook] for hook in HOOKS])
        changed = code.to_dense(61).unflatten(0, IDS.shape)
        changed[..., 7] += 3.0
        y_hat = crosscoder.split(crosscoder.decode(changed))
    expected = replaced_by_hand(embedded_model, dict(zip(HOOKS, y_hat, strict=True)))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"latents: expected 0 to 60, got \[61\]"):
        model_spliced(embedded_model, [inserted(crosscoder)], edits=[Intervention("add", [61], 1.0)]).__enter__()


def test_it_stands_beside_other_dictionaries_and_generates(embedded_model, crosscoder):
    torch.manual_seed(1)
    sae = SAE(128, 31, ENCODERS["topk"](k=4)).eval()
    other = Insertion(sae, ("transformer.h.1:out",), ("transformer.h.1:out",))
    with torch.no_grad(), model_spliced(embedded_model, [other, inserted(crosscoder, 2)]) as splice:
        embedded_model.logits(IDS)
    # Its code does not see what the SAE does to the layer before.
    expected = crosscoder.encode(list(embedded_model.activations(IDS, HOOKS).values()))
    assert torch.equal(splice.codes[1, 2].latents, expected.latents)
    longer = generate(embedded_model, IDS, 3, insertions=[inserted(crosscoder)])
    assert longer.shape == (2, 10)
    assert torch.equal(longer[:, :7], IDS)


def test_a_site_of_another_width_is_named(embedded_model, crosscoder):
    hooks = (*HOOKS[:2], "transformer.h.2.mlp.c_fc:out")
    wanted = r"x: expected 3 sites of widths 128, 128, 128, got 3 of 128, 128, 512"
    with model_spliced(embedded_model, [Insertion(crosscoder, hooks, hooks)]), pytest.raises(ValueError, match=wanted):
        embedded_model.logits(IDS)
    with pytest.raises(ValueError, match="hooks_in: expected 3, one per site of the dictionary, got 2"):
        Insertion(crosscoder, HOOKS[:2], HOOKS[:2])
