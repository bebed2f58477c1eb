"""Connections: times what an input adds, they are the input's attributions."""

import pytest
import torch

from sparsary.eval.attribution_graphs.paths import Circuit
from sparsary.eval.virtual_weights.connections import Connections, transcoders_by_layer
from sparsary.sae import ENCODERS, SAE
from sparsary.training.activations.architecture import Architecture
from sparsary.training.activations.sites import site_hooks
from sparsary.transcoders.stack import Stack
from sparsary.transcoders.transcoder import Transcoder

T, S = 5, 2


@pytest.fixture(params=["gpt2", "gpt_neox", "llama"])
def circuit(request, tiny_model, random_transcoders):
    anatomy = Architecture(tiny_model(request.param))
    return Circuit(anatomy, random_transcoders(anatomy.d_model), torch.randint(3, 41, (7,)))


def terms_of(circuit, probe, kind):
    return [term for term in circuit.decompose(probe).largest(10**6) if term.kind == kind]


def value_of(circuit, term):
    code = circuit.codes[term.layer]
    return code.values[(code.token_ids() == term.position) & (code.latents == term.latent)].sum()


def test_a_connection_times_the_value_over_the_denominator_is_the_attribution(circuit):
    scale = circuit.trace.layers[2].mlp_scale[0, T]
    for term in terms_of(circuit, circuit.latent(2, 7, T), "latent"):
        connection = circuit.weights.between(term.layer, 2, torch.tensor([7]))[term.latent, 0]
        assert float(value_of(circuit, term) * connection / scale) == pytest.approx(term.value, rel=1e-9)


def test_a_connection_through_a_head_times_its_attention_is_the_path_s_value(circuit):
    probe = circuit.latent(2, 7, T)
    head = next(t for t in terms_of(circuit, probe, "head") if (t.layer, t.head, t.source) == (1, 1, S))
    at = circuit.trace.layers
    factor = at[1].pattern[0, 1, T, S] / at[1].attention_scale[0, S] / at[2].mlp_scale[0, T]
    opened = circuit.open(probe, head)
    connections = circuit.weights.between(0, 2, torch.tensor([7]), head=(1, 1))[:, 0]
    for term in terms_of(circuit, opened, "latent"):
        assert float(value_of(circuit, term) * connections[term.latent] * factor) == pytest.approx(term.value, rel=1e-9)
    [token] = terms_of(circuit, opened, "token")
    embedding = circuit.weights.deembeddings(2, torch.tensor([7]), head=(1, 1))[0, circuit.token_ids[S]]
    assert float(embedding * factor) == pytest.approx(token.value, rel=1e-9)


def test_deembeddings_and_unembeddings_are_token_terms_and_logit_effects(circuit):
    [token] = terms_of(circuit, circuit.latent(2, 7, T), "token")
    embedding = circuit.weights.deembeddings(2, torch.tensor([7]))[0, circuit.token_ids[T]]
    assert float(embedding / circuit.trace.layers[2].mlp_scale[0, T]) == pytest.approx(token.value, rel=1e-9)
    for term in terms_of(circuit, circuit.logit(9, T), "latent"):
        effect = circuit.weights.unembeddings(term.layer, torch.tensor([term.latent]))[0, 9]
        effect = effect * value_of(circuit, term) / circuit.trace.last_scale[0, T]
        assert float(effect) == pytest.approx(term.value, rel=1e-9)


def test_the_strongest_connections_are_those_of_the_whole_matrix(circuit, monkeypatch):
    monkeypatch.setattr("sparsary.eval.virtual_weights.connections.TILE_LATENTS", 5)
    strongest = circuit.weights.strongest(0, 2, 4)
    matrix = circuit.weights.between(0, 2).T
    assert strongest.latents.shape == strongest.values.shape == (19, 4)
    torch.testing.assert_close(strongest.values.abs(), matrix.abs().sort(-1, descending=True).values[:, :4])
    torch.testing.assert_close(matrix.gather(1, strongest.latents), strongest.values)
    assert (strongest.values < 0).any()


@pytest.mark.parametrize("where_active", [True, False])
def test_mean_attributions_are_the_mean_of_those_of_every_token(circuit, where_active):
    contexts = torch.randint(3, 41, (3, 6))
    circuits = [Circuit(circuit.anatomy, circuit.weights.transcoders, token_ids) for token_ids in contexts]
    firings = sum((one.codes[2].to_dense(19)[1:] > 0).sum(0) for one in circuits)
    latent = int(((firings > 0) & (firings < 15)).nonzero()[0])
    counted, expected = 0, {0: torch.zeros(19).double(), 1: torch.zeros(19).double()}
    for one in circuits:
        for position in range(1, 6):
            fired = one.codes[2].to_dense(19)[position, latent] > 0
            if where_active and not fired:
                continue
            counted += 1
            for term in terms_of(one, one.latent(2, latent, position), "latent"):
                expected[term.layer][term.latent] += term.value
    assert counted == (firings[latent] if where_active else 15)
    got = circuit.weights.mean_attributions(2, latent, [contexts[:1], contexts[1:]], where_active, exclude_leading=1)
    assert got.keys() == expected.keys()
    for layer, values in got.items():
        # A recording pass computes Llama's attention in single precision.
        torch.testing.assert_close(values, expected[layer] / counted, rtol=1e-6, atol=1e-6)


def test_a_stack_s_transcoders_are_found_by_layer(tiny_model):
    anatomy = Architecture(tiny_model("gpt2"))
    module = anatomy.model.module
    layers = {2: "mlp", 0: "mlp", 1: "mlp_out"}
    members, provenances = {}, {}
    for layer, site in layers.items():
        reads, writes = site_hooks(module, layer, site)
        kind = Transcoder(12, 12, 19, ENCODERS["topk"](k=2)) if site == "mlp" else SAE(12, 19, ENCODERS["topk"](k=2))
        members[writes], provenances[writes] = kind, {"hooks_in": [reads], "hooks_out": [writes]}
    found = transcoders_by_layer(anatomy, Stack(members, provenances))
    assert list(found) == [0, 2]
    assert found[2] is members[site_hooks(module, 2, "mlp")[1]]
    out = site_hooks(module, 1, "mlp_out")[1]
    with pytest.raises(ValueError, match=r"stack: expected transcoders trained at site mlp of this model, got none"):
        transcoders_by_layer(anatomy, Stack({out: members[out]}, {out: provenances[out]}))


def test_what_does_not_reach_or_does_not_fit_is_refused(circuit):
    weights, anatomy = circuit.weights, circuit.anatomy
    with pytest.raises(ValueError, match=r"lower: expected a layer before 1, which reads it, got 1"):
        weights.between(1, 1)
    with pytest.raises(ValueError, match=r"lower: expected a layer before 1, .*got 1"):
        weights.between(1, 2, head=(1, 0))
    last = 1 if anatomy.parallel else 2
    with pytest.raises(ValueError, match=rf"head: expected a layer of 0 to {last}, .*got \({last + 1}, 0\)"):
        weights.between(0, 2, head=(last + 1, 0))
    with pytest.raises(ValueError, match=r"batches: expected tokens on which latent 7 of layer 2 fires, got none"):
        weights.mean_attributions(2, 7, [])
    with pytest.raises(ValueError, match=r"transcoders: expected layers 0 to 2, got 3"):
        Connections(anatomy, {3: weights.transcoders[0]})
    with pytest.raises(ValueError, match=r"layer 0: expected d_in = d_out = \d+, .*got 11 and 12"):
        Connections(anatomy, {0: Transcoder(11, 12, 19, ENCODERS["topk"](k=2))})
    with pytest.raises(ValueError, match=r"layer 1: expected eval mode"):
        Connections(anatomy, {1: Transcoder(anatomy.d_model, anatomy.d_model, 19, ENCODERS["topk"](k=2))})
