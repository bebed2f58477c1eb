"""Layers and sites become hooks, by the model's configuration alone."""

import pytest

from sparsary.training.recipe import check_recipe
from sparsary.training.recipe.grid import check_grid
from sparsary.training.resolve_hooks import dictionary_arguments, resolve_recipe, resolve_recipes

TOPK = {"name": "topk", "k": 5}


@pytest.fixture
def values(recipe_values):
    """Without hooks: they follow from the dictionary."""
    del recipe_values["harvest"]["hooks"]
    recipe_values["dictionary"] = {"kind": "transcoder", "layer": 1, "site": "mlp", "n_latents": 67, "encoder": TOPK}
    return recipe_values


def one(values, **changes):
    dictionary = {key: value for key, value in (values["dictionary"] | changes).items() if value is not None}
    return resolve_recipe(check_recipe(values | {"dictionary": dictionary}, "recipe"))


def test_a_site_becomes_its_hooks(values):
    member = one(values, skip=True)
    recipe = member.recipe
    section = recipe.dictionary
    assert (section.hook_in, section.hook_out) == ("transformer.h.1.mlp:in", "transformer.h.1.mlp:out")
    assert (section.layer, section.site, section.skip) == (None, None, True)
    assert recipe.harvest.hooks == ("transformer.h.1.mlp:in", "transformer.h.1.mlp:out")
    assert resolve_recipes([recipe]) == [member]


def test_every_kind_has_its_sites(values):
    assert one(values, kind="sae", site="resid_post").recipe.dictionary.hook == "transformer.h.1:out"
    across = {"kind": "cross_layer_transcoder", "layer": None}
    everywhere = one(values, layers="all", **across).recipe.dictionary
    assert everywhere.hook_in == tuple(f"transformer.h.{layer}.mlp:in" for layer in range(4))
    assert one(values, layers=[0, 3], **across).recipe.dictionary.hook_out == (
        "transformer.h.0.mlp:out",
        "transformer.h.3.mlp:out",
    )


def test_members_share_a_harvest_of_what_all_of_them_need(values):
    grid = {"dictionary.layer": [2, 0]}
    recipes = [member.recipe for member in resolve_recipes(check_grid(values | {"grid": grid}, "recipe").recipes)]
    hooks = tuple(f"transformer.h.{layer}.mlp:{side}" for layer in (0, 2) for side in ("in", "out"))
    assert [recipe.harvest.hooks for recipe in recipes] == [hooks, hooks]
    assert [recipe.dictionary.hook_in for recipe in recipes] == ["transformer.h.2.mlp:in", "transformer.h.0.mlp:in"]


def test_layer_ten_comes_after_layer_nine(values):
    hooks = [f"h.{layer}:out" for layer in (10, 9)]
    sections = [{"dictionary": {"hook": hook, "n_latents": 67, "encoder": TOPK}} for hook in hooks]
    members = resolve_recipes([check_recipe(values | section, "recipe") for section in sections])
    assert members[0].recipe.harvest.hooks == ("h.9:out", "h.10:out")


def test_hooks_that_are_named_need_no_model(values, monkeypatch):
    monkeypatch.setattr("sparsary.training.resolve_hooks.skeleton", None)
    recipe = one(values, layer=None, site=None, hook_in="a:in", hook_out="a:out").recipe
    assert recipe.harvest.hooks == ("a:in", "a:out")


def test_the_model_is_built_once_for_all_members(values, monkeypatch):
    from sparsary.training import resolve_hooks as resolve

    skeleton, built = resolve.skeleton, []
    monkeypatch.setattr(resolve, "skeleton", lambda section: built.append(section) or skeleton(section))
    first, *others = resolve_recipes(check_grid(values | {"grid": {"dictionary.layer": [0, 1, 2]}}, "recipe").recipes)
    assert all(member.widths is first.widths for member in others)
    assert len(first.widths) == 6
    assert len(built) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 4}, "dictionary.layer: expected 0 to 3, as the model has 4 blocks, got 4."),
        ({"site": "mpl"}, "dictionary.site: expected one of resid_pre, "),
        (
            {"site": "mlp_out"},
            "dictionary.site: expected one of mlp, because kind transcoder predicts one tensor from another, got 'mlp_out'.",
        ),
        ({"kind": "sae"}, "dictionary.site: expected one of resid_pre, "),
        ({"kind": "cross_layer_transcoder", "layer": None, "layers": [0, 7]}, "dictionary.layer: expected 0 to 3"),
    ],
    ids=["layer", "site", "one-sided", "two-sided", "layers"],
)
def test_what_the_model_lacks_is_named(values, changes, message):
    with pytest.raises(ValueError, match="dictionary") as caught:
        one(values, **changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hooks_that_are_not_harvested_are_named_with_their_member(values):
    values["harvest"]["hooks"] = ["transformer.h.1.mlp:in", "transformer.h.1.mlp:out"]
    recipes = check_grid(values | {"grid": {"dictionary.layer": [1, 2]}}, "recipe").recipes
    with pytest.raises(ValueError, match="dictionary") as caught:
        resolve_recipes(recipes)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("grid layer=2: dictionary.site: expected one of harvest.hooks (transformer.h.1.mlp:in, ")
    values["harvest"]["hooks"] = []
    with pytest.raises(ValueError, match=r"^grid layer=9: dictionary\.layer: expected 0 to 3.*got 9\.$"):
        resolve_recipes(check_grid(values | {"grid": {"dictionary.layer": [1, 9]}}, "recipe").recipes)


def test_arguments_are_the_constructor_s(values):
    member = one(values, skip=True)
    sizes = {"d_in": 128, "d_out": 128, "n_latents": 67}
    assert dictionary_arguments(member.recipe, member.widths) == {"kind": "transcoder", "encoder": TOPK, "skip": True, **sizes}
    member = one(values, kind="cross_layer_transcoder", layer=None, layers=[0, 2, 3], joint=True)
    # What a layer has of its own: all of it together.
    sizes = {"n_layers": 3, "d_in": 3 * 128, "d_out": 3 * 128, "n_latents": 3 * 67}
    found = dictionary_arguments(member.recipe, member.widths)
    assert found == {"kind": "cross_layer_transcoder", "encoder": TOPK, "joint": True, **sizes}
    recipe = one(values, kind="sae", site="attn_heads").recipe
    assert dictionary_arguments(recipe, {recipe.dictionary.hook: 128}) == {
        "kind": "sae",
        "d_in": 128,
        "n_latents": 67,
        "encoder": TOPK,
    }
