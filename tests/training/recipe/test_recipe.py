"""Recipes: every mistake at once, by key, value and remedy."""

import json

import pytest

from sparsary.training.recipe import check_recipe, differences, dump_recipe, load_recipe, parse_overrides, parse_yaml


def complaints(values):
    with pytest.raises(ValueError, match="recipe") as caught:
        check_recipe(values, "recipe")
    return str(caught.value).splitlines()


def test_a_good_recipe_survives_dumping_and_loading(recipe_values, tmp_path):
    recipe = check_recipe(recipe_values, "recipe")
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path) == recipe


def test_all_mistakes_are_reported_at_once(recipe_values):
    del recipe_values["out_dir"]
    recipe_values["lrr"] = 1e-3
    recipe_values["tokens"] = "many"
    recipe_values["harvest"]["dtyp"] = "int8"
    recipe_values["dictionary"]["encoder"] = {"name": "topk", "kk": 3}
    lines = complaints(recipe_values)
    assert all(line.startswith("recipe: ") for line in lines)
    text = "\n".join(lines)
    assert "out_dir: required, but missing" in text
    assert "lrr: unknown key" in text
    assert "Did you mean 'lr'?" in text
    assert "tokens: expected a valid integer, got 'many'" in text
    assert "harvest.dtyp: unknown key" in text
    assert "Did you mean 'dtype'?" in text
    assert "dictionary.encoder.kk: unknown key. topk takes k. Did you mean 'k'?" in text
    assert "dictionary.encoder.k: required, but missing" in text
    assert len(lines) == 6


def test_an_unknown_key_does_not_hide_what_no_single_key_can_say(recipe_values):
    recipe_values["lrr"] = 1
    recipe_values["dictionary"]["encoder"]["k"] = 1000
    assert len(complaints(recipe_values)) == 2


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("dictionary.encoder", {"name": "topkk", "k": 1}, "gated, got 'topkk'. Did you mean 'topk'?"),
        ("dictionary.encoder", {"k": 1}, "dictionary.encoder.name: required, but missing"),
        ("dictionary.encoder", {"name": "topk", "k": 2.0}, "dictionary.encoder.k: expected a valid integer, got 2.0"),
        ("dictionary.encoder", {"name": "topk", "k": 68}, "dictionary.encoder.k: expected at most n_latents = 67, got 68"),
        ("dictionary.encoder", {"name": "topk", "k": 0}, "dictionary.encoder.k: expected at least 1, got 0"),
        ("dictionary.hook", "transformer.h.3:out", "dictionary.hook: expected one of harvest.hooks"),
        ("dictionary.n_latents", 0, "dictionary.n_latents: expected greater than or equal to 1, got 0"),
        (
            "dictionary.kind",
            "sea",
            "dictionary.kind: expected 'sae', 'transcoder', 'cross_layer_transcoder' or 'crosscoder', got",
        ),
        ("harvest.hooks", ["transformer.h.2"], "expected a module path and a side"),
        ("harvest.hooks", ["transformer.h.2:out", "transformer.h.2:out"], "each hook once"),
        ("harvest.tokens", None, "harvest.tokens: required with harvest.store, but missing"),
        ("harvest.heldout", 1.0, "harvest.heldout: expected less than 1, got 1.0"),
        ("harvest.exclude_leading", 32, "nothing would be left"),
        ("text.bos", "sometimes", "text.bos: expected 'context', 'document' or 'none', got 'sometimes'"),
        ("text.source", "files", "text.files: required when text.source is files"),
        ("text.source", "hub", "text.dataset: required when text.source is hub"),
        ("model", {"id": "gpt2"}, "text.source: the embedded corpus is for model.id embedded"),
        ("accumulate", 3, "accumulate: expected a divisor of batch_tokens = 101, got 3"),
        ("batch_tokens", 5000, "batch_tokens: expected at most tokens = 3030, got 5000"),
        ("tokens", 2e6, "Write whole numbers without exponent"),
        ("tokens", True, "tokens: expected a valid integer, got True"),
        ("lr", "1e-3", "lr: expected a valid number, or auto, got '1e-3'"),
        ("lr", -1.0, "lr: expected greater than 0"),
        ("lr", "fast", "lr: expected a valid number, or auto, got 'fast'"),
        ("lr", True, "lr: expected a valid number, or auto, got True"),
        ("betas", [0.9], "betas: expected two numbers from 0 to below 1, or auto, got [0.9]"),
        ("betas", [0.9, 1.0], "betas: expected two numbers from 0 to below 1, or auto"),
        ("betas", "adam", "betas: expected two numbers from 0 to below 1, or auto, got 'adam'"),
        ("wandb", {"projct": "x"}, "Did you mean 'project'?"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(recipe_values, key, value, message):
    section = recipe_values
    *parents, last = key.split(".")
    for parent in parents:
        section = section[parent]
    section[last] = value
    assert message in "\n".join(complaints(recipe_values))


def test_yaml_1_2_reads_exponents_as_numbers_and_no_as_a_word():
    assert parse_yaml("a: 1e-4\nb: no\nc: 1_000", "x") == {"a": 1e-4, "b": "no", "c": 1000}


@pytest.mark.parametrize("text", ["a: [", "a: 1\na: 2", "\t- x: y: z"])
def test_broken_yaml_is_one_line(text):
    with pytest.raises(ValueError, match=r"recipe\.yaml: expected YAML") as caught:
        parse_yaml(text, "recipe.yaml")
    assert "\n" not in str(caught.value)


def test_overrides_are_typed_like_the_file(recipe_values, write_recipe):
    path = write_recipe(recipe_values)
    recipe = load_recipe(path, parse_overrides(["dictionary.encoder.k=7", "lr=1e-4", "model.device=cpu"]))
    assert (recipe.dictionary.encoder["k"], recipe.lr, recipe.model.device) == (7, 1e-4, "cpu")
    with pytest.raises(ValueError, match="lrr: unknown key"):
        load_recipe(path, parse_overrides(["lrr=1"]))
    with pytest.raises(ValueError, match=r"key\.sub=value"):
        parse_overrides(["lr"])
    with pytest.raises(ValueError, match="expected tokens to be a section"):
        load_recipe(path, {"tokens.x": 1})


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path, recipe_values):
    path = tmp_path / "recipe.yaml"
    path.write_text("\ufeff" + json.dumps(recipe_values), encoding="utf-8")
    assert load_recipe(path) == check_recipe(recipe_values, "recipe")
    path.write_bytes("seed: 1 # é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"recipe\.yaml: expected UTF-8 text, got other bytes"):
        load_recipe(path)


def test_paths_may_begin_at_the_home_directory(recipe_values, monkeypatch):
    """Shells expand ``~`` neither in a recipe nor behind ``out_dir=``; it would be a folder of that name."""
    monkeypatch.setenv("HOME", "/home/me")
    recipe_values["model"] = {"id": "~/gpt2"}
    recipe_values["text"] = {"source": "files", "files": ["~/a.txt", "/data/~b.txt"]}
    recipe_values["harvest"]["store"] = "~/acts"
    recipe = check_recipe(recipe_values | {"out_dir": "~/runs/a"}, "recipe")
    assert (recipe.model.id, recipe.out_dir, recipe.harvest.store) == ("/home/me/gpt2", "/home/me/runs/a", "/home/me/acts")
    assert recipe.text.files == ("/home/me/a.txt", "/data/~b.txt")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.yaml: expected a recipe file"):
        load_recipe(tmp_path / "none.yaml")


def test_a_recipe_is_frozen(recipe_values):
    recipe = check_recipe(recipe_values, "recipe")
    with pytest.raises(ValueError, match="frozen"):
        recipe.lr = 1.0


def test_differences_name_keys_and_leave_out_what_may_change(recipe_values):
    old = check_recipe(recipe_values, "recipe")
    new = check_recipe(recipe_values | {"lr": 2e-3, "save_every": 77, "log_every": 3}, "recipe")
    assert differences(old, new) == ["lr: 0.001 there, 0.002 here"]


# A recipe over another.


def test_a_recipe_holds_what_differs_from_its_base(recipe_values, write_recipe, tmp_path):
    (tmp_path / "family").mkdir()
    write_recipe(recipe_values, "base.yaml")
    changes = {
        "base": "../base.yaml",
        "lr": 2e-3,
        "harvest": {"heldout": 0.2},
        "dictionary": {"encoder": {"name": "jumprelu", "target_l0": 9}},
    }
    recipe = load_recipe(write_recipe(changes, "family/own.yaml"))
    base = check_recipe(recipe_values, "base")
    assert differences(base, recipe) == [
        "dictionary.encoder.k: 5 there, None here",
        "dictionary.encoder.name: 'topk' there, 'jumprelu' here",
        "dictionary.encoder.target_l0: None there, 9 here",
        "harvest.heldout: 0.05 there, 0.2 here",
        "lr: 0.001 there, 0.002 here",
    ]
    # What is saved with a run needs no base.
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_recipe(recipe))
    assert "base" not in path.read_text()
    assert load_recipe(path) == recipe


def test_bases_have_bases_and_lists_are_replaced_whole(recipe_values, write_recipe):
    write_recipe(recipe_values | {"schedules": {"k": [[0.0, 7], [1.0, 5]]}, "lr": 1e-4}, "first.yaml")
    write_recipe({"base": "first.yaml", "lr": 2e-4, "seed": 3}, "second.yaml")
    third = load_recipe(write_recipe({"base": "second.yaml", "schedules": {"k": [[0.5, 6]]}, "seed": 4}, "third.yaml"))
    assert (third.lr, third.seed, third.schedules) == (2e-4, 4, {"k": ((0.5, 6),)})
    assert third.tokens == recipe_values["tokens"]


def test_overrides_go_over_recipe_and_base(recipe_values, write_recipe):
    write_recipe(recipe_values, "base.yaml")
    path = write_recipe({"base": "base.yaml", "lr": 2e-3}, "own.yaml")
    recipe = load_recipe(path, parse_overrides(["lr=3e-3", "dictionary.encoder.k=7"]))
    assert (recipe.lr, recipe.dictionary.encoder) == (3e-3, {"name": "topk", "k": 7})


def test_a_mistake_in_either_file_is_told_under_the_recipe_s_name(recipe_values, write_recipe):
    write_recipe(recipe_values | {"lrr": 1.0}, "base.yaml")
    path = write_recipe({"base": "base.yaml", "sead": 1}, "own.yaml")
    with pytest.raises(ValueError, match="lrr: unknown key") as caught:
        load_recipe(path)
    assert all("own.yaml: " in line for line in str(caught.value).splitlines())
    assert "sead: unknown key" in str(caught.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "a"}, r"a\.yaml: base: expected the name of another recipe file, which does not lead back here, got 'a\.yaml'"),
        ({"a": "b", "b": "a"}, r"a\.yaml: base: expected .* which does not lead back here, got 'b\.yaml'"),
        ({"a": "b", "b": "c", "c": "b"}, r"b\.yaml: base: expected .* which does not lead back here, got 'c\.yaml'"),
        ({"a": "nowhere"}, r"nowhere\.yaml: expected a recipe file"),
    ],
)
def test_a_base_that_leads_nowhere_is_refused(recipe_values, write_recipe, files, message):
    for name, base in files.items():
        path = write_recipe(recipe_values | {"base": f"{base}.yaml"}, f"{name}.yaml")
    with pytest.raises(ValueError, match=message):
        load_recipe(str(path).replace(f"{name}.yaml", "a.yaml"))


def test_a_base_that_is_no_name_is_refused(recipe_values, write_recipe):
    with pytest.raises(ValueError, match=r"base: expected the name of another recipe file, .*got 3"):
        load_recipe(write_recipe(recipe_values | {"base": 3}))


# Kinds of dictionaries, and the two ways to say where they stand.

TRANSCODER = {"kind": "transcoder", "hook": None}
CROSS_LAYER = {"kind": "cross_layer_transcoder", "hook": None}
BY_SITE = {"site": "mlp", "layer": 0}
ALL_LAYERS = {"site": "mlp", "layers": "all"}


def with_dictionary(values, changes):
    values["harvest"] = {key: value for key, value in values["harvest"].items() if key != "hooks"}
    values["dictionary"] = {key: value for key, value in (values["dictionary"] | changes).items() if value is not None}
    return values


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hook": None, "layer": 0, "site": "resid_post"},
        TRANSCODER | BY_SITE | {"skip": True},
        TRANSCODER | {"hook_in": "a.mlp:in", "hook_out": "a.mlp:out"},
        CROSS_LAYER | ALL_LAYERS | {"joint": True},
        CROSS_LAYER | {"site": "mlp", "layers": [0, 2, 3], "encoder": {"name": "jumprelu", "target_l0": 3}},
        CROSS_LAYER | {"hook_in": ["a:in", "b:in"], "hook_out": ["a:out", "b:out"]},
    ],
    ids=str,
)
def test_a_dictionary_stands_at_hooks_or_at_a_site(recipe_values, tmp_path, changes):
    recipe = check_recipe(with_dictionary(recipe_values, changes), "recipe")
    assert recipe.harvest.hooks == ()
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path) == recipe
    assert recipe.dictionary.resolved == ("site" not in changes)


def test_hooks_of_a_dictionary_by_kind(recipe_values):
    section = check_recipe(
        with_dictionary(recipe_values, CROSS_LAYER | {"hook_in": ["a:in", "b:in"], "hook_out": ["a:out", "b:out"]}), "x"
    ).dictionary
    assert (section.hooks_in, section.hooks_out) == (("a:in", "b:in"), ("a:out", "b:out"))
    recipe_values["dictionary"] = {"hook": "a:out", "n_latents": 67, "encoder": {"name": "topk", "k": 5}}
    section = check_recipe(recipe_values, "x").dictionary
    assert section.hooks_in == section.hooks_out == section.all_hooks == ("a:out",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skip": True}, "dictionary.skip: expected it with kind transcoder only, got it with kind sae. Leave it out."),
        ({"joint": True}, "dictionary.joint: expected it with kind cross_layer_transcoder only, got it with kind sae."),
        ({"hook": None}, "dictionary: expected hooks, or a layer and its site, got neither. Give hook, or layer and site."),
        ({"layer": 0, "site": "mlp_out"}, "dictionary: expected hooks, or a layer and its site, got hook and layer and site."),
        ({"hook": None, "layer": 0}, "dictionary.site: required beside layer, but missing."),
        ({"hook": None, "layer": -1, "site": "mlp_out"}, "dictionary.layer: expected greater than or equal to 0, got -1"),
        (
            {"kind": "transcoder"},
            "dictionary.hook: expected it with kind sae only, got it with kind transcoder. Give hook_in and",
        ),
        (TRANSCODER | {"hook_in": "a:in"}, "dictionary.hook_out: required beside hook_in, but missing."),
        (
            TRANSCODER | {"hook_in": "a:in", "hook_out": "a"},
            "dictionary.hook_out: expected a module path and a side, like a:out",
        ),
        (TRANSCODER | {"hook_in": ["a:in"], "hook_out": "a:out"}, "dictionary.hook_in: expected one hook, got ['a:in']."),
        (TRANSCODER | {"hook_in": 3, "hook_out": "a:out"}, "dictionary.hook_in: expected a hook, or a list of hooks, got 3."),
        (TRANSCODER | {"hook_in": "a:in", "hook_out": "a:in"}, "What reconstructs its input is kind: sae."),
        (
            TRANSCODER | ALL_LAYERS,
            "dictionary.layers: expected it with kind cross_layer_transcoder or crosscoder only, got it",
        ),
        (
            CROSS_LAYER | BY_SITE,
            "dictionary.layer: expected it with kind sae or transcoder only, got it with kind cross_layer_tr",
        ),
        (CROSS_LAYER | ALL_LAYERS | {"skip": True}, "dictionary.skip: expected it with kind transcoder only"),
        (
            CROSS_LAYER | {"site": "mlp", "layers": [2, 1]},
            "expected all, or two or more layers that ascend from 0 on, got [2, 1].",
        ),
        (CROSS_LAYER | {"site": "mlp", "layers": [1]}, "expected all, or two or more layers that ascend"),
        (CROSS_LAYER | {"site": "mlp", "layers": "most"}, "dictionary.layers: expected all, or a list of layers, got 'most'."),
        (
            CROSS_LAYER | {"hook_in": "a:in", "hook_out": ["a:out", "b:out"]},
            "hook_in: expected a list of hooks, one of every layer, got 'a:in'",
        ),
        (
            CROSS_LAYER | {"hook_in": ["a:in", "b:in"], "hook_out": ["a:out"]},
            "dictionary.hook_out: expected two or more hooks, as many as in hook_in, got 2 and 1.",
        ),
        (CROSS_LAYER | {"hook_in": ["a:in", "a:in"], "hook_out": ["a:out", "b:out"]}, "hook_in: expected each hook once"),
        (
            CROSS_LAYER | ALL_LAYERS | {"encoder": {"name": "mutual_choice", "k": 3}},
            "dictionary.encoder.name: expected topk or jumprelu or relu in a cross_layer_transcoder, got 'mutual_choice'.",
        ),
        (
            CROSS_LAYER | ALL_LAYERS | {"joint": True, "encoder": {"name": "matryoshka", "k": 3}},
            "dictionary.encoder.name: expected topk or jumprelu or relu with joint, got 'matryoshka'.",
        ),
        (
            CROSS_LAYER | ALL_LAYERS | {"joint": True, "encoder": {"name": "jumprelu", "target_l0": 3}},
            "dictionary.encoder.penalty: expected l0 or tanh with joint, because square is about one layer's target.",
        ),
    ],
    ids=str,
)
def test_what_does_not_go_with_a_kind_is_named(recipe_values, changes, message):
    lines = complaints(with_dictionary(recipe_values, changes))
    assert len(lines) == 1
    assert message in lines[0]


def test_hooks_are_of_the_harvest_where_it_names_them(recipe_values):
    recipe_values["dictionary"] = TRANSCODER | {"hook_in": "transformer.h.2:out", "hook_out": "transformer.h.2:in"}
    recipe_values["dictionary"] |= {"n_latents": 67, "encoder": {"name": "topk", "k": 5}}
    assert complaints(recipe_values) == [
        "recipe: dictionary.hook_out: expected one of harvest.hooks (transformer.h.2:out), got 'transformer.h.2:in'. "
        "Did you mean 'transformer.h.2:out'?"
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"phases": [{"start": 0.5, "encoder": {"name": "topk", "k": 3}}]},
            "phases: expected none with a cross_layer_transcoder",
        ),
        ({"screen": "int8"}, "screen: expected none with a cross_layer_transcoder, got 'int8'."),
        ({"objective": "kl"}, "objective: expected reconstruction with a cross_layer_transcoder, which writes to many layers"),
    ],
    ids=["phases", "screen", "objective"],
)
def test_what_a_cross_layer_transcoder_cannot_do_is_named(recipe_values, changes, message):
    values = with_dictionary(recipe_values, CROSS_LAYER | ALL_LAYERS) | changes
    values["harvest"]["store"] = None
    lines = complaints(values)
    assert len(lines) == 1
    assert message in lines[0]


def test_hooks_that_are_harvested_besides_do_not_make_another_run(recipe_values):
    old = check_recipe(recipe_values, "recipe")
    recipe_values["harvest"]["hooks"] = [*recipe_values["harvest"]["hooks"], "transformer.h.1:out"]
    assert differences(old, check_recipe(recipe_values, "recipe")) == []
