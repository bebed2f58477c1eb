"""A run over a complete store resumes without its language model, which takes most of the time of a start."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsary.sae.checkpoint import build_dictionary
from sparsary.training import resolve_hooks
from sparsary.training.activations.manifest import read_manifest, write_manifest
from sparsary.training.optim import DictionaryAdam
from sparsary.training.phases import Phases
from sparsary.training.preflight import preflight
from sparsary.training.recipe import check_recipe
from sparsary.training.resolve_hooks import dictionary_arguments, resolve_recipe
from sparsary.training.run import run_harvest, train

RESUMED = """
import json, sys
from sparsary.training.run import train
from sparsary.training.loop import step
import sparsary.training.loop as loop
def first(*arguments):
    step(*arguments)
    print(json.dumps([name for name in sys.argv[2:] if name in sys.modules]), flush=True)
    raise KeyboardInterrupt
loop.step = first
try:
    train(json.loads(sys.argv[1]))
except KeyboardInterrupt:
    pass
"""


@pytest.fixture
def harvested(recipe_values):
    """The small recipe with its store."""
    run_harvest(resolve_recipe(check_recipe(recipe_values, "recipe")))
    return recipe_values


def built(values, monkeypatch):
    """Return how often a plan of the recipe builds the model."""
    calls, real = [], resolve_hooks.skeleton
    monkeypatch.setattr(resolve_hooks, "skeleton", lambda section: calls.append(section) or real(section))
    plan = preflight(resolve_recipe(check_recipe(values, "recipe")))
    monkeypatch.undo()
    assert plan.widths == {"transformer.h.2:out": 128}
    assert not plan.assumed
    return len(calls)


def test_only_a_complete_store_of_known_content_stands_for_the_model(harvested, monkeypatch):
    store = Path(harvested["harvest"]["store"])
    manifest = read_manifest(store)
    assert built(harvested, monkeypatch) == 0
    for changed in ({"complete": False}, {"content": None}):
        write_manifest(store, manifest | changed)
        assert built(harvested, monkeypatch) == 1
    write_manifest(store, manifest)
    with pytest.raises(ValueError, match=r"there is no module|no such hook|transformer\.h\.9"):
        preflight(
            resolve_recipe(
                check_recipe(
                    harvested
                    | {
                        "harvest": harvested["harvest"] | {"hooks": ["transformer.h.9:out"]},
                        "dictionary": harvested["dictionary"] | {"hook": "transformer.h.9:out"},
                    },
                    "recipe",
                )
            )
        )


def test_a_resumed_run_loads_neither_transformers_nor_torchs_compiler(harvested, monkeypatch):
    train(harvested, tokens=1010)
    heavy = ["transformers", "torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy"]
    command = [sys.executable, "-c", RESUMED, json.dumps(harvested), *heavy, "torch"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(found.stdout.splitlines()[-1]) == ["torch"]


def test_the_step_is_that_of_torchs_adam():
    """Its methods are called without their decorators."""
    values = {"dictionary": {"n_latents": 13, "encoder": {"name": "relu", "target_l0": 3}, "hook": "a:out"}, "tokens": 100_000}
    recipe = check_recipe(values | {"out_dir": "never"}, "recipe")
    results = []
    for plain in (False, True):
        torch.manual_seed(0)
        dictionary = build_dictionary(dictionary_arguments(recipe, {"a:out": 7}))
        optimizer = DictionaryAdam(dictionary, Phases(dictionary, recipe), recipe)
        if plain:
            group = optimizer.param_groups[0]
            optimizer = torch.optim.Adam(group["params"], lr=group["lr"], betas=group["betas"], eps=group["eps"], fused=True)
        for number in range(4):
            optimizer.zero_grad()
            dictionary(torch.randn(5, 7, generator=torch.Generator().manual_seed(number))).pow(2).sum().backward()
            (optimizer.step if plain else optimizer.plain_step)()
            optimizer.load_state_dict(optimizer.state_dict())
        results.append([*dictionary.parameters(), *(value for state in optimizer.state.values() for value in state.values())])
    assert all(map(torch.equal, *results))
