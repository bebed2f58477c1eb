"""Synthetic models written by SAELens (tests/parity/reference_synthetic.py) sample the same distribution here."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsary.eval.synthetic.planted import generator_of
from sparsary.eval.synthetic.published import Level, _one_of_each, load_planted

GOLDEN = Path(__file__).parents[2] / "golden" / "synthetic"
TOKENS = 60_000


@pytest.fixture
def copied(tmp_path):
    """A copy of the model with everything, whose files a test may change."""
    return Path(shutil.copytree(GOLDEN / "trees", tmp_path / "trees"))


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("name", ["trees", "gated", "flat"])
def test_samples_have_the_written_model_s_frequencies_and_moments(name):
    model = load_planted(str(GOLDEN / name))
    found = json.loads((GOLDEN / name / "sampled.json").read_text())
    sample = model.sample(TOKENS, 3)
    assert torch.equal(sample.x, model.sample(TOKENS, 3).x)
    coefficients = sample.coefficients.double()
    fires = (coefficients > 0).double()
    # Variance of a difference of two means, from samples of both sizes.
    share = 1 / TOKENS + 1 / found["tokens"]
    for key, ours in {
        "fires": fires,
        "fires_with_next": fires[:, :-1] * fires[:, 1:],
        "mean": coefficients,
        "square": coefficients.pow(2),
        "x": sample.x.double(),
    }.items():
        theirs = torch.tensor(found[key], dtype=torch.float64)
        error = (ours.var(0) * share).sqrt()
        # 5 standard errors, and a thousandth for pairs that hardly ever fire together.
        assert ((ours.mean(0) - theirs).abs() < 5 * error + 1e-3).all(), key


def test_groups_are_the_depths_of_the_trees():
    sizes = {name: len(features) for name, features in load_planted(str(GOLDEN / "trees")).groups.items()}
    assert sizes == {"loners": 2, "roots": 3, "depth_1": 9, "depth_2": 27}


def test_one_of_each_exclusive_group_stays_and_every_one_may():
    groups = torch.tensor([0, 0, 0, -1, 1, 1])
    fires = torch.ones(4000, 6, dtype=torch.bool)
    fires[:1000, :2] = False
    token, feature = fires.nonzero(as_tuple=True)
    kept = _one_of_each(token, groups[feature], generator_of("test", 0))
    fires = torch.zeros(4000, 6, dtype=torch.bool)
    fires[token[kept], feature[kept]] = True
    assert (fires[:, :3].sum(-1) == 1).all()
    assert (fires[:, 4:].sum(-1) == 1).all()
    # Not in any group.
    assert fires[:, 3].all()
    assert (fires[1000:, :3].double().mean(0) - 1 / 3).abs().max() < 0.04
    assert (fires[:, 4].double().mean() - 0.5).abs() < 0.04


def test_nodes_without_a_feature_group_their_children(copied):
    # Features 3 and 4 exclude each other, and have no parent.
    leaf = {"children": [], "mutually_exclusive_children": False, "scale_children_by_parent": False}
    group = {
        "feature_index": None,
        "mutually_exclusive_children": True,
        "children": [leaf | {"feature_index": f} for f in (3, 4)],
    }
    (copied / "hierarchy.json").write_text(json.dumps({"roots": [group]}))
    model = load_planted(str(copied))
    assert [len(level.features) for level in model.forest] == [0, 0]
    assert isinstance(model.forest[0], Level)
    assert model.forest[0].exclusive.tolist() == [[3, 4]]
    fires = model.sample(20_000, 0).coefficients > 0
    assert not (fires[:, 3] & fires[:, 4]).any()
    assert fires[:, 3].any()
    assert fires[:, 4].any()


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("synthetic_model_config.json", {"seed": None}, "std_firing_magnitudes: expected a seed, as folded_normal is random"),
        ("synthetic_model_config.json", {"mean_firing_magnitudes": {"generator_name": "zipf"}}, "expected a number, constant"),
        (
            "synthetic_model_config.json",
            {"mean_firing_magnitudes": {"generator_name": "linear"}},
            "expected the numbers of linear",
        ),
        ("synthetic_model_config.json", {"mean_firing_magnitudes": "five"}, "expected a number, constant, linear"),
        ("hierarchy.json", {"roots": None}, "expected roots with feature_index and children"),
        ("hierarchy.json", {"roots": [{"feature_index": 99}]}, "expected every feature_index once, and from 0 to 40"),
        ("hierarchy.json", {"roots": [{"feature_index": 1}, {"feature_index": 1}]}, "expected every feature_index once"),
    ],
)
def test_files_that_do_not_determine_the_model_are_refused(copied, file, changes, words):
    change(copied / file, **changes)
    with pytest.raises(ValueError, match=words) as error:
        load_planted(str(copied))
    assert file in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("bias"), "bias missing among"),
        (lambda t: t.update(bias=torch.zeros(9)), r"bias: expected shape \(8\), got \(9,\)"),
        (lambda t: t["firing_probabilities"].add_(1), "firing_probabilities: expected 0 to 1, got 1.0"),
        (lambda t: t["correlation_diag"].mul_(0.5), "expected variances of 1, got some"),
        (lambda t: t.update(feature_vectors=torch.zeros(3)), "feature_vectors: expected shape"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(copied, change, words):
    path = copied / "synthetic_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=words):
        load_planted(str(copied))


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a synthetic model of SAELens"):
        load_planted(str(tmp_path))
