"""Discrete codes: counts by brute force, heads that tell classes apart, and what they do on circuits that are known."""

import pytest
import torch

from sparsary.eval.circuits.compared_units import components
from sparsary.eval.circuits.known import KNOWN
from sparsary.eval.circuits.methods import METHODS
from sparsary.eval.circuits.methods.discrete_codes import Codes, DiscreteCodes, MeanDifference, appearances, written_codes
from sparsary.eval.circuits.scoring.roc import roc_auc
from sparsary.eval.circuits.units.nodes import Coordinates, Latents, NodeSpace
from sparsary.sae import ENCODERS, SAE
from sparsary.training.activations.architecture import Architecture
from sparsary.training.activations.sites import site_hooks

HEADS, TELLING = 20, 6


@pytest.fixture
def random_codes():
    draw = torch.Generator().manual_seed(2)
    return Codes(*(torch.randint(0, 9, (13, 5), generator=draw) for _ in range(2)), n_codes=9)


def test_counts_are_those_of_sets(random_codes):
    positive, negative = random_codes.positive.tolist(), random_codes.negative.tolist()
    columns = [({row[h] for row in positive}, {row[h] for row in negative}) for h in range(5)]
    assert random_codes.counts().tolist() == [len(p - n) for p, n in columns]
    pairs = random_codes.pair_counts()
    for a in range(5):
        for b in range(5):
            expected = {(row[a], row[b]) for row in positive} - {(row[a], row[b]) for row in negative}
            assert pairs[a, b] == (0 if a == b else len(expected))


def test_shuffled_labels_keep_codes_where_they_are(random_codes):
    shuffled = random_codes.shuffled_counts(50, seed=1)
    assert shuffled.shape == (50, 5)
    assert shuffled.std(0).min() > 0
    # A unit with one code for all has none to itself, whatever the labels.
    same = Codes(torch.zeros(6, 2, dtype=torch.long), torch.zeros(6, 2, dtype=torch.long), 9)
    assert not same.shuffled_counts(5).any()
    # One that says nothing but the class has fewer codes to itself once labels are drawn anew.
    told = Codes(torch.full((6, 1), 3), torch.full((6, 1), 4), 9)
    assert told.counts().tolist() == [1.0]
    assert told.shuffled_counts(50).mean() < 0.2


def test_appearances_are_ends_of_the_strongest_quarter_of_pairs():
    counts = torch.tensor([[0.0, 9, 1, 1], [9, 0, 5, 1], [1, 5, 0, 1], [1, 1, 1, 0]])
    # 8 ends: 0-1, 1-0, 1-2, 2-1.
    assert appearances(counts).tolist() == [2, 4, 2, 0]


def heads_that_tell(telling, seed):
    """All heads write one of six directions of their own, with noise; some have three for positives, three for negatives."""
    draw = torch.Generator().manual_seed(seed)
    directions = 6 * torch.nn.functional.normalize(torch.randn(2, HEADS, 3, 64, generator=draw), dim=-1)
    x = torch.randn(2, 60, HEADS, 64, generator=draw) * 0.1
    for label in range(2):
        for head in range(HEADS):
            kind = torch.full((60,), label) if head < telling else torch.randint(0, 2, (60,), generator=draw)
            x[label, :, head] += directions[kind, head, torch.randint(0, 3, (60,), generator=draw)]
    return x[0], x[1]


def test_heads_that_tell_classes_apart_are_found():
    truth = torch.arange(HEADS) < TELLING
    codes = DiscreteCodes(n_codes=100, epochs=60).encode(*heads_that_tell(TELLING, 0))
    assert roc_auc(codes.counts(), truth) > 0.95
    assert roc_auc(appearances(codes.pair_counts()), truth) > 0.9
    null = torch.tensor([roc_auc(counts, truth) for counts in codes.shuffled_counts(20)])
    assert abs(float(null.mean()) - 0.5) < 0.15


def test_heads_that_write_the_same_on_both_are_told_apart_by_chance():
    truth = torch.arange(HEADS) < TELLING
    found = [DiscreteCodes(n_codes=50, epochs=20).encode(*heads_that_tell(0, seed)).counts() for seed in range(8)]
    found = torch.tensor([roc_auc(counts, truth) for counts in found])
    # Eight areas, each with a standard deviation of about 0.14.
    assert abs(float(found.mean()) - 0.5) < 0.15


@pytest.mark.parametrize("name", ["and_gate", "adder_gate"])
def test_heads_of_a_known_circuit_are_found_where_prompts_differ_in_kind(name):
    known = KNOWN[name](n_pairs=16)
    space = NodeSpace(known.model, components(known.model))
    truth = torch.tensor([unit.replace("/", ".h") in known.nodes["resample"] for unit in space.names()])
    seeds = [METHODS["discrete_codes"](tokens="last", epochs=100, seed=seed).discover(space, known.pairs) for seed in range(4)]
    areas = torch.tensor([roc_auc(scores.values, truth) for scores in seeds])
    # A bit is one direction at two strengths: some draws of the autoencoder have one code for both.
    assert areas.mean() > 0.8
    assert areas.amax() == 1.0
    distances = METHODS["mean_difference"]().discover(space, known.pairs)
    assert roc_auc(distances.values, truth) == 1.0
    assert all((scores.cost.forwards, scores.cost.backwards) == (2, 0) for scores in (*seeds, distances))


def test_what_heads_write_goes_through_their_output_weights(tiny_model, random_pairs):
    model, pairs = tiny_model("gpt2"), random_pairs(n=3, lengths=[4, 6, 5])
    anatomy = Architecture(model)
    hook, width = site_hooks(model.module, 1, "attn_heads")[0], anatomy.n_heads * anatomy.d_head
    part, mlp = Coordinates("a1", hook, width, anatomy.d_head), Coordinates("m1", "transformer.h.1.mlp:out", 12, 12)
    layer = anatomy.trace(pairs.clean).layers[1]
    expected = torch.einsum("cthd,hdm->cthm", layer.z, anatomy.layers[1].W_O).float()
    found = {kind: written_codes(NodeSpace(model, [part, mlp]), pairs, kind)[0] for kind in ("mean", "last")}
    for row, length in enumerate([4, 6, 5]):
        torch.testing.assert_close(found["mean"][row, :-1], expected[row, :length].mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["last"][row, :-1], expected[row, length - 1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["last"][row, -1], layer.mlp_out[row, length - 1].float(), rtol=1e-4, atol=1e-5)
    # Position by position, as the space numbers its units.
    each = NodeSpace(model, [part], "each", 6)
    names = each.names()
    positive, _ = written_codes(each, pairs, "mean")
    place = names.index("a1/1@3")
    torch.testing.assert_close(positive[:, place], expected[:, 3, 1], rtol=1e-4, atol=1e-5)
    values = MeanDifference("last").discover(NodeSpace(model, [part]), pairs).values
    positive, negative = written_codes(NodeSpace(model, [part]), pairs, "last")
    torch.testing.assert_close(values, (positive - negative).mean(0).norm(dim=-1))


def test_units_that_write_elsewhere_are_refused(tiny_model, random_pairs):
    model, pairs = tiny_model("gpt2"), random_pairs()
    sae = SAE(12, 17, ENCODERS["topk"](k=3)).eval()
    for parts, message in (
        ([Latents("s", sae, "transformer.h.0:out", "transformer.h.0:out")], "s: expected heads or whole components"),
        ([Coordinates("n", "transformer.h.0.mlp.act:out", 48, 1)], "n: expected heads in front of their output projection"),
    ):
        with pytest.raises(ValueError, match=message):
            DiscreteCodes().discover(NodeSpace(model, parts), pairs)
    for options, message in (
        ({"tokens": "first"}, "tokens: expected one of mean, last"),
        ({"examples": 0}, "examples: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            DiscreteCodes(**options)
