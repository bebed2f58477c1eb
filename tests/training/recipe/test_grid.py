"""Grids: many dictionaries over one stream, each what it would have been alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import sparsary
from sparsary.sae import ENCODERS, SAE, load_dictionary
from sparsary.training import loop as loop_module
from sparsary.training.activations import live
from sparsary.training.activations.store_stream import StoreStream
from sparsary.training.bench.grid import GridShape, bench_grid
from sparsary.training.checkpoints import Checkpoints
from sparsary.training.objective import Objective
from sparsary.training.preflight import preflight, preflight_all
from sparsary.training.recipe import check_recipe, load_recipe
from sparsary.training.recipe.grid import check_grid, load_grid
from sparsary.training.resolve_hooks import resolve_recipe, resolve_recipes
from sparsary.training.run import run_harvest, train_all, train_recipe
from sparsary.training.training_plan import grid_lines

FAMILIES = [
    {"name": "lr", "lr": 3e-3, "log_every": 7},
    {"name": "wide", "dictionary.n_latents": 83, "dictionary.encoder.k": 3, "seed": 1},
    {
        "name": "both_choices",
        "dictionary.encoder": {"name": "mutual_choice", "k": 5},
        "phases": [{"start": 0.4, "blend": 0.3, "encoder": {"name": "feature_choice", "k": 5, "rerank_every": 4}}],
        "schedules": {"k": [[0.0, 5], [0.5, 4]]},
    },
    {"name": "pursuit", "dictionary.encoder": {"name": "matching_pursuit", "k": 3}, "tokens": 1515},
    {"name": "gradient", "dictionary.encoder": {"name": "gradient_topk", "k": 5, "beta": 2.0}},
    {"name": "relu", "dictionary.encoder": {"name": "relu", "target_l0": 5}, "dictionary.normalize": "none"},
    {"name": "random", "dictionary.init": "random", "batch_tokens": 60, "save_every": 7},
]


@pytest.fixture(autouse=True)
def one_thread():
    """Members that step side by side on several threads round otherwise than alone with all of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(19, 19, generator=generator)
    draws = [torch.randn(500, 19, generator=generator) for _ in range(6)]
    return [(draws[i].relu() @ mixing, draws[i + 3]) for i in range(3)]


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory):
    return str(tmp_path_factory.mktemp("stores") / "shared")


@pytest.fixture
def values(recipe_values, shared_store):
    """Thirty steps; two hooks, so that members may differ in them."""
    recipe_values["harvest"] |= {"hooks": ["transformer.h.1:out", "transformer.h.2:out"], "store": shared_store}
    recipe_values["harvest"]["gradients"] = True
    return recipe_values


def members(values, grid):
    return check_grid(values | {"grid": grid}, "recipe").recipes


TRAINED = {}


def alone(recipe, tmp_path, activations=None):
    """The directory of the same recipe trained by itself; several tests ask for some."""
    key = (recipe.model_copy(update={"out_dir": ""}).model_dump_json(), type(activations))
    if key not in TRAINED:
        out = tmp_path / "alone" / Path(recipe.out_dir).name
        TRAINED[key] = train_recipe(resolve_recipe(recipe.model_copy(update={"out_dir": str(out)})), activations)
    return TRAINED[key]


def assert_equal_runs(a, b):
    for name in ("state.safetensors", "dictionary.safetensors"):
        first, second = load_file(Path(a) / name), load_file(Path(b) / name)
        assert first.keys() == second.keys()
        assert not [key for key in first if not torch.equal(first[key], second[key])], f"{a} {name}"
    assert metrics(a) == metrics(b)


def metrics(directory):
    """The lines less what measures time."""
    lines = [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]
    return [{key: v for key, v in line.items() if key not in ("tokens_per_second", "data_wait_share")} for line in lines]


def counters(directory):
    with safe_open(Path(directory) / "state.safetensors", framework="pt") as handle:
        return json.loads(handle.metadata()["counters"])


# Bit for bit what training alone gives.


def test_every_member_is_bit_equal_to_itself_trained_alone(values, rows, tmp_path):
    recipes = members(values, FAMILIES)
    for directory, recipe in zip(train_all(resolve_recipes(recipes), rows), recipes, strict=True):
        assert_equal_runs(alone(recipe, tmp_path, rows), directory)
        assert counters(directory)["tokens"] >= recipe.tokens


def test_members_that_step_side_by_side_are_what_they_would_have_been_alone(values, rows, tmp_path):
    recipes = members(values, FAMILIES[:4])
    torch.set_num_threads(2)
    trained = train_all(resolve_recipes(recipes), rows)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    for directory, recipe in zip(trained, recipes, strict=True):
        assert_equal_runs(alone(recipe, tmp_path, rows), directory)


def test_over_a_store_members_may_differ_in_seed_and_hook(values, tmp_path):
    first, second = values["harvest"]["hooks"]
    gradient = {"name": "gradient_topk", "k": 5, "beta": 2.0}
    changes = [{"dictionary.hook": first}, {"dictionary.hook": first, "dictionary.encoder": gradient}]
    recipes = members(values | {"tokens": 505}, [*changes, {"dictionary.hook": second, "seed": 1}])
    for directory, recipe in zip(train_all(resolve_recipes(recipes)), recipes, strict=True):
        assert_equal_runs(alone(recipe, tmp_path), directory)


def test_a_dictionary_starts_from_its_own_seed(values, rows):
    recipes = members(values | {"tokens": 101, "auxk_weight": 0.0}, {"seed": [3, 4], "dictionary.init": ["random"]})
    for seed, directory in zip((3, 4), train_all(resolve_recipes(recipes), rows), strict=True):
        torch.manual_seed(seed)
        fresh = SAE(19, 67, ENCODERS["topk"](k=5))
        # One step of lr 1e-3 / 5 has not moved it far.
        moved = (load_file(directory / "state.safetensors")["dictionary/W_dec"] - fresh.W_dec).abs().max()
        assert 0 < moved < 1e-3


@pytest.mark.parametrize("gradients", [False, True])
def test_straight_from_the_model_members_may_differ_in_seed_and_hook(values, tmp_path, gradients):
    values["harvest"] |= {"store": None, "tokens": None, "live_buffer_tokens": 900, "gradients": gradients}
    first, second = values["harvest"]["hooks"]
    recipes = members(
        values | {"tokens": 505},
        [{"dictionary.hook": first}, {"dictionary.hook": first, "seed": 1}, {"dictionary.hook": second}],
    )
    for directory, recipe in zip(train_all(resolve_recipes(recipes)), recipes, strict=True):
        assert_equal_runs(alone(recipe, tmp_path), directory)


def test_end_to_end_and_reconstruction_share_a_model(values, tmp_path):
    values["harvest"] |= {"store": None, "tokens": None, "live_buffer_tokens": 900, "gradients": False}
    values |= {"tokens": 505}
    recipes = members(values, {"objective": ["kl", "reconstruction"]})
    for directory, recipe in zip(train_all(resolve_recipes(recipes)), recipes, strict=True):
        assert_equal_runs(alone(recipe, tmp_path), directory)


def test_a_live_model_runs_once_for_all_hooks_and_seeds(values, monkeypatch):
    values["harvest"] |= {"store": None, "tokens": None, "live_buffer_tokens": 900, "gradients": False}
    # Moments rest on the first buffer, which is kept; more of it every stream would read for itself.
    values |= {"calibration_tokens": 100, "tokens": 1010}
    rows_of, seen = live.rows_of, []

    def counted(model, batch, section, hooks):
        seen.append(tuple(batch.cursor))
        return rows_of(model, batch, section, hooks)

    monkeypatch.setattr(live, "rows_of", counted)
    train_all(resolve_recipes(members(values, {"dictionary.hook": values["harvest"]["hooks"], "seed": [0, 1]})))
    assert len(seen) == len(set(seen))


def test_a_step_draws_no_random_numbers(values, rows, monkeypatch):
    step = loop_module.step

    def watched(*arguments):
        before = torch.get_rng_state()
        terms = step(*arguments)
        assert torch.equal(before, torch.get_rng_state())
        return terms

    monkeypatch.setattr(loop_module, "step", watched)
    train_all(resolve_recipes(members(values | {"tokens": 404}, FAMILIES)), rows)


@pytest.mark.parametrize("threads", [1, 2])
def test_pieces_of_a_batch_are_the_member_s_own(values, rows, tmp_path, threads):
    """On two threads a count of pieces that members shared would skip and double steps."""
    recipes = members(values | {"batch_tokens": 100, "accumulate": 4, "tokens": 1000}, {"lr": [1e-3, 2e-3]})
    torch.set_num_threads(threads)
    trained = train_all(resolve_recipes(recipes), rows)
    torch.set_num_threads(1)
    for directory, recipe in zip(trained, recipes, strict=True):
        assert_equal_runs(alone(recipe, tmp_path, rows), directory)


def test_a_batch_is_read_once_for_all_that_train_on_it(values, monkeypatch):
    rows_at, seen = StoreStream.rows_at, []

    def counted(self, places):
        seen.append((self.hooks_in, self.seed, int(places[0])))
        return rows_at(self, places)

    run_harvest(resolve_recipe(check_recipe(values, "recipe")))
    monkeypatch.setattr(StoreStream, "rows_at", counted)
    changes = {"dictionary.encoder.k": [2, 3], "lr": [1e-3, 2e-3], "seed": [0, 1]}
    train_all(resolve_recipes(members(values | {"tokens": 505}, changes)))
    assert len(set(seen)) == len(seen)
    assert {seed for _, seed, _ in seen} == {0, 1}


def test_an_iterator_serves_all_members(values, rows, tmp_path):
    recipes = members(values, [{"lr": 1e-3}, {"lr": 2e-3, "seed": 1}])
    endless = [*rows, *rows, *rows]
    for directory, recipe in zip(train_all(resolve_recipes(recipes), iter(endless)), recipes, strict=True):
        assert_equal_runs(alone(recipe, tmp_path, iter(endless)), directory)
    short = members(values | {"out_dir": values["out_dir"] + "2"}, {"lr": [1e-3, 2e-3], "tokens": [303, 3030]})
    with pytest.raises(ValueError, match="the iterator ended after 1414 of 3030 tokens"):
        train_all(resolve_recipes(short), iter(rows))
    other = members(values | {"out_dir": values["out_dir"] + "3"}, {"batch_tokens": [101, 60]})
    with pytest.raises(ValueError, match=r"a list for recipes of several batch_tokens \(101, 60\), got an iterator"):
        train_all(resolve_recipes(other), iter(rows))


# Stops, kills and failures.


@pytest.mark.parametrize("stops", [(1, 7, 5), (13,)], ids=str)
def test_a_grid_stopped_and_continued_is_bit_equal(values, rows, tmp_path, stopped_after, stops):
    recipes = members(values, FAMILIES)
    for stop in stops:
        with stopped_after(stop):
            train_all(resolve_recipes(recipes), rows)
    # One round is one step of every member.
    assert {counters(recipe.out_dir)["step"] for recipe in recipes} == {min(sum(stops), 15), sum(stops)} - {15}
    for directory, recipe in zip(train_all(resolve_recipes(recipes), rows), recipes, strict=True):
        assert_equal_runs(alone(recipe, tmp_path, rows), directory)


class Killed(BaseException):
    """Stands in for the end of the process."""


@pytest.mark.parametrize("live", [False, True])
def test_members_that_stand_at_different_steps_meet_again(values, tmp_path, monkeypatch, stopped_after, live):
    """Killed between the saves of two members, twice; the ones ahead wait, also when a stop comes in between."""
    if live:
        values["harvest"] |= {"store": None, "tokens": None, "live_buffer_tokens": 900}
    values |= {"tokens": 1515, "save_every": 5}
    recipes = members(values, {"lr": [1e-3, 2e-3], "seed": [0, 1]})
    save = Checkpoints.save
    for left in (3, 3):
        calls = []

        def dying(self, *arguments, left=left, calls=calls):
            calls.append(self.directory)
            if len(calls) > left:
                raise Killed
            save(self, *arguments)

        monkeypatch.setattr(Checkpoints, "save", dying)
        with pytest.raises(Killed):
            train_all(resolve_recipes(recipes))
        monkeypatch.undo()
    steps = [counters(r.out_dir)["step"] for r in recipes if (Path(r.out_dir) / "state.safetensors").exists()]
    assert len(set(steps)) > 1
    with stopped_after(2):
        train_all(resolve_recipes(recipes))
    for directory, recipe in zip(train_all(resolve_recipes(recipes)), recipes, strict=True):
        assert_equal_runs(alone(recipe, tmp_path), directory)


def test_a_member_goes_on_alone_by_its_own_recipe(values, rows, tmp_path, stopped_after):
    recipes = members(values, FAMILIES[:3])
    with stopped_after(11):
        train_all(resolve_recipes(recipes), rows)
    own = load_recipe(Path(recipes[2].out_dir) / "recipe.yaml")
    assert own == recipes[2]
    assert_equal_runs(alone(own, tmp_path, rows), train_recipe(resolve_recipe(own), rows))
    # And is then waited for by nobody.
    for directory, recipe in zip(train_all(resolve_recipes(recipes), rows), recipes, strict=True):
        assert_equal_runs(alone(recipe, tmp_path, rows), directory)


def test_a_grid_that_has_grown_trains_what_is_new(values, rows, tmp_path):
    first = members(values, {"lr": [1e-3, 2e-3]})
    train_all(resolve_recipes(first), rows)
    before = [(Path(recipe.out_dir) / "state.safetensors").read_bytes() for recipe in first]
    recipes = members(values, {"lr": [1e-3, 2e-3, 3e-3]})
    assert_equal_runs(alone(recipes[2], tmp_path, rows), train_all(resolve_recipes(recipes), rows)[2])
    assert [(Path(recipe.out_dir) / "state.safetensors").read_bytes() for recipe in first] == before


def test_one_loss_that_is_not_finite_is_named_and_the_others_are_kept(values, rows, tmp_path, monkeypatch):
    forward = Objective.forward

    def exploding(self, batch, usage):
        loss, terms = forward(self, batch, usage)
        if self.dictionary.n_latents == 71 and self.seen >= 23:
            loss = loss * float("inf")
            terms.named["loss"] = loss.detach()
        self.seen += 1
        return loss, terms

    monkeypatch.setattr(Objective, "seen", 0, raising=False)
    monkeypatch.setattr(Objective, "forward", exploding)
    recipes = members(values, {"dictionary.n_latents": [67, 71, 73]})
    with pytest.raises(ValueError, match=r"n_latents=71: loss: not finite between steps 20 and 25.*step 20 is kept"):
        train_all(resolve_recipes(recipes), rows)
    monkeypatch.undo()
    assert [counters(recipe.out_dir)["step"] for recipe in recipes] == [25, 20, 25]
    others = members(values, {"dictionary.n_latents": [67, 73]})
    for directory, recipe in zip(train_all(resolve_recipes(others), rows), others, strict=True):
        assert_equal_runs(alone(recipe, tmp_path, rows), directory)
    # Its own state is good: without what broke it, it goes on.
    assert_equal_runs(alone(recipes[1], tmp_path, rows), train_all(resolve_recipes(recipes), rows)[1])


def test_a_finished_member_stays_calibrated_while_others_go_on(values, rows, stopped_after):
    recipes = members(values, [FAMILIES[2] | {"tokens": 1010}, {"lr": 2e-3}])
    train_all(resolve_recipes(recipes[:1]), rows)
    calibrated = (Path(recipes[0].out_dir) / "dictionary.safetensors").read_bytes()
    with stopped_after(4):
        train_all(resolve_recipes(recipes), rows)
    assert (Path(recipes[0].out_dir) / "dictionary.safetensors").read_bytes() == calibrated
    train_all(resolve_recipes(recipes), rows)
    assert (Path(recipes[0].out_dir) / "dictionary.safetensors").read_bytes() == calibrated


def test_a_grid_is_not_put_into_a_run_nor_beside_strange_files(values, rows):
    train_recipe(resolve_recipe(check_recipe(values, "recipe")), rows)
    with pytest.raises(ValueError, match="expected a directory for a grid"):
        train_all(resolve_recipes(members(values, {"lr": [1e-3, 2e-3]})), rows)
    shutil.rmtree(values["out_dir"])
    train_all(resolve_recipes(members(values, {"lr": [1e-3, 2e-3]})), rows)
    with pytest.raises(ValueError, match="expected an empty directory or a run"):
        train_recipe(resolve_recipe(check_recipe(values, "recipe")), rows)
    with pytest.raises(ValueError, match=r"lr=0\.001: expected a run of this recipe, got another run"):
        train_all(resolve_recipes(members(values | {"seed": 5}, {"lr": [1e-3, 2e-3]})), rows)


# Members and their names.


def names(values, grid):
    return check_grid(values | {"grid": grid}, "recipe").names


def test_combinations_are_named_by_what_they_change(values):
    assert names(values, {"dictionary.n_latents": [64, 128], "dictionary.encoder.k": [2, 3], "lr": [1e-5]}) == [
        "n_latents=64,k=2,lr=1e-05",
        "n_latents=64,k=3,lr=1e-05",
        "n_latents=128,k=2,lr=1e-05",
        "n_latents=128,k=3,lr=1e-05",
    ]
    # Nested as sections are, and so reached by overrides.
    assert names(values, {"dictionary": {"n_latents": [64], "encoder": {"k": [2, 3]}}}) == [
        "n_latents=64,k=2",
        "n_latents=64,k=3",
    ]
    assert names(values, {"text.seed": [1], "seed": [0, 1]}) == ["text.seed=1,seed=0", "text.seed=1,seed=1"]
    assert names(values, {"dictionary.hook": values["harvest"]["hooks"]}) == [
        "hook=transformer.h.1-out",
        "hook=transformer.h.2-out",
    ]
    assert names(values, {"grad_clip": [None, 0.5], "aux_zipf_absolute": [True]}) == [
        "grad_clip=null,aux_zipf_absolute=true",
        "grad_clip=0.5,aux_zipf_absolute=true",
    ]


def test_an_encoder_is_replaced_whole_and_later_keys_change_it(values):
    encoders = [{"name": "topk", "k": 3}, {"name": "mutual_choice", "k": 3}]
    grid = {"dictionary.encoder": encoders, "dictionary.encoder.k": [4, 5]}
    recipes = members(values, grid)
    assert names(values, grid)[1] == "encoder=topk-k3,k=5"
    assert [recipe.dictionary.encoder for recipe in recipes] == [
        {"name": name, "k": k} for name in ("topk", "mutual_choice") for k in (4, 5)
    ]


def test_members_of_a_list_may_be_given_names(values):
    recipes = members(values, [{"name": "base"}, {"lr": 2e-3}, {"name": "b", "betas": [0.5, 0.9]}])
    assert [Path(recipe.out_dir).name for recipe in recipes] == ["base", "lr=0.002", "b"]
    assert recipes[0] == check_recipe(values | {"out_dir": values["out_dir"] + "/base"}, "recipe")
    assert recipes[2].betas == (0.5, 0.9)


def test_a_member_s_wandb_run_bears_its_name(values):
    recipes = members(values | {"wandb": {"project": "p", "name": "sweep"}}, {"lr": [1e-3]})
    assert recipes[0].wandb.name == "sweep lr=0.001"


def test_a_recipe_without_a_grid_is_its_own_only_member(values, write_recipe):
    grid = load_grid(write_recipe(values))
    assert grid.recipes == (check_recipe(values, "recipe"),)
    assert (grid.out_dir, grid.names) == (values["out_dir"], ["run"])


# Mistakes.


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (3, "recipe: grid: expected a mapping of keys to lists of values, or a list of mappings of keys to values, got 3."),
        ({}, "recipe: grid: expected a mapping"),
        ([], "recipe: grid: expected a mapping"),
        ({"dictionary": {}}, "recipe: grid.: expected a list of values, got {}."),
        ({"lr": 1e-3}, "recipe: grid.lr: expected a list of values, got 0.001. Write lr: [...], or leave it out of the grid."),
        ({"lr": []}, "recipe: grid.lr: expected a list of values, got []."),
        ({"seed": [0, 1, 0]}, "recipe: grid.seed: expected values that differ, got 0 twice."),
        ({"out_dir": ["a", "b"]}, "recipe: grid.out_dir: out_dir: every member's is out_dir/NAME. Set out_dir outside"),
        ({"name": ["a", "b"]}, "recipe: grid.name: name: combinations are named by what they change."),
        ([{"base": "x.yaml"}], "recipe: grid.0: base: expected a recipe's key, got one that stands above recipes."),
        ([{"lr": 1e-3}, 7], "recipe: grid.1: expected a mapping of the keys this member changes, got 7."),
        ([{"lr": 1e-3}, {3: 7}], "recipe: grid.1: expected a mapping of the keys this member changes, got {3: 7}."),
        ([{"name": "a/b", "lr": 1e-3}], "recipe: grid.0.name: expected letters, digits and any of - _ . , = +, got 'a/b'."),
        ([{"name": "..", "lr": 1e-3}], "recipe: grid.0.name: expected letters, digits"),
        ([{"name": 3, "lr": 1e-3}], "recipe: grid.0.name: expected letters, digits and any of - _ . , = +, got 3."),
        ([{"lr": 1e-3}, {"lr": 1e-3}], "recipe: grid: expected members that differ, got lr=0.001 twice."),
        ([{"schedules": {"k": [[0.01 * i, 5] for i in range(30)]}}], "too long for a directory. Write the grid as a list"),
        ({"lrr": [1, 2]}, "recipe: lrr: unknown key."),
        ([{"lr": 1e-3}, {"lrr": 1}], "recipe: grid lrr=1: lrr: unknown key."),
        ({"tokens.x": [1]}, "recipe: tokens.x: expected tokens to be a section, got 3030."),
        (
            {"text.bos": ["none", "context"]},
            "recipe: grid: text.bos: expected one value for all members, which share what they read and run on, got 'none' in "
            "bos=none and 'context' in bos=context. Make a recipe of each.",
        ),
        ({"model.dtype": ["float32", "bfloat16"]}, "recipe: grid: model.dtype: expected one value for all members"),
        ({"precision": ["float32", "bf16"]}, "recipe: grid: precision: expected one value for all members"),
    ],
)
def test_a_wrong_grid_is_told_with_its_key(values, grid, message):
    with pytest.raises(ValueError, match="recipe: ") as caught:
        check_grid(values | {"grid": grid}, "recipe")
    assert message in str(caught.value)


def test_all_mistakes_of_all_members_are_told_at_once_common_ones_once(values):
    values["lrr"] = 1
    with pytest.raises(ValueError, match="recipe") as caught:
        check_grid(values | {"grid": {"dictionary.encoder.k": [5, 68, 0], "lr": [1e-3, -1.0]}}, "recipe")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("recipe: lrr: unknown key.")
    assert len(lines) == 6
    assert "recipe: grid k=0,lr=0.001: dictionary.encoder.k: expected at least 1, got 0." in lines[4]
    assert "recipe: grid k=0,lr=-1.0: lr: expected greater than 0, got -1.0." in lines


def test_one_run_is_asked_for_where_one_is_needed(values, write_recipe):
    with pytest.raises(ValueError, match=r"grid: expected a recipe of one run here, got several"):
        load_recipe(write_recipe(values | {"grid": {"lr": [1e-3]}}))


# Before and around a run.


def test_the_plan_lists_members_and_adds_up_their_memory(values):
    grid = check_grid(values | {"grid": {"dictionary.n_latents": [67, 670], "seed": [0, 1]}}, "recipe")
    resolved = resolve_recipes(grid.recipes)
    plans = preflight_all(resolved)
    shown = dict(grid_lines(grid, resolved, plans))
    assert shown["n_latents=670,seed=1"] == "128 -> 670, topk, k 5, 172,318 parameters"
    assert shown["members"] == "4 on 2 streams of batches"
    assert shown["training"].startswith("3,030 tokens in 30 steps of 101")
    together = sum(plan.weights_bytes for plan in plans) + plans[3].working_bytes + 2 * plans[0].stream_bytes
    assert shown["memory"] == f"about {together / 1e6:.1f} MB for training, beside the model's own"
    assert plans[0] == preflight(resolved[0])
    assert not Path(values["out_dir"]).exists()


def test_preflight_names_the_members_that_cannot_work(values, tmp_path):
    values["harvest"] |= {"tokens": 200, "store": str(tmp_path / "none")}
    with pytest.raises(ValueError, match=r"^grid batch_tokens=500: batch_tokens: expected at most the 190 training tokens"):
        preflight_all(resolve_recipes(members(values, {"batch_tokens": [100, 500]})))
    with pytest.raises(ValueError, match=r"^batch_tokens: expected at most the 190 training tokens.*$"):
        preflight_all(resolve_recipes(members(values, {"batch_tokens": [500], "lr": [1e-3, 2e-3]})))


def test_the_facade_returns_the_directory_above_the_members(values, rows, write_recipe):
    path = write_recipe(values | {"grid": {"seed": [0, 1]}})
    directory = sparsary.train(path, rows, tokens=303, **{"grid.dictionary.n_latents": [31, 37]})
    assert str(directory) == values["out_dir"]
    assert sorted(path.name for path in directory.iterdir()) == [
        f"seed={seed},n_latents={n}" for seed in (0, 1) for n in (31, 37)
    ]
    assert load_dictionary(directory / "seed=1,n_latents=37").n_latents == 37


def test_the_bench_tells_what_all_cost_beside_one():
    found = bench_grid(members=2, rounds=1, shapes={"x": GridShape(17, 31, 3, 50, 2)})
    assert found["members"] == 2
    row = found["shapes"]["x"]
    assert row["ratio"] == row["seconds_all"] / row["seconds_one"] > 0
    assert (row["d"], row["n_latents"], row["k"], row["batch_tokens"]) == (17, 31, 3, 50)
