"""Circuits through transcoders: terms add up to pre-activations, and predict what interventions do."""

import math

import pytest
import torch

from sparsary.eval.attribution_graphs.paths import KINDS, Circuit, Term
from sparsary.eval.virtual_weights.attention_heads import by_source
from sparsary.eval.virtual_weights.linear_readers import readers
from sparsary.sae import ENCODERS, SAE
from sparsary.training.activations.architecture import Architecture

T, S = 5, 2


@pytest.fixture(params=["gpt2", "gpt_neox", "llama"])
def circuit(request, tiny_model, random_transcoders):
    anatomy = Architecture(tiny_model(request.param))
    return Circuit(anatomy, random_transcoders(anatomy.d_model), torch.randint(3, 41, (7,)))


def pre_activation(circuit, layer, latent, position):
    """As the encoder has it."""
    built = circuit.weights.transcoders[layer]
    x = built.normalised(circuit.trace.layers[layer].mlp_in[0, position : position + 1])
    return float((x @ built.W_enc[latent] + built.b_enc[latent]).sum())


def all_terms(circuit, probe):
    return circuit.decompose(probe).largest(10**6)


def test_terms_add_up_to_the_pre_activation(circuit):
    for latent in (0, 7, 18):
        decomposition = circuit.decompose(circuit.latent(2, latent, T))
        assert decomposition.total() == pytest.approx(pre_activation(circuit, 2, latent, T), rel=1e-9, abs=1e-9)
        terms = decomposition.largest(10**6)
        assert sum(term.value for term in terms) == pytest.approx(decomposition.total(), rel=1e-9, abs=1e-9)
        kinds = set(KINDS) - {"mlp"} - ({"position"} if circuit.anatomy.W_P is None else set())
        assert {term.kind for term in terms} | {"attention bias"} == kinds
        assert math.fsum(decomposition.of_kind(kind) for kind in kinds) == pytest.approx(decomposition.total(), rel=1e-9)
        # Nothing from the future, greatest first.
        assert all(term.source is None or term.source <= T for term in terms)
        assert [abs(term.value) for term in terms] == sorted((abs(term.value) for term in terms), reverse=True)


def test_every_term_that_can_be_opened_is_what_it_opens_to(circuit):
    probe = circuit.latent(2, 3, T)
    terms = [term for term in all_terms(circuit, probe) if term.kind in ("head", "latent", "skip")]
    assert {term.kind for term in terms} == {"head", "latent", "skip"}
    for term in terms:
        opened = circuit.open(probe, term)
        assert circuit.decompose(opened).total() == pytest.approx(term.value, rel=1e-8, abs=1e-9)
    # One level further down, from a latent, which may be one of a gated encoder.
    parent = next(term for term in terms if term.kind == "latent" and term.layer == 1)
    opened = circuit.open(probe, parent)
    for term in all_terms(circuit, opened):
        if term.kind in ("head", "latent", "skip"):
            total = circuit.decompose(circuit.open(opened, term)).total()
            assert total == pytest.approx(term.value, rel=1e-8, abs=1e-9)


def test_layers_without_a_transcoder_are_one_term_each(circuit):
    some = Circuit(circuit.anatomy, {2: circuit.weights.transcoders[2]}, circuit.token_ids)
    decomposition = some.decompose(some.latent(2, 7, T))
    assert [term.layer for term in decomposition.others if term.kind == "mlp"] == [0, 1]
    assert decomposition.latents == {}
    assert decomposition.total() == pytest.approx(pre_activation(circuit, 2, 7, T), rel=1e-9, abs=1e-9)


def test_logits_add_up(circuit):
    logits = circuit.trace.logits[0, T]
    assert circuit.decompose(circuit.logit(9, T)).total() == pytest.approx(float(logits[9]), rel=1e-9, abs=1e-9)
    difference = circuit.decompose(circuit.logit(9, T, against=4)).total()
    assert difference == pytest.approx(float(logits[9] - logits[4]), rel=1e-9, abs=1e-9)


def test_leaves_and_rests_of_a_tree_add_up_and_with_all_branches_nothing_rests(circuit):
    probe = circuit.latent(2, 7, T)
    expected = pre_activation(circuit, 2, 7, T)
    for levels, branches in ((1, 3), (3, 2)):
        tree = circuit.tree(probe, levels, branches)
        assert tree.term.value == pytest.approx(expected, rel=1e-9, abs=1e-9)
        paths = tree.paths()
        assert all(path[0] == tree.term and 2 <= len(path) <= levels + 1 for path in paths)
        assert sum(path[-1].value for path in paths) + tree.rests() == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert len(tree.children) == branches
        assert abs(tree.rest) > 1e-3
    some = circuit.tree(probe, 3, 2, kinds=("latent", "token"))
    assert {term.kind for path in some.paths() for term in path[1:]} == {"latent", "token"}
    total = sum(path[-1].value for path in some.paths()) + some.rests()
    assert total == pytest.approx(expected, rel=1e-9, abs=1e-9)
    short = Circuit(circuit.anatomy, circuit.weights.transcoders, circuit.token_ids[:2])
    tree = short.tree(short.latent(1, 7, 1), levels=3, branches=10**6)
    assert tree.rest == pytest.approx(0, abs=1e-9)
    assert tree.rests() == pytest.approx(0, abs=1e-8)
    # In parallel blocks an MLP does not read its own block's heads.
    assert max(map(len, tree.paths())) == (3 if circuit.anatomy.parallel else 4)


def test_the_embedded_model_s_terms_add_up_in_single_precision(embedded_model, random_transcoders):
    anatomy = Architecture(embedded_model)
    circuit = Circuit(anatomy, random_transcoders(128, torch.float32), torch.randint(3, 900, (11,)))
    probe = circuit.latent(2, 7, 8)
    decomposition = circuit.decompose(probe)
    size = sum(abs(term.value) for term in decomposition.largest(10**6))
    assert decomposition.total() == pytest.approx(pre_activation(circuit, 2, 7, 8), rel=1e-4, abs=1e-5 * size)
    for term in decomposition.largest(30):
        if term.kind in ("head", "latent", "skip"):
            opened = circuit.decompose(circuit.open(probe, term))
            size = sum(abs(part.value) for part in opened.largest(10**6))
            assert opened.total() == pytest.approx(term.value, rel=1e-4, abs=1e-5 * size)


def measured_change(circuit, lower, latent, position, upper, upper_latent, at, head=None):
    """By how much an upper pre-activation changes in the model itself when a lower latent is taken out of its MLP's output.

    All other MLPs and heads are held as they were, and so are denominators; one head may be let through, its pattern held.
    """
    model, anatomy, trace = circuit.anatomy.model, circuit.anatomy, circuit.trace
    built = circuit.weights.transcoders[lower]
    code = circuit.codes[lower]
    value = code.values[(code.token_ids() == position) & (code.latents == latent)].sum()
    out = trace.layers[lower].mlp_out.clone()
    out[0, position] -= value * built.W_dec[latent] * built.out_scale
    changes, streams = {}, {}
    for layer, block in enumerate(anatomy.blocks):
        held, sites = trace.layers[layer], block.sites()
        written = out if layer == lower else held.mlp_out
        changes[sites["mlp"][1]] = lambda _, y=written: y
        changes[sites["attn_heads"][0]] = lambda _, z=held.z: z.flatten(2)
        if head is not None and layer == head[0]:
            changes[sites["resid_pre"][0]] = lambda x: streams.__setitem__("attention", x.clone())

            def mix(_, held=held, weights=anatomy.layers[layer], index=head[1]):
                normed = weights.attention_norm.apply(streams["attention"], held.attention_scale)
                v = normed @ weights.W_V[index].T + weights.b_V[index]
                z = held.z.clone()
                z[:, :, index] = held.pattern[:, index] @ v
                return z.flatten(2)

            changes[sites["attn_heads"][0]] = mix
        if layer == upper:
            mid = sites["resid_pre" if anatomy.parallel else "resid_mid"][0]
            changes[mid] = lambda x: streams.__setitem__("mid", x.clone())
    with model.hooked(changes):
        model.logits(circuit.token_ids[None])
    x = anatomy.layers[upper].mlp_norm.apply(streams["mid"], trace.layers[upper].mlp_scale)[0, at]
    vectors, constants = readers(circuit.weights.transcoders[upper], torch.tensor([upper_latent]))
    return float(vectors[0] @ x + constants[0]) - pre_activation(circuit, upper, upper_latent, at)


def test_ablating_a_latent_changes_the_later_one_by_its_term(circuit):
    decomposition = circuit.decompose(circuit.latent(2, 7, T))
    for term in decomposition.largest(10**6):
        if term.kind == "latent":
            change = measured_change(circuit, term.layer, term.latent, T, 2, 7, T)
            assert change == pytest.approx(-term.value, rel=1e-7, abs=1e-9)


def test_ablating_a_latent_elsewhere_acts_through_a_head_by_the_path_s_value(circuit):
    probe = circuit.latent(2, 7, T)
    head = next(
        term for term in all_terms(circuit, probe) if (term.kind, term.layer, term.head, term.source) == ("head", 1, 1, S)
    )
    terms = circuit.decompose(circuit.open(probe, head)).largest(10**6)
    latents = [term for term in terms if term.kind == "latent"]
    assert len(latents) == 4
    for term in latents:
        assert (term.layer, term.position) == (0, S)
        change = measured_change(circuit, 0, term.latent, S, 2, 7, T, head=(1, 1))
        assert change == pytest.approx(-term.value, rel=1e-7, abs=1e-9)


def test_a_latent_of_an_attention_output_dictionary_opens_into_heads_and_sources(circuit):
    anatomy, layer = circuit.anatomy, 1
    sae = SAE(anatomy.n_heads * anatomy.d_head, 19, ENCODERS["topk"](k=3)).double().requires_grad_(False)
    sae.in_scale.fill_(1.7)
    index = torch.tensor([6])
    sources = by_source(sae, circuit.trace.layers[layer], index, torch.tensor([T]))[0, 0, 0]
    parts = readers(sae, index).vectors[0].view(anatomy.n_heads, -1)
    for head in range(anatomy.n_heads):
        for source in range(T + 1):
            total = circuit.decompose(circuit.through_head(layer, head, T, source, parts[head])).total()
            assert total == pytest.approx(float(sources[head, source]), rel=1e-8, abs=1e-10)


def test_terms_say_what_they_are():
    assert str(Term("head", 1.5, 6, 2, head=3, source=1)) == "head 2.3 at 6 from 1: +1.5"
    assert str(Term("latent", -0.25, 6, 2, latent=30)) == "latent 2.30 at 6: -0.25"
    assert str(Term("token", 2.0, 6)) == "token at 6: +2"


def test_what_is_not_there_is_refused(circuit):
    with pytest.raises(ValueError, match=r"layer: expected one with a transcoder, \[0, 1, 2\], got 3"):
        circuit.latent(3, 0, 0)
    with pytest.raises(ValueError, match=r"position: expected 0 to 6, got 7"):
        circuit.latent(1, 0, 7)
    with pytest.raises(ValueError, match=r"latents: expected 0 to 18, got 19"):
        circuit.latent(1, 19, 0)
    with pytest.raises(ValueError, match=r"token: expected 0 to 40, got 41"):
        circuit.logit(41, 0)
    with pytest.raises(ValueError, match=r"kinds: expected some of latent, head, .* got heads"):
        circuit.tree(circuit.latent(1, 0, 0), kinds=("latent", "heads"))
    with pytest.raises(ValueError, match=r"term: expected one of head, latent, skip.* got error"):
        circuit.open(circuit.latent(1, 0, 0), Term("error", 1.0, 0, 0))
