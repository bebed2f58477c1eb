"""Latents set, added to, scaled and clamped while the model runs, and text generated so."""

import pytest
import torch

from sparsary.sae import ENCODERS, SAE
from sparsary.training.activations.insertions import Insertion, Intervention
from sparsary.training.activations.model import LanguageModel
from sparsary.training.activations.splice import generate, model_spliced
from sparsary.transcoders.cross_layer import CrossLayerTranscoder
from sparsary.transcoders.transcoder import Transcoder

HOOK = "transformer.h.1:out"
VOCABULARY = 53


@pytest.fixture
def gpt2():
    import transformers

    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_layer=3, n_embd=12, n_head=2, eos_token_id=None, bos_token_id=None
    )
    module = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        # Small random weights make every prediction the same.
        for parameter in module.parameters():
            parameter.mul_(6)
    return LanguageModel(module, None, "tiny", None)


@pytest.fixture
def ids():
    return torch.randint(0, VOCABULARY, (2, 7))


def topk():
    return ENCODERS["topk"](k=3)


@pytest.fixture
def sae():
    dictionary = SAE(12, 31, topk()).eval()
    with torch.no_grad():
        dictionary.out_scale.fill_(2.5)
        dictionary.b_dec.normal_()
    return dictionary


@pytest.fixture
def insertion(sae):
    return Insertion(sae, (HOOK,), (HOOK,))


def logits_of(model, ids, insertion, *edits, **arguments):
    with torch.no_grad(), model_spliced(model, [insertion], edits=edits, **arguments):
        return model.run(ids)


def with_atoms(model, ids, sae, latents, amounts):
    """The model with so much of each atom added at its hook, ``amounts`` being (contexts, positions, latents)."""
    step = sae.out_scale * (amounts @ sae.W_dec[latents])
    with torch.no_grad(), model.replacing(HOOK, lambda x: x + step):
        return model.run(ids)


@pytest.fixture
def dense(gpt2, ids, sae):
    x = gpt2.activations(ids, (HOOK,))[HOOK]
    with torch.no_grad():
        return sae.encode(x.flatten(0, 1)).to_dense(31).view(2, 7, 31)


@pytest.fixture
def latents(dense):
    """Two that fire here and there, one that never does."""
    often = dense.gt(0).sum((0, 1))
    silent = int((often == 0).nonzero()[0])
    return [*often.topk(2).indices.tolist(), silent]


@pytest.mark.parametrize("add_error", [False, True])
@pytest.mark.parametrize("change", [("scale", {"value": 1.0}), ("add", {"value": 0.0}), ("clamp", {"low": -9.0, "high": 99.0})])
def test_an_edit_that_changes_nothing_leaves_the_logits(gpt2, ids, insertion, latents, change, add_error):
    edit = Intervention(change[0], latents, **change[1])
    plain = logits_of(gpt2, ids, insertion, add_error=add_error)
    torch.testing.assert_close(logits_of(gpt2, ids, insertion, edit, add_error=add_error), plain, rtol=1e-4, atol=1e-4)


def test_setting_to_zero_with_the_error_takes_the_atoms_away(gpt2, ids, insertion, sae, dense, latents):
    found = logits_of(gpt2, ids, insertion, Intervention("set", latents, 0.0), add_error=True)
    expected = with_atoms(gpt2, ids, sae, latents, -dense[..., latents])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, gpt2.logits(ids), atol=1e-2)


@pytest.mark.parametrize(
    ("edit", "amount"),
    [
        ({"operation": "set", "value": 3.0}, lambda z: 3.0 - z),
        ({"operation": "set", "value": [1.0, 2.0, 3.0]}, lambda z: torch.tensor([1.0, 2.0, 3.0]) - z),
        ({"operation": "add", "value": -2.0}, lambda z: torch.full_like(z, -2.0)),
        ({"operation": "scale", "value": torch.tensor(4.0)}, lambda z: 3 * z),
        ({"operation": "clamp", "low": 1.5}, lambda z: z.clamp(min=1.5) - z),
        ({"operation": "clamp", "high": 0.1}, lambda z: z.clamp(max=0.1) - z),
    ],
)
def test_edits_add_what_they_say_at_the_positions_they_say(gpt2, ids, insertion, sae, dense, latents, edit, amount):
    mask = torch.rand(2, 7) < 0.5
    some = torch.zeros(2, 7, dtype=torch.bool)
    some[:, [1, 4]] = True
    for positions, where in (("all", torch.ones(2, 7) > 0), ([4, 1], some), (mask, mask)):
        found = logits_of(gpt2, ids, insertion, Intervention(latents=latents, positions=positions, **edit), add_error=True)
        expected = with_atoms(gpt2, ids, sae, latents, where.unsqueeze(-1) * amount(dense[..., latents]))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_positions_count_from_the_context_s_start_when_some_are_not_kept(gpt2, ids, insertion, sae, latents):
    kept = torch.ones(2, 7, dtype=torch.bool)
    kept[:, :2] = kept[1, 5] = False
    found = logits_of(gpt2, ids, insertion, Intervention("add", latents, 2.0, positions=[4]), add_error=True, kept=kept)
    amounts = torch.zeros(2, 7, 3)
    amounts[:, 4] = 2.0
    torch.testing.assert_close(found, with_atoms(gpt2, ids, sae, latents, amounts), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"positions: expected positions that are replaced .* got \[5\]"):
        logits_of(gpt2, ids, insertion, Intervention("add", latents, 2.0, positions=[4, 5]), kept=kept)


def test_edits_follow_one_another(gpt2, ids, insertion, sae, dense, latents):
    edits = Intervention("set", latents, 1.0), Intervention("scale", latents[1:], 3.0), Intervention("add", latents[2:], 1.0)
    found = logits_of(gpt2, ids, insertion, *edits, add_error=True)
    expected = with_atoms(gpt2, ids, sae, latents, torch.tensor([1.0, 3.0, 4.0]) - dense[..., latents])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_codes_are_those_in_force_and_pass_gradients_to_the_strength(gpt2, ids, insertion, latents):
    strength = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    with model_spliced(gpt2, [insertion], edits=[Intervention("set", latents, strength)]) as run:
        gpt2.run(ids)[:, -1, 0].sum().backward()
    assert torch.equal(run.codes[0, 0].columns(torch.tensor(latents)), strength.expand(14, 3))
    assert run.codes[0, 0].values.grad is not None
    assert (strength.grad != 0).all()


def test_a_latent_of_a_cross_layer_transcoder_is_edited_in_every_layer_it_writes_to(gpt2, ids):
    clt = CrossLayerTranscoder(3, 36, 36, 93, topk()).eval()
    clt.out_scale.copy_(torch.tensor([1.0, 2.0, 3.0]).repeat_interleave(12))
    hooks = [tuple(f"transformer.h.{layer}.mlp:{side}" for layer in range(3)) for side in ("in", "out")]
    edit = Intervention("add", [5], 2.0, positions=[3], site=1)
    found = logits_of(gpt2, ids, Insertion(clt, *hooks), edit, add_error=True)
    step = torch.zeros(2, 7, 24)
    step[:, 3] = 2.0 * clt.out_scale[12:] * clt.W_dec[1].detach()[5]
    adding = {hook: lambda y, part=part: y + part for hook, part in zip(hooks[1][1:], step.split(12, -1), strict=True)}
    with torch.no_grad(), gpt2.hooked(adding):
        torch.testing.assert_close(gpt2.run(ids), found, rtol=1e-4, atol=1e-4)


def continued(model, ids, count, insertion, edits=lambda length: (), **arguments):
    """Greedy text by plain runs."""
    for _ in range(count):
        logits = logits_of(model, ids, insertion, *edits(ids.shape[1]), **arguments)
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


def test_greedy_text_is_that_of_plain_runs(gpt2, ids, insertion, latents):
    plain = generate(gpt2, ids, 6)
    assert torch.equal(plain, continued(gpt2, ids, 6, insertion, add_error=True))
    assert torch.equal(generate(gpt2, ids, 6, insertions=[insertion]), continued(gpt2, ids, 6, insertion))
    texts = []
    for positions, edited in (("all", range), ([2, 5], lambda _: (2, 5)), ("new", lambda length: range(7, length))):
        edits = [Intervention("add", latents, 9.0, positions=positions)]
        texts.append(generate(gpt2, ids, 6, insertions=[insertion], edits=edits, add_error=True))

        def same(length, edited=edited):
            return [Intervention("add", latents, 9.0, positions=list(edited(length)))]

        assert torch.equal(texts[-1], continued(gpt2, ids, 6, insertion, same, add_error=True))
    for text, other in ((texts[0], texts[1]), (texts[1], texts[2]), (texts[2], plain), (texts[0], plain)):
        assert not torch.equal(text, other)
    # What is predicted at the prompt's end is not touched by edits behind it.
    assert torch.equal(texts[2][:, 7], plain[:, 7])


def test_masks_of_the_prompt_serve_for_what_follows_it(gpt2, ids, insertion, latents):
    mask, kept = torch.zeros(2, 7, dtype=torch.bool), torch.ones(2, 7, dtype=torch.bool)
    mask[0, 3] = True
    kept[:, :2] = False
    found = generate(gpt2, ids, 4, insertions=[insertion], edits=[Intervention("set", latents, 9.0, positions=mask)], kept=kept)
    text = ids
    for _ in range(4):
        longer = torch.nn.functional.pad(mask, (0, text.shape[1] - 7)), torch.ones(2, text.shape[1], dtype=torch.bool)
        longer[1][:, :2] = False
        logits = logits_of(gpt2, text, insertion, Intervention("set", latents, 9.0, positions=longer[0]), kept=longer[1])
        text = torch.cat([text, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, text)


def test_sampled_text_is_the_seed_s_and_leaves_the_model_and_the_random_state_alone(gpt2, ids, insertion):
    clean, state = gpt2.logits(ids), torch.get_rng_state()
    first = generate(gpt2, ids, 9, temperature=1.5, seed=3, insertions=[insertion])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(generate(gpt2, ids, 9, temperature=1.5, seed=3, insertions=[insertion]), first)
    assert not torch.equal(generate(gpt2, ids, 9, temperature=1.5, seed=4, insertions=[insertion]), first)
    assert first.shape == (2, 16)
    assert torch.equal(first[:, :7], ids)
    assert torch.equal(gpt2.logits(ids), clean)


def test_temperature_is_the_one_asked_for_and_no_token_is_left_out(gpt2, ids):
    """Frequencies of the first token of many samples are those of the softmax; transformers keeps fifty tokens by default."""
    many = ids[:1].expand(6000, -1)
    found = torch.bincount(generate(gpt2, many, 1, temperature=5.0)[:, -1], minlength=VOCABULARY) / 6000
    expected = (gpt2.logits(ids[:1])[0, -1] / 5.0).softmax(-1)
    assert (found - expected).abs().max() < 0.03
    rare = expected.argsort()[:3]
    assert found[rare].sum() == pytest.approx(float(expected[rare].sum()), abs=4 * float(expected[rare].sum() / 6000) ** 0.5)


def test_the_embedded_model_is_steered(embedded_model):
    """Adding an atom that writes to one token's logit makes that token likelier."""
    ids = embedded_model.tokenizer("<bos> Then, Mary and Kevin went to the", return_tensors="pt")["input_ids"]
    unembedding = embedded_model.module.lm_head.weight.detach()
    dictionary = Transcoder(128, 128, 31, topk()).eval()
    wanted = embedded_model.tokenizer(" garden")["input_ids"][-1]
    with torch.no_grad():
        dictionary.W_dec[7] = unembedding[wanted] / unembedding[wanted].norm()
    insertion = Insertion(dictionary, ("transformer.h.3.mlp:in",), ("transformer.h.3.mlp:out",))
    edits = [Intervention("add", [7], 60.0)]
    text = generate(embedded_model, ids, 1, insertions=[insertion], edits=edits, add_error=True)
    assert text[0, -1] == wanted
    assert generate(embedded_model, ids, 1, insertions=[insertion], add_error=True)[0, -1] != wanted


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            {"operation": "ad", "latents": [3]},
            r"operation: expected one of set, add, scale, clamp, got 'ad'\. Did you mean 'add'",
        ),
        ({"operation": "set", "latents": [3]}, "set: expected value, and neither low nor high"),
        ({"operation": "clamp", "latents": [3], "value": 1.0}, "clamp: expected low, high or both, and no value"),
        ({"operation": "set", "latents": [], "value": 0.0}, "latents: expected at least one"),
        ({"operation": "set", "latents": [1, 2, 3], "value": [0.0, 1.0]}, r"one for each of 3 latents, got shape \(2,\)"),
        ({"operation": "set", "latents": [3], "value": 0.0, "positions": "last"}, "expected all, new, a list"),
        ({"operation": "set", "latents": [3, 31], "value": 0.0}, r"edit: latents: expected 0 to 30, got \[31\]"),
        ({"operation": "set", "latents": [-1], "value": 0.0}, r"edit: latents: expected 0 to 30, got \[-1\]"),
        ({"operation": "set", "latents": [3, 3], "value": 0.0}, "expected each at most once"),
        ({"operation": "set", "latents": [3], "value": 0.0, "insertion": 1}, "edit: insertion: expected 0 to 0, got 1"),
        ({"operation": "set", "latents": [3], "value": 0.0, "site": 1}, "edit: site: expected 0 to 0, got 1"),
        (
            {"operation": "set", "latents": [3], "value": 0.0, "positions": [2, 7]},
            r"expected 0 to 6, the context's last, got \[7\]",
        ),
        ({"operation": "set", "latents": [3], "value": 0.0, "positions": "new"}, "which only generate has"),
        ({"operation": "set", "latents": [3], "value": 0.0, "positions": torch.ones(2, 6) > 0}, r"mask .* = \(2, 7\)"),
    ],
)
def test_edits_that_make_no_sense_are_refused(gpt2, ids, insertion, edit, message):
    with pytest.raises(ValueError, match=message):
        logits_of(gpt2, ids, insertion, Intervention(**edit))


def test_numbers_out_of_range_are_refused(gpt2, ids):
    with pytest.raises(ValueError, match="max_new_tokens: expected at least 1, got 0"):
        generate(gpt2, ids, 0)
    with pytest.raises(ValueError, match="temperature: expected 0"):
        generate(gpt2, ids, 1, temperature=-1.0)
