"""Training a transformer to be a program at given places.

Trained to the end, models take minutes, and where they end depends on the processor: two lie in tests/golden/known, each by the
command in its header.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsary.eval.circuits.known import KNOWN, ToyConfig, ToyTransformer, node_names, siit
from sparsary.eval.circuits.known.siit import (
    PROGRAMS,
    TOLERANCE,
    distances_of,
    node_patched,
    nodes_recorded,
    siit_prompts,
    train_siit,
    trained,
)
from sparsary.eval.circuits.scoring.roc import roc_auc


def test_programs_compute_and_take_over_what_is_given():
    token_ids = torch.tensor([[0, 2, 2, 1, 2]])
    share = PROGRAMS["share_of_x"].run(token_ids, {})["share"]
    torch.testing.assert_close(share, torch.tensor([[0, 1 / 2, 2 / 3, 2 / 4, 3 / 5]]))
    repeats = PROGRAMS["share_of_repeats"].run(token_ids, {})
    assert repeats["previous"].tolist() == [[0, 0, 2, 2, 1]]
    assert repeats["repeats"].tolist() == [[0, 0, 1, 0, 0]]
    other = PROGRAMS["share_of_repeats"].run(token_ids, {"previous": torch.tensor([[0.0, 2, 2, 1, 1]])})
    assert other["repeats"].tolist() == [[0, 1, 1, 1, 0]]
    assert other["share"][0, -1] == pytest.approx(3 / 5)


@torch.no_grad()
@pytest.mark.parametrize("node", ["a0.h1", "a1.h3", "m0", "m1"])
def test_swapping_a_node_is_exact_patching(node, brute_logits):
    program = PROGRAMS["share_of_x"]
    model = ToyTransformer(ToyConfig(2, 4, 12, 3, 7, 4, 1, d_mlp=10, activation="gelu")).double()
    draw = torch.Generator().manual_seed(1)
    base, source = (siit_prompts(program, 5, draw) for _ in range(2))
    with nodes_recorded(model) as written:
        model(source)
    with node_patched(model, node, written):
        swapped = model(base).logits
    torch.testing.assert_close(swapped, brute_logits(model, base, source, node))
    assert not torch.allclose(swapped, model(base).logits)


GOLDEN = Path(__file__).parents[3] / "golden" / "known"


def golden(program, seed, max_steps):
    """Stands in for training."""
    config = ToyConfig(2, 4, 32, 8, siit.LENGTH, program.d_vocab, 1, d_mlp=64, activation="gelu")
    model = ToyTransformer(config)
    model.load_state_dict(load_file(GOLDEN / f"siit_{program.name}.safetensors"))
    return model


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_trained_model_is_the_program_where_it_should_be(name, brute, monkeypatch):
    monkeypatch.setattr(siit, "train_siit", golden)
    known = KNOWN[f"siit_{name}"](n_pairs=8)
    distances = distances_of(known.module, PROGRAMS[name], seed=7)
    assert max(distances.values()) < 1.5 * TOLERANCE
    assert set(distances) == {"as it is", *node_names(known.config)[1:]}
    assert not known.exact
    nodes, edges = brute(known, "resample", "nodes"), brute(known, "resample", "edges")
    effects, truth = nodes.alone(), nodes.truth()
    assert effects[truth].min() > 10 * effects[~truth].max()
    assert roc_auc(edges.alone(), edges.truth()) == 1.0


def test_training_makes_the_program(monkeypatch):
    """Until it is five times as far off as in earnest, which takes seconds."""
    monkeypatch.setattr(siit, "TOLERANCE", 5 * TOLERANCE)
    program = PROGRAMS["share_of_x"]
    distances = distances_of(train_siit(program, seed=0, max_steps=1500), program, seed=7)
    # As it is, and with every node in turn from other prompts.
    assert max(distances.values()) < 6 * TOLERANCE


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(ValueError, match=r"name: expected one of share_of_x, .*got 'sort'"):
        trained("sort")


def test_too_few_steps_are_too_few():
    with pytest.raises(ValueError, match=r"max_steps: share_of_x is not yet the program after 1 steps: .*\(m0\).* Give more"):
        train_siit(PROGRAMS["share_of_x"], seed=0, max_steps=1)
