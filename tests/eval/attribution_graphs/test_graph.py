"""Attribution graphs: edges add up to pre-activations and logits, agree with paths, and are what latents do."""

import pytest
import torch

from sparsary.eval.attribution_graphs.graph import build_graph, graph_of, target_vectors
from sparsary.eval.attribution_graphs.local_replacement_model import LocalReplacement
from sparsary.eval.attribution_graphs.paths import Circuit
from sparsary.eval.attribution_graphs.replacement_model import Replacement
from sparsary.sae import ENCODERS, SAE
from sparsary.training.activations.architecture import Architecture
from sparsary.transcoders import CrossLayerTranscoder
from sparsary.transcoders.stack import Stack
from sparsary.transcoders.transcoder import Transcoder

POSITIONS = 6


def cross_layer(width, layers=3, dtype=torch.float64):
    torch.manual_seed(3)
    built = CrossLayerTranscoder(layers, layers * width, layers * width, layers * 17, ENCODERS["topk"](k=4)).to(dtype)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_()
        built.in_centre.normal_()
        built.in_scale.uniform_(0.5, 2.0)
        built.out_scale.uniform_(0.5, 2.0)
    return built.requires_grad_(False).eval()


FAMILIES, KINDS = ("gpt2", "gpt_neox", "llama", "gemma2", "gemma3"), ("stack", "cross_layer", "some layers")


@pytest.fixture(params=["gpt2", "gpt_neox", "llama"])
def anatomy(request, tiny_model):
    return Architecture(tiny_model(request.param))


def prompt():
    return torch.randint(3, 41, (POSITIONS,), generator=torch.Generator().manual_seed(9))


PAIRS = [pytest.param((family, kind), id=f"{family} {kind}") for family in FAMILIES for kind in KINDS]


@pytest.fixture(params=PAIRS)
def local(request, tiny_model, random_transcoders):
    family, kind = request.param
    anatomy = Architecture(tiny_model(family), post_norms=True)
    dictionaries, layers = {
        "stack": (random_transcoders(anatomy.d_model), None),
        "cross_layer": (cross_layer(anatomy.d_model), None),
        "some layers": (cross_layer(anatomy.d_model, layers=2), (0, 2)),
    }[kind]
    # In Gemma, transcoders of layers 0 and 2 write after the norm that follows the MLP, those of layer 1 before it.
    hooks = {
        layer: (f"model.layers.{layer}.mlp:in", f"model.layers.{layer}.post_feedforward_layernorm:out") for layer in (0, 2)
    }
    replacement = Replacement(anatomy, dictionaries, layers, hooks if family.startswith("gemma") else None)
    return LocalReplacement(replacement, prompt(), exclude_leading=1)


def uncapped(local):
    """The model's own logits at the last position, its soft cap undone."""
    logits, cap = local.trace.logits[0, -1], local.anatomy.logit_cap
    return logits if cap is None else cap * (logits / cap).atanh()


def totals(graph):
    return graph.adjacency.sum(1) + graph.constants + graph.left_out


def pre_activation(local, layer, position, latent):
    """As the encoder has it, before it chooses."""
    x = local.trace.layers[layer].mlp_in[0, position]
    vectors, constants = local.replacement.reads(layer, torch.tensor([latent]))
    insertion, site = local.replacement.place(layer)
    dictionary = local.replacement.insertions()[insertion].dictionary
    block = dictionary.blocks[site]
    if isinstance(dictionary, CrossLayerTranscoder):
        normalised = x / dictionary.in_scale[block.reads] - dictionary.in_centre[block.reads]
    else:
        normalised = dictionary.normalised(x[None])[0]
    own = float(block.weights.W_enc[latent] @ normalised + block.weights.b_enc[latent])
    assert float(vectors[0] @ x + constants[0]) == pytest.approx(own, abs=1e-9)
    return own


def test_edges_and_constants_add_up_to_pre_activations_and_logits(local):
    graph = graph_of(local)
    assert len(graph.active) > 20
    assert graph.left_out_share == 0
    assert float((totals(graph) - graph.totals).abs().max()) < 1e-9
    for number in range(0, len(graph.active), 5):
        node = graph.node(number)
        own = pre_activation(local, node.layer, node.position, node.index)
        assert float(graph.totals[number]) == pytest.approx(own, abs=1e-9)
    logits = uncapped(local)
    expected = torch.stack([logits[target.token] - logits.mean() for target in graph.targets])
    assert torch.allclose(graph.totals[graph.logits], expected, atol=1e-8)
    # Only targets have rows; nothing comes from a logit.
    assert not graph.adjacency[graph.errors.start : graph.tokens.stop].any()
    assert not graph.adjacency[:, graph.logits].any()


def test_latents_only_point_upwards_and_to_later_positions(local):
    graph = graph_of(local)
    at, n = graph.active, len(graph.active)
    among = graph.adjacency[:n, :n] != 0
    assert not (among & (at.layers[:, None] <= at.layers)).any()
    assert not (among & (at.positions[:, None] < at.positions)).any()
    assert among.any()
    assert int(at.positions.min()) == 1
    assert not graph.adjacency[:, graph.errors].unflatten(1, (graph.n_layers, -1))[:, :, 0].any()


def test_logit_targets_are_the_likeliest_or_the_chosen(local):
    graph = graph_of(local)
    probabilities = local.trace.logits[0, -1].softmax(-1)
    count = len(graph.targets)
    assert [target.token for target in graph.targets] == probabilities.topk(count).indices.tolist()
    assert count == 10 or sum(target.probability for target in graph.targets) >= 0.95
    assert [target.weight for target in graph.targets] == [target.probability for target in graph.targets]
    difference = graph_of(local, answer=7, foil=30)
    logits = uncapped(local)
    assert float(totals(difference)[-1]) == pytest.approx(float(logits[7] - logits[30]), abs=1e-9)
    assert difference.targets[0].weight == 1.0
    assert float(totals(graph_of(local, answer=7))[-1]) == pytest.approx(float(logits[7] - logits.mean()), abs=1e-9)


def test_edges_are_the_derivatives_of_the_forward_replay(local):
    """Backwards and forwards are written separately: a nudge of one latent moves every target by its edge."""
    graph = graph_of(local)
    active, n = graph.active, len(graph.active)
    sources = torch.arange(0, n, 7)
    values, given = active.values.repeat(len(sources), 1), torch.zeros(len(sources), n, dtype=torch.bool)
    runs = torch.arange(len(sources))
    values[runs, sources] *= 1.5
    given[runs, sources] = True
    replayed = local.replay(active, values, given, hold=True)
    found = torch.cat([replayed.pre_acts, replayed.last @ target_vectors(local, graph.targets).T], dim=1)
    keep = torch.cat([torch.arange(n), torch.arange(graph.logits.start, graph.n_nodes)])
    expected = 0.5 * graph.adjacency[keep][:, sources].T
    assert torch.allclose(found - graph.totals[keep], expected, atol=1e-9)
    assert float(expected.abs().max()) > 0.1
    # Nothing changed, everything as it was.
    still = local.replay(active, active.values[None], torch.zeros(1, n, dtype=torch.bool))
    assert torch.allclose(still.pre_acts[0], active.pre_acts, atol=1e-9)
    assert torch.allclose(still.last @ target_vectors(local, graph.targets).T, graph.totals[graph.logits][None], atol=1e-9)


def test_edges_at_one_position_agree_with_paths(anatomy, random_transcoders):
    """In the first two layers a latent reaches another of its own position by the stream and by heads that look there."""
    dictionaries = random_transcoders(anatomy.d_model)
    local = LocalReplacement(Replacement(anatomy, {0: dictionaries[0], 1: dictionaries[1]}), prompt(), exclude_leading=0)
    graph = graph_of(local)
    circuit = Circuit(anatomy, {0: dictionaries[0], 1: dictionaries[1]}, prompt())
    number = next(i for i in range(len(graph.active)) if graph.node(i).layer == 1 and graph.node(i).position == 4)
    target = graph.node(number)
    probe = circuit.latent(1, target.index, 4)
    # Latents' own terms, and those of every head and skip opened.
    edges = {}
    terms = circuit.decompose(probe).largest(10**6)
    for term in terms:
        parts = [term] if term.kind == "latent" else []
        if term.kind in ("head", "skip"):
            parts = open_all(circuit, circuit.open(probe, term))
        for part in parts:
            key = part.layer, part.position, part.latent
            edges[key] = edges.get(key, 0.0) + part.value
    # In parallel blocks no head lies between them.
    assert len(edges) == (4 if anatomy.parallel else 20)
    for source, edge in enumerate(graph.adjacency[number, : len(graph.active)].tolist()):
        node = graph.node(source)
        assert edge == pytest.approx(edges.get((node.layer, node.position, node.index), 0.0), abs=1e-9)


def open_all(circuit, probe):
    """Every latent's term below a probe, through heads and skips only."""
    found = []
    for term in circuit.decompose(probe).largest(10**6):
        if term.kind == "latent":
            found.append(term)
        elif term.kind in ("head", "skip"):
            found.extend(open_all(circuit, circuit.open(probe, term)))
    return found


def test_a_perfect_transcoder_leaves_no_error(tiny_model):
    graph, local = perfect_graph(tiny_model)
    assert float(local.errors.abs().max()) < 1e-9
    scores = graph.scores()
    assert scores.replacement == pytest.approx(1.0, abs=1e-9)
    assert scores.completeness == pytest.approx(1.0, abs=1e-9)
    # Each MLP without a transcoder is an error as a whole.
    some = graph_of(
        LocalReplacement(Replacement(local.anatomy, {0: local.replacement.insertions()[0].dictionary}), prompt(), 1)
    )
    shares = some.error_shares()
    assert float(shares[0]) == pytest.approx(0.0, abs=1e-9)
    assert float(shares[1:].min()) > 0.01
    assert some.scores().replacement < 0.99
    assert float((totals(some) - some.totals).abs().max()) < 1e-9


def perfect_graph(tiny_model):
    anatomy = Architecture(tiny_model("gpt2"))
    local = LocalReplacement(Replacement(anatomy, mlps_as_transcoders(anatomy)), prompt(), 1)
    return graph_of(local), local


def mlps_as_transcoders(anatomy):
    """The MLPs themselves, made rectified linear ones, as transcoders."""
    found = {}
    for layer, block in enumerate(anatomy.model.module.transformer.h):
        block.mlp.act = torch.nn.ReLU()
        built = Transcoder(anatomy.d_model, anatomy.d_model, block.mlp.c_fc.nf, ENCODERS["relu"]()).double()
        with torch.no_grad():
            built.W_enc.copy_(block.mlp.c_fc.weight.T)
            built.b_enc.copy_(block.mlp.c_fc.bias)
            built.W_dec.copy_(block.mlp.c_proj.weight)
            built.b_dec.copy_(block.mlp.c_proj.bias)
        found[layer] = built.requires_grad_(False).eval()
    return found


def test_a_cross_layer_transcoder_that_writes_to_its_own_layer_is_a_stack(anatomy):
    crossing = cross_layer(anatomy.d_model)
    d = anatomy.d_model
    single = {}
    with torch.no_grad():
        for layer in range(3):
            crossing.W_dec[layer][:, d:] = 0.0
            built = Transcoder(d, d, 17, ENCODERS["topk"](k=4)).double()
            here = slice(layer * d, (layer + 1) * d)
            # Scales differ between columns there: folded in here.
            built.W_enc.copy_(crossing.W_enc[layer] / crossing.in_scale[here])
            built.b_enc.copy_(crossing.b_enc[layer] - crossing.W_enc[layer] @ crossing.in_centre[here])
            built.W_dec.copy_(crossing.W_dec[layer][:, :d] * crossing.out_scale[here])
            built.b_dec.copy_((crossing.b_dec * crossing.out_scale)[here])
            single[layer] = built.requires_grad_(False).eval()
    one = build_graph(anatomy.model, crossing, prompt())
    other = build_graph(anatomy.model, single, prompt())
    assert torch.allclose(one.adjacency, other.adjacency, atol=1e-9)
    assert torch.allclose(one.constants, other.constants, atol=1e-9)


def test_latents_that_are_left_out_are_accounted_for(local):
    whole, some = graph_of(local), graph_of(local, max_latents=15, batch_targets=4)
    assert len(some.active) == 15
    assert some.n_left_out == len(whole.active) - 15
    assert 0 < some.left_out_share < 1
    assert float((totals(some) - some.totals).abs().max()) < 1e-9
    # The rows of those that are in it are those of the whole graph.
    both = {
        tuple(row): i
        for i, row in enumerate(torch.stack([whole.active.layers, whole.active.positions, whole.active.latents], 1).tolist())
    }
    kept = [
        both[tuple(row)] for row in torch.stack([some.active.layers, some.active.positions, some.active.latents], 1).tolist()
    ]
    assert kept == sorted(kept)
    assert torch.allclose(some.adjacency[:15, :15], whole.adjacency[kept][:, kept], atol=1e-12)
    # The first to be looked at are those that matter most to the logits alone.
    n = len(whole.active)
    rows = whole.adjacency[whole.logits].abs()
    first = (whole.weights[whole.logits] / rows.sum(1)) @ rows
    assert set(first[:n].topk(4).indices.tolist()) <= set(kept)
    everything = graph_of(local, max_latents=10**6, batch_targets=7)
    assert torch.allclose(everything.adjacency, whole.adjacency, atol=1e-12)


def test_the_embedded_model_s_rows_add_up_in_single_precision(embedded_model, random_transcoders):
    token_ids = torch.randint(3, 900, (11,))
    for dictionaries in (random_transcoders(128, torch.float32), cross_layer(128, layers=4, dtype=torch.float32)):
        graph = build_graph(embedded_model, dictionaries, token_ids)
        sizes = graph.adjacency.abs().sum(1) + graph.constants.abs()
        off = (totals(graph) - graph.totals).abs()
        assert float((off / sizes.clamp_min(1.0)).max()) < 1e-4


def provenance(layer, model="gpt2", site="mlp"):
    hooks = {
        "mlp": (f"transformer.h.{layer}.mlp:in", f"transformer.h.{layer}.mlp:out"),
        "out": (f"transformer.h.{layer}:out",) * 2,
    }
    return {"model": {"id": model}, "hooks_in": [hooks[site][0]], "hooks_out": [hooks[site][1]]}


def test_what_does_not_fit_is_refused(tiny_model, random_transcoders):
    model = tiny_model("gpt2")
    good, ids = random_transcoders(12), prompt()
    relu = ENCODERS["relu"]()
    stack = Stack({"a": good[0]}, {"a": provenance(0)})
    assert len(build_graph(model, stack, ids).active) > 0
    with pytest.raises(ValueError, match=r"trained on gpt2, got one trained on pythia"):
        build_graph(model, Stack({"a": good[0]}, {"a": provenance(0, "pythia")}), ids)
    with pytest.raises(ValueError, match=r"expected transcoders of MLPs of gpt2, got a dictionary that reads and writes"):
        build_graph(model, Stack({"a": SAE(12, 19, relu)}, {"a": provenance(0, site="out")}), ids)
    with pytest.raises(ValueError, match=r"layer 1: expected a transcoder, got a dictionary of kind 'sae'"):
        build_graph(model, {1: SAE(12, 19, relu).double().eval()}, ids)
    with pytest.raises(ValueError, match=r"layer 0: expected d_in = d_out = 12.*got 11 and 12"):
        build_graph(model, {0: Transcoder(11, 12, 19, relu).eval()}, ids)
    with pytest.raises(ValueError, match=r"expected a cross-layer transcoder.* got one dictionary of kind 'transcoder'. Give"):
        build_graph(model, good[0], ids)
    pursuit = Transcoder(12, 12, 19, ENCODERS["matching_pursuit"](k=2)).double().eval()
    with pytest.raises(ValueError, match=r"encoder with pre-activations, got MatchingPursuit"):
        build_graph(model, {0: pursuit}, ids)
    with pytest.raises(ValueError, match=r"expected eval mode"):
        build_graph(model, {0: Transcoder(12, 12, 19, relu).double().train()}, ids)
    with pytest.raises(ValueError, match=r"expected layers 0 to 2, got 5"):
        build_graph(model, {5: good[0]}, ids)
    with pytest.raises(ValueError, match=r"at least one layer, got none"):
        build_graph(model, {}, ids)
    with pytest.raises(ValueError, match=r"layers: expected 2 ascending layers"):
        build_graph(model, cross_layer(12, layers=2), ids)


def test_prompts_and_tokens_that_do_not_exist_are_refused(tiny_model, random_transcoders):
    model, good = tiny_model("gpt2"), random_transcoders(12)
    with pytest.raises(ValueError, match=r"prompt: expected the ids of at least one token, got \(0,\)"):
        build_graph(model, good, [])
    with pytest.raises(ValueError, match=r"prompt: expected at most 32 tokens, the context of gpt2, got 33"):
        build_graph(model, good, [5] * 33)
    with pytest.raises(ValueError, match=r"prompt: expected token ids 0 to 40, got 5 to 41"):
        build_graph(model, good, [5, 41])
    with pytest.raises(ValueError, match=r"exclude_leading: expected 0 to 1, .* got 2. Give a longer prompt"):
        build_graph(model, good, [5, 6], exclude_leading=2)
    with pytest.raises(ValueError, match=r"answer: expected a token id of 0 to 40, got 41"):
        build_graph(model, good, [5, 6], answer=41)
    with pytest.raises(ValueError, match=r"foil: expected an answer"):
        build_graph(model, good, [5, 6], foil=4)
    with pytest.raises(ValueError, match=r"max_latents: expected at least 1, got 0"):
        build_graph(model, good, [5, 6], max_latents=0)
