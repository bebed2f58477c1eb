"""``sparsary list``: the registry of another library becomes our directory; what is printed."""

import pytest

import sparsary
from sparsary.eval.release_sources import REPOSITORIES, ROWS, refresh_releases, releases_of, table_of_releases
from sparsary.transcoders.releases import DIRECTORY, PublishedDictionary, release_directory

REGISTRY = """
gpt2-set:
  conversion_func: null
  model: gpt2-small
  repo_id: somebody/gpt2-set
  saes:
  - {id: blocks.0.hook_resid_pre, path: blocks.0, l0: 12.5, neuronpedia: gpt2-small/0-set}
  - {id: blocks.10.hook_resid_pre, path: blocks.10}
  - {id: blocks.2.hook_resid_pre, path: blocks.2}
layers-of-a-cross-layer-transcoder:
  model: gemma-2-2b
  repo_id: somebody/clt
  saes:
  - {id: layer_0, path: 0}
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(DIRECTORY, str(tmp_path / "releases.json.gz"))
    (tmp_path / "registry.yaml").write_text(REGISTRY)
    return tmp_path


def run(capsys, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["sparsary", *arguments])
    with pytest.raises(SystemExit) as status:
        sparsary.main()
    return status.value.code, capsys.readouterr()


def test_a_registry_becomes_the_directory(cache):
    path = refresh_releases(cache / "registry.yaml")
    first = path.read_bytes()
    directory = release_directory()
    assert set(directory.releases) == {"gpt2-set", *REPOSITORIES}
    assert [d.name.split(".")[1] for d in directory.releases["gpt2-set"].dictionaries] == ["0", "2", "10"]
    assert directory.get("gpt2-small/0-set") == PublishedDictionary(
        "gpt2-set/blocks.0.hook_resid_pre", "gpt2-set", "somebody/gpt2-set", "blocks.0", "openai-community/gpt2", 12.5,
        "gpt2-small/0-set",
    )  # fmt: skip
    assert directory.get("mntss/clt-gemma-2-2b-426k").place == (None, None)
    assert refresh_releases(cache / "registry.yaml").read_bytes() == first


@pytest.mark.parametrize(
    ("registry", "message"),
    [
        ("- a\n", "expected a mapping of releases, got list"),
        ("a: 1\n", "a: expected repo_id, model and saes with id and path"),
        ("a: {model: gpt2, repo_id: b/c, saes: [{path: d}]}\n", "a: expected repo_id, model and saes"),
        ("a: {model: gpt2, repo_id: b/c, saes: [{id: d, path: d, l0: many}]}\n", "a: expected repo_id, model and saes"),
        ("a: [\n", "expected YAML, got invalid YAML"),
        ("a: !!python/object/apply:os.system [echo]\n", "expected YAML, got invalid YAML"),
    ],
)
def test_another_layout_is_refused_and_nothing_written(cache, registry, message):
    (cache / "registry.yaml").write_text(registry)
    with pytest.raises(ValueError, match=message):
        refresh_releases(cache / "registry.yaml")
    assert not (cache / "releases.json.gz").exists()


def test_no_connection_is_one_message(monkeypatch):
    import httpx

    def refused(*_, **__):
        raise httpx.ConnectError("unreachable")

    monkeypatch.setattr(httpx, "stream", refused)
    with pytest.raises(ValueError, match=r"^https://.*: could not be downloaded \(unreachable\).*--registry FILE"):
        refresh_releases()
    with pytest.raises(ValueError, match=r"^nowhere: expected a file, or an address"):
        refresh_releases("nowhere")


def test_the_command_lists_dictionaries_and_of_many_their_releases(cache, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    status, printed = run(capsys, monkeypatch, "list", "--refresh", "--registry", str(cache / "registry.yaml"), "blocks.10")
    assert status == 0
    assert "gpt2-set/blocks.10.hook_resid_pre" in printed.out
    assert "blocks.2." not in printed.out
    assert f"1 of {3 + len(REPOSITORIES)} dictionaries" in printed.out
    status, printed = run(capsys, monkeypatch, "list", "gpt2-sett")
    assert status == 2
    assert "WORDS: expected parts of a published dictionary's name, got 'gpt2-sett'. Did you mean 'gpt2-set'?" in printed.err
    status, printed = run(capsys, monkeypatch, "list", "--registry", "file")
    assert (status, printed.err.count("\n")) == (2, 1)
    assert "--registry: expected together with --refresh" in printed.err


def test_more_than_a_screen_is_listed_by_release():
    many = [PublishedDictionary(f"set/{n}", "set", "me/set", str(n), "gpt2", float(n % 7), None) for n in range(ROWS + 1)]
    head, rows = table_of_releases(many)
    assert (head[0], rows) == ("release", [["set", "me/set", "gpt2", str(ROWS + 1), "0 to 6"]])
    assert len(table_of_releases(many[1:])[1]) == ROWS


def test_a_registry_without_readable_members_has_no_release():
    assert list(releases_of({"a": {"model": "gpt2", "repo_id": "b/c", "saes": [{"id": "x", "path": 0}]}}, "here")) == []
