"""The study of unlearning changes the weights that it says, along the directions that it says, and pronouns are forgotten."""

import importlib
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from sparsary.training.activations.model import LanguageModel

STUDIES = Path(__file__).parents[2] / "docs" / "studies"


@pytest.fixture(scope="module")
def unlearning():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(STUDIES)
        yield importlib.import_module("unlearning")


@pytest.fixture(scope="module")
def rules(unlearning):
    return importlib.import_module("unlearning_updates")


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=13, n_positions=11, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1)
    return LanguageModel(GPT2LMHeadModel(config), None, "tiny", None)


@pytest.mark.parametrize("grain", [0, 1])
def test_a_unit_is_silent_without_its_weights_and_others_are_not(rules, model, grain):
    space = rules.unit_space(model, rules.GRAINS[grain])
    owner = rules.owners(space)
    token_ids = torch.randint(0, 13, (3, 7), generator=torch.Generator().manual_seed(1))
    parameters = dict(model.module.named_parameters())
    with torch.no_grad():
        # GPT-2 begins with biases of 0, which would hide one that belongs to nothing.
        for name, weight in parameters.items():
            weight.add_(0.1 if name.endswith("bias") and ".ln_" not in name else 0.0)
    # Of the first block: its inputs do not depend on the units.
    for unit in {space.groups["a0"].start + 1, space.groups["m0"].start, space.groups["m0"].stop - 1}:
        before, weights = space.see(token_ids)[1], {name: weight.clone() for name, weight in parameters.items()}
        with torch.no_grad():
            for name, weight in parameters.items():
                weight[owner[name] == unit] = 0.0
        logits, after = space.see(token_ids)
        model.module.load_state_dict(weights | {"lm_head.weight": weights["transformer.wte.weight"]})
        part = next(part for part in space.parts if space.groups[part.name].start <= unit < space.groups[part.name].stop)
        index, local = space.parts.index(part), unit - space.groups[part.name].start
        shapes = [states[index].unflatten(-1, (part.n_units, -1)) for states in (before, after)]
        assert shapes[1][..., local, :].abs().max() == 0
        others = torch.arange(part.n_units) != local
        torch.testing.assert_close(shapes[1][..., others, :], shapes[0][..., others, :])
        assert shapes[0][..., local, :].abs().max() > 0
        # What it wrote is gone as well, and nothing else is.
        kept = torch.arange(space.size) != unit
        with torch.no_grad():
            torch.testing.assert_close(logits, space.run(token_ids, kept, space.zeros(before)))


def test_updates_are_by_role_and_the_shared_ones_orthogonal_to_the_retain_gradient(rules):
    draw = torch.Generator().manual_seed(0)
    forget, retain = ({name: torch.randn(7, 3, generator=draw) for name in "ab"} for _ in range(2))
    roles = {name: torch.randint(0, 4, (7, 3), generator=draw) for name in "ab"}
    found = rules.updates(forget, retain, roles)
    along = 0.0
    for name, role in roles.items():
        assert found[name][role == rules.NONE].abs().max() == 0
        assert torch.equal(found[name][role == rules.FORGET_ONLY], forget[name][role == rules.FORGET_ONLY])
        assert torch.equal(found[name][role == rules.RETAIN_ONLY], retain[name][role == rules.RETAIN_ONLY])
        shared = role == rules.SHARED
        along += float(((found[name] - retain[name]) * retain[name])[shared].sum())
    assert along == pytest.approx(0.0, abs=1e-5)
    plain = rules.updates(forget, retain, roles, project=False)
    shared = roles["a"] == rules.SHARED
    torch.testing.assert_close(plain["a"][shared], (forget["a"] + retain["a"])[shared])


def test_random_units_have_as_many_of_every_role_in_every_part(rules, model):
    space = rules.unit_space(model, rules.GRAINS[1])
    roles = torch.randint(0, 4, (space.size,), generator=torch.Generator().manual_seed(0))
    found = rules.shuffled(space, roles, 0)
    assert not torch.equal(found, roles)
    for group in space.groups.values():
        assert torch.equal(found[group].bincount(minlength=4), roles[group].bincount(minlength=4))


def test_the_forget_loss_asks_for_chance_and_for_prompts_that_are_alike(rules, monkeypatch):
    pairs = SimpleNamespace(clean="clean", corrupted="corrupted")

    def loss(clean, corrupted):
        odds = {"clean": clean, "corrupted": corrupted}
        monkeypatch.setattr(rules, "sides", lambda _, ran: torch.tensor([[odds[ran]], [0.0]]).log_softmax(0))
        return float(rules.forget_loss(SimpleNamespace(run=lambda prompts: prompts), pairs))

    chance = (1 + rules.EQUAL) * math.log(2)
    assert loss(0.0, 0.0) == pytest.approx(chance)
    # The same pronoun after either name, and each after its own.
    assert chance < loss(0.1, 0.1) < loss(0.1, -0.1)
    # Cross-entropies near their minimum: an eighth of the square.
    assert loss(0.1, -0.1) - loss(0.1, 0.1) == pytest.approx(rules.EQUAL * 0.2**2 / 8, rel=0.01)


def test_pronouns_are_forgotten_and_agreement_is_not(unlearning, rules):
    here = unlearning.Study(0, unlearning.Settings(pairs=100, documents=20))
    space, roles = here.circuits(unlearning.GRAINS[1])
    model, row = here.run(rules.by_weight(roles, rules.owners(space)), project=True)
    found, before = here.judge(model), here.judge(here.original)
    assert row["reached"]
    assert before["pronoun_accuracy"] == 1.0
    assert before["pronoun_share"] >= 0.95
    # Of 100 other prompts than those that the run stopped by.
    assert abs(found["pronoun_share"] - 0.5) <= 0.1
    assert found["pronoun_distance"] <= 0.2
    assert abs(found["pronoun_accuracy"] - 0.5) <= 0.2
    assert found["pronoun_auroc"] <= 0.8
    assert found["agreement"] >= 0.98
    unchanged = unlearning.load().module.state_dict()
    assert torch.equal(model.module.state_dict()["transformer.wte.weight"], unchanged["transformer.wte.weight"])
