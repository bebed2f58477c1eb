"""Stores on fsspec URLs: uploaded, downloaded, verified, refused, and removed from the cache."""

import json
import uuid

import fsspec
import pytest
import torch

from sparsary.training.activations.remote_store import MARKER_FILE, FolderPlace, RemotePlace, store_place
from sparsary.training.activations.shards import MANIFEST_FILE, RowReader
from sparsary.training.preflight import preflight
from sparsary.training.recipe import HarvestSection, check_recipe
from sparsary.training.resolve_hooks import resolve_recipe
from sparsary.training.run import run_harvest

HOOK = "transformer.h.0:out"


@pytest.fixture(autouse=True)
def _machine(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSARY_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    name = uuid.uuid4().hex
    return f"memory://{name}/store" if request.param == "memory" else f"file://{tmp_path}/there/{name}"


def member(tmp_path, url, **harvest):
    values = {
        "model": {"device": "cpu"},
        "text": {"context_length": 32},
        "harvest": {"store": url, "tokens": 3000, "shard_tokens": 1000, "batch_contexts": 8} | harvest,
        "dictionary": {"hook": HOOK, "n_latents": 32, "encoder": {"name": "topk", "k": 4}},
        "tokens": 2048,
        "batch_tokens": 512,
        "out_dir": str(tmp_path / "run"),
    }
    return resolve_recipe(check_recipe(values, "recipe"))


def rows(store):
    reader = RowReader(store, "train", f"x:{HOOK}")
    found = reader.gather(torch.arange(len(reader)).numpy())
    reader.close()
    return found


def there(url):
    fs, root = fsspec.core.url_to_fs(url)
    return fs, root


def on_another_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSARY_CACHE", str(tmp_path / uuid.uuid4().hex))


def test_a_store_on_a_url_is_the_store_of_a_folder_on_every_machine(url, tmp_path, monkeypatch):
    local = run_harvest(member(tmp_path, str(tmp_path / "local")))
    written = run_harvest(member(tmp_path, url))
    fs, root = there(url)
    names = {path.rpartition("/")[2] for path in fs.ls(root, detail=False)}
    assert names == {MANIFEST_FILE, *(shard["name"] for shard in local.manifest["shards"])}
    on_another_machine(tmp_path, monkeypatch)

    def refused(*_):
        raise AssertionError("a complete store is not harvested again")

    monkeypatch.setattr("sparsary.training.run.harvest_activations", refused)
    read = run_harvest(member(tmp_path, url))
    assert read.directory != written.directory
    assert (read.address, written.address, local.address) == (url, url, str(tmp_path / "local"))
    read.verify()
    assert read.manifest["shards"] == local.manifest["shards"]
    torch.testing.assert_close(rows(read), rows(local), rtol=0, atol=0)


def test_the_manifest_is_uploaded_after_the_shards_that_it_lists(url, tmp_path, monkeypatch):
    fs, root = there(url)
    own = type(fs).pipe_file

    def checked(self, path, value, **options):
        if path.endswith(MANIFEST_FILE):
            listed = json.loads(value)["shards"]
            assert all(fs.size(f"{root}/{shard['name']}") == shard["bytes"] for shard in listed)
            seen.append(len(listed))
        return own(self, path, value, **options)

    seen: list[int] = []
    monkeypatch.setattr(type(fs), "pipe_file", checked)
    run_harvest(member(tmp_path, url))
    assert seen[-1] >= 3


def test_an_interrupted_harvest_goes_on_from_another_machine(url, tmp_path, monkeypatch):
    run_harvest(member(tmp_path, url, tokens=2000))
    on_another_machine(tmp_path, monkeypatch)
    found = run_harvest(member(tmp_path, url))
    found.verify()
    assert found.tokens("train") + found.tokens("heldout") >= 3000
    fs, root = there(url)
    assert fs.cat_file(f"{root}/{MANIFEST_FILE}") == (found.directory / MANIFEST_FILE).read_bytes()


def test_a_damaged_shard_is_named(url, tmp_path, monkeypatch):
    store = run_harvest(member(tmp_path, url))
    fs, root = there(url)
    name = store.manifest["shards"][0]["name"]
    raw = bytearray(fs.cat_file(f"{root}/{name}"))
    raw[-1] ^= 1
    fs.pipe_file(f"{root}/{name}", bytes(raw))
    on_another_machine(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=rf"{name}: contents differ from the checksum"):
        run_harvest(member(tmp_path, url))
    place = store_place(HarvestSection(store=url))
    assert not (place.directory / name).exists()


def test_a_deleted_store_is_harvested_again(url, tmp_path):
    first = run_harvest(member(tmp_path, url))
    fs, root = there(url)
    fs.rm(root, recursive=True)
    again = run_harvest(member(tmp_path, url))
    assert again.manifest["shards"] == first.manifest["shards"]
    assert fs.exists(f"{root}/{MANIFEST_FILE}")


def test_another_machine_s_harvest_is_not_disturbed(url, tmp_path):
    fs, root = there(url)
    fs.makedirs(root, exist_ok=True)
    fs.pipe_file(f"{root}/{MARKER_FILE}", b"ann@elsewhere")
    with pytest.raises(ValueError, match=r"is in use by ann@elsewhere\. Wait for it; if it was killed, delete .*\.in-use"):
        run_harvest(member(tmp_path, url))
    assert fs.cat_file(f"{root}/{MARKER_FILE}") == b"ann@elsewhere"


def test_copies_used_longest_ago_are_removed_and_a_store_too_large_is_refused(tmp_path, monkeypatch):
    urls = [f"memory://{uuid.uuid4().hex}/store" for _ in range(2)]
    stores = [run_harvest(member(tmp_path, url)) for url in urls]
    size = sum(shard["bytes"] for shard in stores[1].manifest["shards"]) / 1e9
    run_harvest(member(tmp_path, urls[1], cache_gb=3 * size))
    assert stores[0].directory.exists()
    run_harvest(member(tmp_path, urls[1], cache_gb=1.5 * size))
    assert not stores[0].directory.exists()
    assert stores[1].directory.exists()
    with pytest.raises(ValueError, match=r"GB in .*, but harvest\.cache_gb is .*the cache must hold the whole store"):
        run_harvest(member(tmp_path, urls[1], cache_gb=0.5 * size))


def test_a_url_without_rights_or_package_is_one_message_in_the_dry_run(tmp_path, monkeypatch):
    class Denied(fsspec.get_filesystem_class("memory")):
        def pipe_file(self, path, value, **_):
            raise PermissionError(f"Forbidden: {path}")

    fsspec.register_implementation("denied", Denied, clobber=True)
    for url, message in (
        ("denied://bucket/store", r"harvest\.store: denied://bucket/store cannot be written \(PermissionError: Forbidden"),
        ("nothing://bucket/store", r"harvest\.store: nothing://bucket/store .*Protocol not known"),
        ("s3://bucket/store", r"harvest\.store: s3://bucket/store (needs a package|cannot be)"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            preflight(member(tmp_path, url))
        assert len(str(raised.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_is_used_as_it_is(tmp_path):
    place = store_place(HarvestSection(store=str(tmp_path / "store")))
    assert isinstance(place, FolderPlace)
    assert place.directory == tmp_path / "store"
    assert isinstance(store_place(HarvestSection(store="memory://a/b")), RemotePlace)
