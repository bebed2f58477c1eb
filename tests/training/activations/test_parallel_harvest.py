"""Harvest by several ranks: the store of one, and what is left of it when a rank dies."""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from sparsary.training.activations.harvest import harvest_activations, require_shared_store
from sparsary.training.activations.model import load_model
from sparsary.training.activations.shards import ActivationStore
from sparsary.training.activations.store_writer import Progress
from sparsary.training.bad_rows import LEAST_TOKENS
from sparsary.training.embedded import corpus
from sparsary.training.recipe import HarvestSection, ModelSection, TextSection
from sparsary.training.text import contexts

HOOK, SECOND = "transformer.h.2:out", "transformer.h.2.mlp:in"
TEXT = TextSection(context_length=32)


def is_text(token_ids):
    """False for the short input that a model's widths are found by."""
    return token_ids.shape[1] == TEXT.context_length


def section(directory, **options):
    defaults = {
        "hooks": (HOOK,),
        "tokens": 2500,
        "store": str(directory),
        "shard_tokens": 400,
        "batch_contexts": 8,
        "exclude_leading": 2,
        "heldout": 0.2,
    }
    return HarvestSection(**(defaults | options))


@pytest.fixture
def on_ranks(load_beside):
    return load_beside("thread_ranks").on_ranks


@pytest.fixture
def harvested(on_ranks, models):
    """Return a function that harvests by a number of ranks and returns the manifest, which all of them return."""

    def harvest(size, settings, text=TEXT):
        stores = on_ranks(size, lambda ranks: harvest_activations(models[ranks.rank], text, settings, ranks))
        for store in stores[1:]:
            assert store.manifest == stores[0].manifest
        assert ActivationStore.open(settings.store).manifest == stores[0].manifest
        assert stores[0].problems() == []
        files = {path.name for path in stores[0].directory.iterdir()} - {".lock", "manifest.json"}
        assert files == {shard["name"] for shard in stores[0].manifest["shards"]}
        return stores[0].manifest

    return harvest


@pytest.fixture(scope="module")
def models():
    """One model per rank: hooks of two threads on one model would mix."""
    return [load_model(ModelSection(device="cpu")) for _ in range(3)]


@pytest.fixture
def calls(models, monkeypatch):
    """Number of batches that each model has run."""
    counts = [0] * len(models)

    def counted(number, run):
        def running(token_ids, hooks):
            counts[number] += is_text(token_ids)
            return run(token_ids, hooks)

        return running

    for number, model in enumerate(models):
        monkeypatch.setattr(model, "activations", counted(number, model.activations))
    return counts


@pytest.mark.parametrize("options", [{}, {"hooks": (HOOK, SECOND), "gradients": True, "dtype": "int8"}])
def test_the_store_does_not_depend_on_the_number_of_ranks(harvested, tmp_path, options):
    """The manifest has the checksum of every shard, and the moments to the last bit."""
    whole = harvested(1, section(tmp_path / "1", **options))
    assert len({shard["unit"] for shard in whole["shards"]}) == 6
    for size in (2, 3):
        assert harvested(size, section(tmp_path / str(size), **options)) == whole


def test_every_rank_runs_the_model_on_its_own_part(harvested, tmp_path, calls):
    harvested(1, section(tmp_path / "1"))
    alone = calls[0]
    harvested(3, section(tmp_path / "3"))
    several = [calls[0] - alone, *calls[1:]]
    assert sum(several) == alone
    assert min(several) >= 2


@pytest.fixture
def spoil(models, monkeypatch):
    """Makes the models overflow wherever they read a token."""

    def spoiled(run, token):
        def poisoned(token_ids, hooks):
            seen = run(token_ids, hooks)
            seen[HOOK][..., 3].masked_fill_((token_ids == token) & is_text(token_ids), float("nan"))
            return seen

        return poisoned

    def spoiling(token):
        for model in models:
            monkeypatch.setattr(model, "activations", spoiled(model.activations, token))

    return spoiling


def rare_token(model):
    some = itertools.islice(contexts(TEXT, model.tokenizer), 90)
    counts = np.bincount(np.concatenate([context.token_ids for context in some]))
    return int(np.flatnonzero((counts > 3) & (counts < 12))[0])


def test_tokens_that_cannot_be_stored_are_made_up_for_alike(harvested, models, tmp_path, spoil):
    spoil(rare_token(models[0]))
    whole = harvested(1, section(tmp_path / "1"))
    left_out = whole["skipped"]["tokens whose activations are not finite"]
    assert left_out == sum(whole["left_out"].values()) > 0
    assert sum(shard["tokens"] for shard in whole["shards"]) >= 2500
    for size in (2, 3):
        assert harvested(size, section(tmp_path / str(size))) == whole
    # However often it is interrupted: the manifest after each unit is the place where another harvest begins.
    parts = section(tmp_path / "parts", tokens=900)
    harvested(2, parts)
    assert Progress.of(json.loads((tmp_path / "parts/manifest.json").read_text()), 2500).target >= 2500


def test_too_many_of_them_over_all_ranks_stop_the_harvest(harvested, models, tmp_path, spoil):
    """No rank alone has so many."""
    spoil(models[0].tokenizer.convert_tokens_to_ids("."))
    allowed = harvested(1, section(tmp_path / "allowed", max_bad_share=0.9))
    share = 0.8 * sum(allowed["left_out"].values()) / LEAST_TOKENS
    for size in (1, 3):
        with pytest.raises(ValueError, match=r"rows are bad, above harvest\.max_bad_share = .*\. The model overflows"):
            harvested(size, section(tmp_path / str(size), max_bad_share=share))


class DeadError(Exception):
    """Stands for a rank that is killed."""


def die_after(model, batches, monkeypatch):
    run, left = model.activations, itertools.count(batches, -1)

    def dying(token_ids, hooks):
        if is_text(token_ids) and next(left) == 0:
            raise DeadError
        return run(token_ids, hooks)

    monkeypatch.setattr(model, "activations", dying)


@pytest.mark.parametrize(("size", "then", "dead"), [(2, 1, 1), (2, 3, 0), (3, 2, 1)])
def test_only_the_part_of_a_dead_rank_is_done_again(harvested, models, tmp_path, monkeypatch, calls, size, then, dead):
    whole = harvested(1, section(tmp_path / "whole"))
    every, calls[:] = calls[0], [0, 0, 0]
    settings = section(tmp_path / "parts")
    with monkeypatch.context() as patch:
        # In the middle of the second unit of the rank.
        die_after(models[dead], 3, patch)
        with pytest.raises(DeadError):
            harvested(size, settings)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("*.safetensors")}
    records = [json.loads(path.read_text()) for path in (tmp_path / "parts").glob("unit-*.json")]
    complete = {shard["name"] for shard in ActivationStore.open(tmp_path / "parts").manifest["shards"]}
    complete |= {shard["name"] for record in records for shard in record["shards"]}
    assert len(complete) >= 4
    done, calls[:] = sum(calls), [0, 0, 0]
    assert harvested(then, settings) == whole
    assert {name for name in kept if (tmp_path / "parts" / name).stat().st_mtime_ns == kept[name]} == complete
    assert sum(calls) < every
    # At most the unit in which the rank died and those that others were in is lost.
    assert sum(calls) + done <= every + 2 * size


def test_a_unit_behind_a_missing_one_is_kept(harvested, models, tmp_path, monkeypatch, calls):
    """The first rank dies in its first unit: nothing is in the manifest yet, but another rank's unit is complete."""
    whole = harvested(1, section(tmp_path / "whole"))
    every, calls[:] = calls[0], [0, 0, 0]
    settings = section(tmp_path / "parts")
    run = models[0].activations

    def dying(token_ids, hooks):
        if not is_text(token_ids):
            return run(token_ids, hooks)
        deadline = time.monotonic() + 600
        while not (tmp_path / "parts/unit-00001.json").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        raise DeadError

    with monkeypatch.context() as patch:
        patch.setattr(models[0], "activations", dying)
        with pytest.raises(DeadError):
            harvested(2, settings)
    assert ActivationStore.open(tmp_path / "parts").manifest["shards"] == []
    shutil.copytree(tmp_path / "parts", tmp_path / "other")
    calls[:] = [0, 0, 0]
    assert models[0].activations is run
    assert harvested(1, settings) == whole
    assert calls[0] == every - 2
    # Records of what another recipe asked for are removed.
    other = {"hooks": (SECOND,), "tokens": 900}
    expected = harvested(1, section(tmp_path / "fresh", **other))
    assert harvested(2, section(tmp_path / "other", **other)) == expected


def test_a_damaged_record_is_ignored(harvested, tmp_path):
    whole = harvested(1, section(tmp_path / "whole"))
    harvested(1, section(tmp_path / "s", tokens=300))
    for name in ("unit-00001.json", "unit-00002.json", "unit-x.json"):
        (tmp_path / "s" / name).write_text('{"unit": 1')
    assert harvested(2, section(tmp_path / "s")) == whole


def test_more_tokens_are_added_by_any_number_of_ranks(harvested, tmp_path):
    for sizes in ((1, 1), (2, 3), (3, 2)):
        directory = tmp_path / "-".join(map(str, sizes))
        for size, tokens in zip(sizes, (700, 2000), strict=True):
            found = harvested(size, section(directory, tokens=tokens))
        if sizes == (1, 1):
            expected = found
        assert found == expected


@pytest.mark.parametrize("packing", ["pack", "separate"])
@pytest.mark.parametrize("lines", [90, 3])
def test_a_text_that_ends_early_ends_alike(harvested, tmp_path, packing, lines):
    """With long documents, that go over several units, rows that cannot be read, and with fewer units than ranks."""
    documents = [corpus.embedded_document(1, i).text * (9 if i % 40 == 1 else 1) for i in range(lines)]
    rows = [json.dumps({"text": text}) for text in documents]
    (tmp_path / "t.jsonl").write_text("\n".join([*rows[:2], '{"text": null}', *rows[2:40], "no json", *rows[40:]]))
    text = TextSection(source="files", files=(str(tmp_path / "t.jsonl"),), context_length=32, packing=packing)
    options = {"tokens": 99_999, "heldout": 0.0}
    whole = harvested(1, section(tmp_path / "1", **options), text)
    assert whole["content"]["text"]["documents"] == lines
    assert whole["skipped"]["rows with null in place of text"] == 1
    for size in (2, 3):
        assert harvested(size, section(tmp_path / str(size), **options), text) == whole


def test_text_without_a_token_is_refused_by_all(harvested, tmp_path):
    (tmp_path / "t.txt").write_text("the war")
    text = TextSection(source="files", files=(str(tmp_path / "t.txt"),), context_length=32)
    with pytest.raises(ValueError, match="expected tokens to store, got none"):
        harvested(2, section(tmp_path / "s"), text)


def test_a_rank_without_the_folder_is_named(harvested, on_ranks, tmp_path, monkeypatch):
    monkeypatch.setattr("sparsary.training.activations.harvest.SHARED_SECONDS", 0.0)
    settings = section(tmp_path / "0", tokens=300)
    harvested(1, settings)
    on_ranks(2, lambda ranks: require_shared_store(ranks, tmp_path / "0"))
    with pytest.raises(ValueError, match=r"harvest\.store: .*rank 1, 2 does not see rank 0's manifest\.json"):
        on_ranks(3, lambda ranks: require_shared_store(ranks, tmp_path / ("0" if ranks.rank == 0 else "1")))


def test_a_unit_that_never_comes_to_be_seen_is_named(on_ranks, models, tmp_path, monkeypatch):
    monkeypatch.setattr("sparsary.training.activations.store_writer.SHARED_SECONDS", 0.5)
    shutil.copytree(ActivationStore.open(_empty(models, tmp_path)).directory, tmp_path / "copy")

    def run(ranks):
        directory = tmp_path / ("s" if ranks.rank == 0 else "copy")
        return harvest_activations(models[ranks.rank], TEXT, section(directory), ranks)

    with pytest.raises(ValueError, match=r"expected unit-00001\.json of rank 1 there, found none"):
        on_ranks(2, run)


def _empty(models, tmp_path):
    """A store with a manifest that two folders can have alike."""
    harvest_activations(models[0], TEXT, section(tmp_path / "s", tokens=300))
    return tmp_path / "s"


def test_ranks_verify_a_store_together(harvested, on_ranks, tmp_path):
    harvested(1, section(tmp_path / "s"))
    store = ActivationStore.open(tmp_path / "s")
    on_ranks(2, store.verify)
    for name in ("train-00000.safetensors", "heldout-00000.safetensors", "train-00002.safetensors"):
        path = store.directory / name
        path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"heldout-00000.*\n.*train-00000.*\n.*train-00002"):
        on_ranks(2, store.verify)
    assert len(store.problems(0, 2)) + len(store.problems(1, 2)) == 3


def start(recipe, tokens, size):
    """Start the processes of a harvest."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "sparsary", "harvest", str(recipe), f"harvest.tokens={tokens}"]
    return [
        subprocess.Popen(command, env=common | {"RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(size)
    ]


def test_processes_harvest_what_one_does_and_one_may_be_killed(models, tmp_path):
    settings = section(tmp_path / "s", tokens=16_000, shard_tokens=2000)
    values = {
        "model": {"id": "embedded", "device": "cpu"},
        "text": {"context_length": 32},
        "dictionary": {"hook": HOOK, "n_latents": 256, "encoder": {"name": "topk", "k": 8}},
        "harvest": {key: getattr(settings, key) for key in ("store", "shard_tokens", "batch_contexts", "exclude_leading")},
        "out_dir": str(tmp_path / "out"),
        "tokens": 4000,
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(values | {"harvest": values["harvest"] | {"heldout": 0.2}}))
    several = start(recipe, settings.tokens, 2)
    try:
        while not list((tmp_path / "s").glob("*-00001.safetensors")):
            assert several[0].poll() is None, several[0].communicate()[1]
            time.sleep(0.02)
        several[1].send_signal(signal.SIGKILL)
        told = several[0].communicate(timeout=600)[1]
        assert several[0].returncode == 1
        assert "rank 1 of 2 ended" in told
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").glob("*-00000.safetensors")}
        several += start(recipe, settings.tokens, 2)
        for process in several[2:]:
            errors = process.communicate(timeout=600)[1]
            assert process.returncode == 0, errors
    finally:
        for process in several:
            process.kill()
            process.communicate()
    assert before == {path: path.stat().st_mtime_ns for path in before}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = harvest_activations(models[0], TEXT, settings.model_copy(update={"store": str(tmp_path / "alone")}))
    finally:
        torch.set_num_threads(threads)
    store = ActivationStore.open(tmp_path / "s")
    assert store.manifest["shards"] == alone.manifest["shards"]
    assert store.manifest["hooks"] == alone.manifest["hooks"]
    assert store.problems() == []
