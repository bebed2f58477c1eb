"""Nodes: the model itself with all units kept, the other run with none of a cut set, and single units by hand."""

import pytest
import torch

from sparsary.eval.circuits.methods.attribution import AttributionPatching
from sparsary.eval.circuits.units.nodes import Coordinates, Latents, NodeSpace
from sparsary.sae import ENCODERS, SAE
from sparsary.training.activations.sites import site_hooks

EACH = {"positions": "each", "n_positions": 6}
OPTIONS = pytest.mark.parametrize("options", [{}, EACH], ids=["all", "each"])


def hook(model, layer, site):
    return site_hooks(model.module, layer, site)[1]


@pytest.fixture(scope="module")
def sae():
    torch.manual_seed(9)
    built = SAE(12, 23, ENCODERS["topk"](k=4)).double()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_()
    built.in_scale.fill_(1.3)
    built.out_scale.fill_(1.3)
    return built.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def parts(model, sae, random_transcoders):
    """Builds every kind of part, by name."""
    transcoders = random_transcoders(12)

    def build(errors="node"):
        return {
            "neurons": Coordinates("neurons", hook(model, 0, "mlp_out"), 12, 1),
            "heads": Coordinates("heads", hook(model, 1, "attn_heads"), 12, 6),
            "attention": Coordinates("attention", hook(model, 0, "attn_out"), 12, 12),
            "stream": Coordinates("stream", hook(model, 1, "resid_post"), 12, 3),
            "sae": Latents("sae", sae, hook(model, 0, "resid_post"), hook(model, 0, "resid_post"), errors),
            "skip": Latents("skip", transcoders[1], *site_hooks(model.module, 1, "mlp"), errors),
            "no skip": Latents("no skip", transcoders[2], *site_hooks(model.module, 2, "mlp"), errors),
        }

    return build


MIXTURES = (("neurons", "heads", "attention"), ("stream", "sae"), ("skip", "no skip"), ("heads", "sae", "skip", "stream"))


@OPTIONS
@pytest.mark.parametrize("errors", ["node", "kept"])
@pytest.mark.parametrize("names", MIXTURES, ids="+".join)
def test_with_all_units_kept_it_is_the_model_bit_for_bit(model, pairs, parts, names, errors, options):
    space = NodeSpace(model, [parts(errors)[name] for name in names], **options)
    _, corrupted = space.see(pairs.corrupted)
    expected = model.logits(pairs.clean)
    kept = torch.ones(space.size, dtype=torch.bool)
    for all_kept in (kept, kept.float(), kept.double().requires_grad_(True), kept.expand(3, -1)):
        assert space.run(pairs.clean, all_kept, corrupted).equal(expected)


@OPTIONS
@pytest.mark.parametrize("errors", ["node", "kept"])
def test_with_one_row_all_kept_that_row_is_the_model(model, pairs, parts, errors, options):
    """The others, which lack units, are none of its business."""
    space = NodeSpace(model, list(parts(errors).values()), **options)
    _, corrupted = space.see(pairs.corrupted)
    kept = torch.rand(3, space.size) > 0.5
    kept[1] = True
    changed, expected = space.run(pairs.clean, kept, corrupted), model.logits(pairs.clean)
    torch.testing.assert_close(changed[1], expected[1], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(changed[0], expected[0])


@OPTIONS
@pytest.mark.parametrize("cut", ["sae", "skip", "components"])
def test_with_nothing_kept_of_a_cut_it_is_the_corrupted_run(model, pairs, parts, cut, options):
    every = parts()
    embedding = Coordinates("embedding", "transformer.wte:out", 12, 12)
    components = [embedding]
    for layer in range(3):
        components.append(Coordinates(f"a{layer}", hook(model, layer, "attn_heads"), 12, 6))
        components.append(Coordinates(f"m{layer}", hook(model, layer, "mlp_out"), 12, 12))
    cuts = {
        "sae": [every["sae"]],
        # All that writes to the stream; the skip of a transcoder follows what it reads.
        "skip": [embedding, every["skip"], every["no skip"]],
        "components": components,
    }
    space = NodeSpace(model, cuts[cut], **options)
    _, corrupted = space.see(pairs.corrupted)
    kept = torch.zeros(space.size, dtype=torch.bool)
    torch.testing.assert_close(space.run(pairs.clean, kept, corrupted), model.logits(pairs.corrupted), rtol=1e-9, atol=1e-9)


def test_what_is_no_cut_lets_the_clean_prompt_through(model, pairs, parts):
    space = NodeSpace(model, [parts()["skip"]])
    _, corrupted = space.see(pairs.corrupted)
    changed = space.run(pairs.clean, torch.zeros(space.size, dtype=torch.bool), corrupted)
    assert not torch.allclose(changed, model.logits(pairs.corrupted))
    assert not torch.allclose(changed, model.logits(pairs.clean))


def test_errors_that_are_ablated_are_so_also_where_all_is_kept(model, pairs, parts, sae):
    space = NodeSpace(model, [parts("ablated")["sae"]])
    kept = torch.ones(space.size, dtype=torch.bool)
    _, state = space.see(pairs.clean)
    nothing = [torch.zeros_like(tensor) for tensor in state]
    with model.replacing(hook(model, 0, "resid_post"), lambda x: sae(x.flatten(0, 1)).view_as(x)):
        expected = model.logits(pairs.clean)
    torch.testing.assert_close(space.run(pairs.clean, kept, nothing), expected)
    # From the corrupted run they come if that is what fills in.
    _, corrupted = space.see(pairs.corrupted)
    assert not torch.allclose(space.run(pairs.clean, kept, corrupted), expected)


@pytest.mark.parametrize("name", ["sae", "skip", "no skip"])
@pytest.mark.parametrize("errors", ["node", "kept", "ablated"])
def test_one_latent_absent_is_its_atom_by_what_it_lacks(model, pairs, parts, name, errors):
    part = parts(errors)[name]
    space = NodeSpace(model, [part])
    (_, clean), (_, corrupted) = space.see(pairs.clean), space.see(pairs.corrupted)
    unit = int((clean[0] - corrupted[0]).abs().sum((0, 1)).argmax())
    kept = torch.ones(space.size, dtype=torch.bool)
    kept[unit] = False
    dictionary = part.dictionary
    atom = dictionary.W_dec[unit] * dictionary.out_scale
    change = (corrupted[0] - clean[0])[..., unit, None] * atom
    if errors == "ablated":
        change = change + corrupted[1] - clean[1]
    with model.replacing(part.hook_out, lambda y: y + change):
        expected = model.logits(pairs.clean)
    torch.testing.assert_close(space.run(pairs.clean, kept, corrupted), expected)
    assert change.abs().amax() > 0.01


def test_a_later_unit_is_what_it_is_in_the_circuit(model, pairs, parts):
    """Not what it was in the clean run: what is kept is recomputed from what is before it."""
    every = parts()
    both, first = (NodeSpace(model, [every[name] for name in names]) for names in (("neurons", "sae"), ("neurons",)))
    (_, state), (_, single) = both.see(pairs.corrupted), first.see(pairs.corrupted)
    kept = torch.ones(both.size, dtype=torch.bool)
    kept[both.groups["neurons"]] = False
    alone = first.run(pairs.clean, torch.zeros(first.size, dtype=torch.bool), single)
    assert both.run(pairs.clean, kept, state).equal(alone)


def test_a_transcoder_reads_what_another_part_has_changed(model, pairs, parts):
    reads, writes = site_hooks(model.module, 1, "mlp")
    transcoder = parts("ablated")["skip"]
    # Only with errors ablated does anything come from what it reads.
    space = NodeSpace(model, [Coordinates("reads", reads, 12, 12), transcoder])
    _, corrupted = space.see(pairs.corrupted)
    kept = torch.ones(space.size, dtype=torch.bool)
    kept[0] = False
    state = [corrupted[0], *(torch.zeros_like(tensor) for tensor in corrupted[1:])]
    x = corrupted[0]
    y = transcoder.dictionary(x.flatten(0, 1)).view_as(x)
    with model.replacing(writes, lambda _: y):
        expected = model.logits(pairs.clean)
    torch.testing.assert_close(space.run(pairs.clean, kept, state), expected)


@OPTIONS
def test_shares_between_have_the_gradients_of_finite_differences(model, pairs, parts, options):
    space = NodeSpace(model, list(parts().values()), **options)
    _, corrupted = space.see(pairs.corrupted)
    generator = torch.Generator().manual_seed(1)
    kept, direction = (torch.rand(3, space.size, generator=generator, dtype=torch.float64) for _ in range(2))

    def metric(shares):
        return pairs.measure(space.run(pairs.clean, shares, corrupted))

    kept.requires_grad_(True)
    (slopes,) = torch.autograd.grad(metric(kept).sum(), kept)
    with torch.no_grad():
        differences = (metric(kept + 1e-6 * direction) - metric(kept - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close((slopes * direction).sum(1), differences, rtol=1e-5, atol=1e-7)
    assert (slopes != 0).float().mean() > 0.1


@OPTIONS
def test_shares_of_one_row_and_of_each(model, pairs, parts, options):
    space = NodeSpace(model, [parts()[name] for name in MIXTURES[3]], **options)
    _, corrupted = space.see(pairs.corrupted)
    kept = torch.rand(3, space.size) > 0.3
    together = space.run(pairs.clean, kept, corrupted)
    assert space.run(pairs.clean, kept.float(), corrupted).equal(together)
    for row in range(3):
        alone = space.run(pairs.clean[[row]], kept[row], [tensor[[row]] for tensor in corrupted])
        torch.testing.assert_close(alone[0], together[row])


def test_a_filler_may_have_one_row_and_one_position(model, pairs, parts):
    space = NodeSpace(model, [parts()[name] for name in MIXTURES[3]])
    _, state = space.see(pairs.corrupted)
    kept = torch.rand(space.size) > 0.5
    means = [tensor.mean((0, 1), keepdim=True) for tensor in state]
    repeated = [mean.expand_as(tensor) for mean, tensor in zip(means, state, strict=True)]
    assert space.run(pairs.clean, kept, means).equal(space.run(pairs.clean, kept, repeated))


@OPTIONS
def test_units_have_names_groups_and_an_order(model, parts, options):
    every = parts()
    space = NodeSpace(model, [every["heads"], every["sae"]], **options)
    names, copies = space.names(), space.copies
    assert len(names) == len(set(names)) == space.size == copies * (2 + 24)
    assert names[: 2 * copies : 2] == [f"heads/0{at}" for at in ([f"@{p}" for p in range(6)] if options else [""])]
    assert names[-1] == ("sae/error@5" if options else "sae/error")
    assert space.groups == {"heads": slice(0, 2 * copies), "sae": slice(2 * copies, 26 * copies)}
    assert space.group_of([0, 2 * copies - 1, 2 * copies, 26 * copies - 1]) == ["heads", "heads", "sae", "sae"]
    assert NodeSpace(model, [every["attention"]]).names() == ["attention"]


def test_a_name_at_a_position_is_that_unit_there(model, pairs, parts):
    space = NodeSpace(model, [parts()["stream"]], **EACH)
    _, corrupted = space.see(pairs.corrupted)
    kept = torch.ones(space.size, dtype=torch.bool)
    kept[space.names().index("stream/2@5")] = False

    def patch(x):
        x = x.clone()
        x[:, 5, 6:9] = corrupted[0][:, 5, 6:9]
        return x

    with model.replacing(hook(model, 1, "resid_post"), patch):
        expected = model.logits(pairs.clean)
    torch.testing.assert_close(space.run(pairs.clean, kept, corrupted), expected)
    assert not torch.allclose(expected, model.logits(pairs.clean))


@pytest.mark.parametrize("name", ["sae", "no skip"])
def test_latents_and_their_error_make_up_the_whole(model, pairs, parts, name):
    """Their attributions add up to that of the tensor they stand for."""
    part = parts()[name]
    whole = NodeSpace(model, [Coordinates("whole", part.hook_out, 12, 12)])
    pieces, one = (AttributionPatching().discover(space, pairs).per_pair for space in (NodeSpace(model, [part]), whole))
    torch.testing.assert_close(pieces.sum(1), one[:, 0])
    assert one.abs().amax() > 0.01


@OPTIONS
def test_distance_is_a_norm(model, pairs, parts, options):
    space = NodeSpace(model, [parts()["heads"], parts()["sae"]], **options)
    (_, clean), (_, corrupted) = space.see(pairs.clean), space.see(pairs.corrupted)
    found = space.distance(clean, corrupted)
    heads, latents, error = (a - b for a, b in zip(clean, corrupted, strict=True))
    heads = heads.unflatten(-1, (2, 6)).norm(dim=-1)
    expected = torch.cat([heads, latents.abs(), error.norm(dim=-1, keepdim=True)], dim=-1)
    if options:
        torch.testing.assert_close(found, torch.cat([expected[..., :2].flatten(1), expected[..., 2:].flatten(1)], dim=1))
    else:
        torch.testing.assert_close(found, expected.norm(dim=1))


def test_what_cannot_be_a_space(model, parts, sae):
    every = parts()
    with pytest.raises(ValueError, match="parts: expected at least one, got none"):
        NodeSpace(model, [])
    with pytest.raises(ValueError, match="every part with a name of its own, got heads more than once"):
        NodeSpace(model, [every["heads"], Coordinates("heads", hook(model, 0, "mlp_out"), 12, 1)])
    with pytest.raises(ValueError, match=r"every part with a hook of its own, got .*mlp:out more than once"):
        NodeSpace(model, [every["neurons"], Coordinates("again", hook(model, 0, "mlp_out"), 12, 3)])
    with pytest.raises(ValueError, match=r"wide: expected the width at .*c_proj:in of gpt2, 12, got"):
        NodeSpace(model, [Coordinates("wide", hook(model, 0, "attn_heads"), 24, 6)])
    with pytest.raises(ValueError, match=r"hook 'transformer.h.9.mlp:out' does not exist"):
        NodeSpace(model, [Coordinates("far", "transformer.h.9.mlp:out", 12, 1)])
    with pytest.raises(ValueError, match="positions: expected one of all, each, got 'some'"):
        NodeSpace(model, [every["heads"]], "some")
    with pytest.raises(ValueError, match="n_positions: expected the length of all prompts"):
        NodeSpace(model, [every["heads"]], "each")
    with pytest.raises(ValueError, match="x: group: expected a divisor of the width at here, 12, got 5"):
        Coordinates("x", "here", 12, 5)
    with pytest.raises(ValueError, match="errors: expected one of node, kept, ablated, got 'none'"):
        Latents("x", sae, "here", "here", "none")


def test_prompts_of_another_length_have_other_units(model, pairs, parts):
    space = NodeSpace(model, [parts()["heads"]], "each", 5)
    kept = torch.ones(space.size, dtype=torch.bool)
    with pytest.raises(ValueError, match="positions: expected prompts of 5 tokens, got 6"):
        space.run(pairs.clean, kept, space.see(pairs.corrupted)[1])


def test_a_dictionary_in_training_mode_is_refused(sae):
    trained = SAE(12, 23, ENCODERS["topk"](k=4)).train()
    with pytest.raises(ValueError, match="x: expected a dictionary in eval mode"):
        Latents("x", trained, "here", "here")
    assert Latents("x", sae, "here", "here").n_units == 24
