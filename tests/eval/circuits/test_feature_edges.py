"""Edges between nodes: what patching one direct path does, and what edges add up to."""

import pytest
import torch

from sparsary.eval.circuits.feature_edges import feature_edges
from sparsary.eval.circuits.known import ToyConfig, ToyTransformer
from sparsary.eval.circuits.methods import METHODS
from sparsary.eval.circuits.tasks.pairs import PromptPairs, Question
from sparsary.eval.circuits.units.nodes import Coordinates, Latents, NodeSpace
from sparsary.sae import ENCODERS, SAE
from sparsary.training.activations.model import LanguageModel
from sparsary.training.activations.sites import site_hooks


def pairs_of(clean, corrupted):
    n, length = clean.shape
    questions = tuple((Question(length - 1, (row % 5,), (5 + row % 2,)),) for row in range(n))
    return PromptPairs("any", "other tokens", clean, corrupted, questions, torch.full((n,), length))


@pytest.fixture(scope="module")
def bent():
    """A toy transformer, linear near each prompt: ReLU, no norm, uniform attention; tokens 7 + t hardly differ from t."""
    torch.manual_seed(3)
    module = ToyTransformer(ToyConfig(2, 2, d_model=11, d_head=3, n_ctx=5, d_vocab=14, d_vocab_out=7, d_mlp=13)).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
        for layer in range(2):
            for projection in (module.attention(layer).q_proj, module.attention(layer).k_proj):
                projection.weight.zero_()
        module.wte.weight[7:] = module.wte.weight[:7] + 1e-6 * torch.randn(7, 11)
    clean = torch.randint(0, 7, (3, 5))
    return LanguageModel(module, None, "bent", None), pairs_of(clean, clean + 7)


def parts_of(model, d_model):
    """All that is between tokens and logits: every path goes through one of them, or through the embedding."""
    found = [Coordinates("embed", site_hooks(model.module, 0, "resid_pre")[0], d_model, d_model)]
    for layer in range(2):
        found.append(Coordinates(f"a{layer}", site_hooks(model.module, layer, "attn_heads")[0], 6, 3))
        found.append(Coordinates(f"m{layer}", site_hooks(model.module, layer, "mlp_out")[0], d_model, 1))
    return found


def by_hand(space, pairs, sender, receiver):
    """The fall of the metric, mean over pairs, if the receiver (None: the metric) alone sees that the sender is corrupted."""
    parts, logits = {part.hook_out: part for part in space.parts}, space.model.logits(pairs.clean)
    clean, corrupted = (space.passes.see(token_ids, space.hooks)[1] for token_ids in (pairs.clean, pairs.corrupted))

    def unit_of(unit):
        hook = next(h for h, p in parts.items() if space.groups[p.name].start <= unit < space.groups[p.name].stop)
        first = (unit - space.groups[parts[hook].name].start) * parts[hook].group
        return hook, slice(first, first + parts[hook].group)

    def mixed(hook, columns, other):
        x = clean[hook].clone()
        x[..., columns] = other[..., columns]
        return x

    sent, columns = unit_of(sender)
    arrived = {}

    def freeze(hook):
        def hold(x):
            arrived[hook] = x.clone()
            return mixed(hook, columns, corrupted[hook]) if hook == sent else clean[hook]

        return hold

    with space.model.hooked({hook: freeze(hook) for hook in space.hooks}):
        after = space.model.run(pairs.clean)
    if receiver is not None:
        hook, columns = unit_of(receiver)
        with space.model.replacing(hook, lambda x: mixed(hook, columns, arrived[hook])):
            after = space.model.run(pairs.clean)
    return float((pairs.measure(logits) - pairs.measure(after)).mean())


def test_an_edge_is_what_patching_its_direct_path_does(bent):
    model, pairs = bent
    space = NodeSpace(model, parts_of(model, 11))
    edges = feature_edges(space, pairs, torch.ones(space.size, dtype=torch.bool))
    found = {(s, r): w for s, r, w in zip(*(x.tolist() for x in (edges.senders, edges.receivers, edges.weights)), strict=True)}
    a1, metric = space.groups["a1"].start, space.size
    # The stream skips parts: from the embedding everywhere, from the first MLP past the second attention.
    every = [(0, 1), (0, 2), (0, 3), (0, a1), (0, metric), (1, 4), (1, a1), (3, a1), (3, a1 + 2), (5, a1 + 3), (a1, metric)]
    assert sum(pair in found for pair in every) > 9
    for sender, receiver in every:
        expected = by_hand(space, pairs, sender, None if receiver == metric else receiver)
        assert found.get((sender, receiver), 0.0) == pytest.approx(expected, rel=1e-4, abs=1e-12)
    # Nothing goes back, across, or to the embedding.
    assert not any((s, r) in found for s, r in [(3, 0), (1, 2), (a1, 3), (3, 4), (metric - 1, metric - 2)])


def test_what_a_receiver_gets_is_its_effect_if_all_ways_to_it_are_cut(bent):
    model, pairs = bent
    space = NodeSpace(model, parts_of(model, 11))
    edges = feature_edges(space, pairs, torch.ones(space.size, dtype=torch.bool))
    received = torch.zeros(space.size + 1).index_add(0, edges.receivers, edges.weights)
    effects = METHODS["attribution"]().discover(space, pairs).values.float()
    # All but the embedding, which is where everything begins.
    torch.testing.assert_close(received[1:-1], effects[1:], rtol=1e-4, atol=1e-10)
    total = pairs.measure(model.logits(pairs.clean)) - pairs.measure(model.logits(pairs.corrupted))
    assert float(received[-1]) == pytest.approx(float(total.mean()), rel=1e-4)


@pytest.fixture(scope="module")
def mixed_space(tiny_model, random_transcoders):
    """An SAE in the stream, a transcoder and heads of a model that is nowhere linear."""
    model = tiny_model("gpt2")
    sae = SAE(12, 17, ENCODERS["topk"](k=4)).double().requires_grad_(False).eval()
    sae.b_dec.normal_(generator=torch.Generator().manual_seed(0))
    heads = site_hooks(model.module, 0, "attn_heads")[0]
    parts = [
        Coordinates("a0", heads, 12, 6),
        Latents("s0", sae, *site_hooks(model.module, 0, "resid_post")),
        Latents("t1", random_transcoders(12)[1], *site_hooks(model.module, 1, "mlp")),
        Latents("t2", random_transcoders(12)[2], *site_hooks(model.module, 2, "mlp")),
    ]
    draw = torch.Generator().manual_seed(1)
    clean, corrupted = (torch.randint(3, 41, (5, 6), generator=draw) for _ in range(2))
    return model, parts, pairs_of(clean, corrupted)


@pytest.mark.parametrize("positions", ["all", "each"])
def test_a_sender_s_edges_add_up_to_its_attribution(mixed_space, positions):
    model, parts, pairs = mixed_space
    # Fewer parts, to be short, where every position counts.
    space = NodeSpace(model, parts) if positions == "all" else NodeSpace(model, [parts[0], parts[3]], positions, 6)
    kept = torch.ones(space.size, dtype=torch.bool)
    edges = feature_edges(space, pairs, kept, batch=3)
    sent = torch.zeros(space.size).index_add(0, edges.senders, edges.weights)
    effects = METHODS["attribution"]().discover(space, pairs).values.float()
    assert (effects != 0).sum() > 20
    torch.testing.assert_close(sent, effects, rtol=1e-4, atol=1e-6)
    # Errors send and receive.
    names = space.names()
    error = max(unit for unit, name in enumerate(names) if name.startswith("t2/error"))
    assert (edges.receivers == error).any()
    assert (edges.senders == error).any()
    # The SAE stands in the stream: nothing gets past it to what lies behind.
    if positions == "all":
        before, behind = space.groups["a0"], space.groups["t1"].start
        from_heads = edges.receivers[edges.senders < before.stop]
        assert len(from_heads) > 5
        assert (from_heads < behind).all()


def test_an_edge_to_a_latent_is_how_its_value_moves(mixed_space):
    """A small step of one head towards the corrupted run, the latents of the transcoder behind it read off by its encoder."""
    model, parts, pairs = mixed_space
    space = NodeSpace(model, [parts[0], parts[2]])
    edges = feature_edges(space, pairs, torch.ones(space.size, dtype=torch.bool))
    dense = torch.zeros(space.size + 1, space.size + 1).index_put((edges.senders, edges.receivers), edges.weights)
    seen, grads = space.passes.gradients(pairs.clean, space.hooks, pairs.measure)
    _, corrupted = space.passes.see(pairs.corrupted, space.hooks)
    hook, step = parts[0].hook_out, 1e-6
    moved = seen[hook].clone()
    moved[..., 6:] += step * (corrupted[hook] - moved)[..., 6:]
    with model.replacing(hook, lambda _: moved):
        _, after = space.passes.see(pairs.clean, space.hooks)
    values, others = (parts[2].state(x[parts[2].hook_in], x[parts[2].hook_out])[0] for x in (seen, after))
    slopes = parts[2].slopes(grads[parts[2].hook_out])[0]
    expected = ((values - others) * slopes).sum(1).mean(0) / step
    assert (expected != 0).sum() > 3
    torch.testing.assert_close(dense[1, 2:-2], expected.float(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("errors", ["kept", "ablated"])
def test_edges_lead_through_errors_that_are_no_nodes(mixed_space, errors):
    model, parts, pairs = mixed_space
    others = [Latents(part.name, part.dictionary, part.hook_in, part.hook_out, errors) for part in parts[1:]]
    space = NodeSpace(model, [parts[0], *others])
    edges = feature_edges(space, pairs, torch.ones(space.size, dtype=torch.bool))
    sent = torch.zeros(space.size).index_add(0, edges.senders, edges.weights)
    effects = METHODS["attribution"]().discover(space, pairs).values.float()
    torch.testing.assert_close(sent, effects, rtol=1e-4, atol=1e-6)
    # Past the SAE in the stream too.
    from_heads = edges.receivers[edges.senders < space.groups["a0"].stop]
    assert (from_heads >= space.groups["t1"].start).any()


def test_only_kept_units_and_strong_edges_are_there(mixed_space):
    model, parts, pairs = mixed_space
    space = NodeSpace(model, parts)
    kept = torch.zeros(space.size, dtype=torch.bool)
    kept[[0, 1, 5, 19, 30]] = True
    few, every = feature_edges(space, pairs, kept), feature_edges(space, pairs, torch.ones_like(kept))
    inside = torch.isin(every.senders, kept.nonzero()) & torch.isin(
        every.receivers, torch.tensor([0, 1, 5, 19, 30, space.size])
    )
    assert len(few.weights) == int(inside.sum()) > 3
    torch.testing.assert_close(few.weights, every.weights[inside])
    middle = float(few.weights.abs().median())
    strong = few.above(middle)
    assert torch.equal(strong.weights, feature_edges(space, pairs, kept, threshold=middle).weights)
    assert 0 < len(strong.weights) < len(few.weights)
    rows = strong.describe(space.names())
    assert abs(rows[0][2]) == float(strong.weights.abs().max())
    assert {sender for sender, _, _ in rows} <= set(space.names())
    # Two heads have nothing before them; for the others and for the metric there is one backward pass each.
    assert (few.cost.forwards, few.cost.backwards) == (3, 1 + 5 + 1)
    with pytest.raises(ValueError, match="kept: expected one entry for each of the"):
        feature_edges(space, pairs, kept[:-1])


def test_gradients_where_a_norm_reads_the_stream_are_of_what_it_reads(mixed_space):
    """The block adds to the same tensor, which an intervention at this hook does not touch."""
    model, _, pairs = mixed_space
    (hook,) = set(site_hooks(model.module, 1, "resid_mid"))
    passes = NodeSpace(model, [Coordinates("r1", hook, 12, 12)]).passes
    # Behind another hook, so that the stream is part of the graph there.
    _, grads = passes.gradients(pairs.clean, [site_hooks(model.module, 0, "resid_pre")[0], hook], pairs.measure)
    step = 1e-6 * torch.randn(5, 6, 12, dtype=torch.float64)
    moved = []
    for sign in (1, -1):
        with model.replacing(hook, lambda x, sign=sign: x + sign * step):
            moved.append(pairs.measure(model.logits(pairs.clean)))
    torch.testing.assert_close((grads[hook] * step).sum((1, 2)), (moved[0] - moved[1]) / 2, rtol=1e-5, atol=1e-14)
